package tcplb

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/prometheus/client_golang/prometheus"
)

func init() {
	caddy.RegisterModule(new(App))
}

// App gives the tcp_lb handlers of a config a start and a stop, which layer4
// handlers don't have. Handlers bring it in by themselves; it need be in the
// config for its options only.
//
// What it starts, health checks among it, it starts once all apps of the config
// run: a config that is only validated, or of which another app can't start,
// touches nothing, and a backend that this process serves is there by then.
type App struct {
	// HandshakeTimeout is the time from a connection's being accepted by a tcp_lb
	// listener to its reaching a tcp_lb handler, with whatever comes before that:
	// matching, a TLS handshake, a PROXY header. It holds for listeners all of
	// whose connections lead to tcp_lb. Default: 10s; 0 = no limit.
	HandshakeTimeout *caddy.Duration `json:"handshake_timeout,omitempty"`

	// ShutdownDelay is how long an exit waits before listening stops and connections are
	// drained. Meanwhile all goes on, and tcp_lb_health answers 503, so that who asks
	// it sends new connections elsewhere. Default: 0, which is not to wait.
	ShutdownDelay caddy.Duration `json:"shutdown_delay,omitempty"`

	ctx         caddy.Context
	servers     []*layer4Server       // nil: none of the handlers so far is in one
	waiting     *listener.WaitingList // the config's connections on their way to a handler
	events      *caddyevents.App
	generations map[string]*generation // by pool name
	asked       []askedPool            // that HTTP handlers name
	records     bool                   // a status page wants histories
	recording   atomic.Bool            // they are recorded for this config
}

// askedPool is a pool that an HTTP handler names.
type askedPool struct{ by, name string }

// ask has Start look if there are the pools that a handler names.
func (a *App) ask(by string, names []string) {
	for _, name := range names {
		a.asked = append(a.asked, askedPool{by, name})
	}
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "tcp_lb",
		New: func() caddy.Module { return new(App) },
	}
}

// UnmarshalJSON is that of Handler, for the app.
func (a *App) UnmarshalJSON(b []byte) error {
	type plain App // without this method
	return decodePlaced(b, (*plain)(a), reflect.TypeFor[plain]())
}

// Provision prepares the app.
func (a *App) Provision(ctx caddy.Context) error {
	if caddy.Exiting() { // a load that has waited for the end of the config before
		return errors.New("the process is exiting")
	}
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	fillIn(a, globalOptions)
	if err := checkAll(a, globalOptions); err != nil {
		return err
	}
	a.waiting = listener.NewWaitingList(time.Duration(*a.HandshakeTimeout))
	a.ctx = ctx
	a.events = events.(*caddyevents.App)
	a.generations = make(map[string]*generation)
	if err := a.events.On("started", &starter{app: a}); err != nil {
		return err
	}
	if err := a.events.On("stopping", &stopper{app: a}); err != nil {
		return err
	}
	return registerMetrics(ctx)
}

// starter is called when all apps of the config run.
type starter struct{ app *App }

// Handle implements caddyevents.Handler.
func (s *starter) Handle(_ context.Context, e caddy.Event) error {
	if e.Origin() != nil {
		return nil // some module's event of the same name, not Caddy's own
	}
	for _, name := range s.app.poolNames() {
		s.app.generations[name].begin()
	}
	if s.app.records && !s.app.recording.Swap(true) {
		recent.begin()
	}
	adviseOfListeners(s.app.servers, s.app.ctx.Logger())
	return nil
}

// stopper is called before the first app of the config is stopped. On an exit
// Caddy stops one after the other, in no order, and an HTTP server may take its time.
type stopper struct{ app *App }

// Handle implements caddyevents.Handler.
func (s *stopper) Handle(_ context.Context, e caddy.Event) error {
	if e.Origin() == nil && caddy.Exiting() {
		listenForTermination()
		s.app.delayShutdown()
		err := s.app.Stop()
		go cutOnTermination() // an app that Caddy stops first may take its time
		return err
	}
	return nil
}

// join returns the generation that serves h, shared by all handlers of the
// config that have its name and settings.
func (a *App) join(ctx caddy.Context, h *Handler) (*generation, error) {
	if err := a.meetServers(ctx); err != nil {
		return nil, err
	}
	if err := checkCircle(a.servers, h); err != nil {
		return nil, fmt.Errorf("tcp_lb %q: %w", h.Name, err)
	}
	g, err := h.newGeneration(ctx)
	if err != nil {
		return nil, err
	}
	if other := a.generations[h.Name]; other != nil {
		if other.fingerprint != g.fingerprint {
			return nil, fmt.Errorf("%s: %s", twoOfOneName(h), firstDifference(other.fingerprint, g.fingerprint))
		}
		return other, nil
	}
	g.events = a.events
	g.refuse = func(t target) error { return refuseCircle(a.servers, g.name, t) }
	a.generations[h.Name] = g
	return g, nil
}

// meetServers looks at the servers of the layer4 app that provisions the first
// handler; those in an HTTP server's listener wrapper have none.
func (a *App) meetServers(ctx caddy.Context) error {
	if a.servers != nil {
		return nil
	}
	for _, m := range ctx.Modules() {
		if app, ok := m.(*layer4.App); ok {
			a.servers = layer4Servers(app)
			return checkServers(a.servers)
		}
	}
	return nil
}

// Start refuses what is known to be wrong only when all apps are provisioned. For
// the rest see starter.
func (a *App) Start() error {
	for _, pool := range a.asked {
		if a.generations[pool.name] == nil {
			return fmt.Errorf("%s: %s", pool.by, unknown("pool", pool.name, a.poolNames(), nil))
		}
	}
	app, err := a.ctx.AppIfConfigured("http")
	if err != nil {
		return nil // there is none
	}
	return checkHTTPServers(a.servers, app.(*caddyhttp.App))
}

// poolNames returns the names of the config's pools, sorted.
func (a *App) poolNames() []string { return slices.Sorted(maps.Keys(a.generations)) }

// Stop takes the config's pools out of work. Connections go on if their backend
// is in the next config, and for drain_timeout if not.
func (a *App) Stop() error {
	for _, g := range a.generations {
		g.hurrySources()
	}
	for _, g := range a.generations {
		g.stop()
	}
	if a.recording.Swap(false) {
		recent.end()
	}
	if a.waiting != nil { // else it could not be provisioned
		a.waiting.Close()
	}
	return nil
}

// Cleanup stops what was started if the config failed after that.
func (a *App) Cleanup() error { return a.Stop() }

// registerMetrics adds the collector to the config's registry, which several
// modules of a config share.
func registerMetrics(ctx caddy.Context) error {
	err := ctx.GetMetricsRegistry().Register(collector{})
	var already prometheus.AlreadyRegisteredError
	if err != nil && !errors.As(err, &already) {
		return fmt.Errorf("registering metrics: %w", err)
	}
	return nil
}

// Interface guards
var (
	_ caddy.App           = (*App)(nil)
	_ caddy.Provisioner   = (*App)(nil)
	_ caddy.CleanerUpper  = (*App)(nil)
	_ caddyevents.Handler = (*starter)(nil)
	_ caddyevents.Handler = (*stopper)(nil)
)
