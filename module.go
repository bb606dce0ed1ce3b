package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterModule(new(Handler))
}

// Handler is a terminal layer4 handler that relays each TCP connection to one
// of several backends.
//
// Handlers of one name and the same settings share one pool of backends:
// health, position in the rotation, limit and counters.
type Handler struct {
	// Name labels the pool in metrics, logs and the admin API. Default: "tcp_lb".
	Name string `json:"name,omitempty"`
	// Backends are the servers to choose from, at least one.
	Backends []BackendConfig `json:"backends,omitempty"`
	// LoadBalancing says how a backend is chosen, and what happens when it can't
	// be reached.
	LoadBalancing *LoadBalancing `json:"load_balancing,omitempty"`
	// HealthChecks say how the backends' health is found out.
	HealthChecks *HealthChecks `json:"health_checks,omitempty"`
	// MaxConnections is how many connections the pool serves at once; further
	// ones are closed. Default and 0: as many as the process may have files for,
	// at 2 a connection less a reserve, over all pools. That bound always holds.
	MaxConnections int `json:"max_connections,omitempty"`
	// DialTimeout is the time for one connect, with name resolution. Default and
	// 0: 3s.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`
	// IdleTimeout ends a connection after this time without a byte either way,
	// or an eighth of it later at most. Default: 1h; 0 = never.
	IdleTimeout *caddy.Duration `json:"idle_timeout,omitempty"`
	// DrainTimeout is how long open connections may go on when the process exits
	// or their backend has left the config. Default: 30s; 0 = they are cut at once.
	DrainTimeout *caddy.Duration `json:"drain_timeout,omitempty"`
	// AccessLog writes one INFO line for each finished connection.
	AccessLog bool `json:"access_log,omitempty"`

	generation *generation
}

// BackendConfig is one backend of a handler.
type BackendConfig struct {
	// Address is host:port, [IPv6]:port or unix//path. Placeholders are resolved
	// once, when the config is loaded; names at each connect.
	Address string `json:"address"`
	// Weight is the backend's share relative to the others', 1–256. Default: 1.
	Weight *int `json:"weight,omitempty"`
}

// LoadBalancing says how a backend is chosen.
type LoadBalancing struct {
	// SelectionPolicyRaw is the policy, a module. Default: round_robin.
	SelectionPolicyRaw json.RawMessage `json:"selection_policy,omitempty" caddy:"namespace=layer4.tcp_lb.selection_policies inline_key=policy"`
	// Retries is how many further backends are tried when a connect fails.
	// Default: every other available one, 3 at most; 0 = none.
	Retries *int `json:"retries,omitempty"`
	// TryDuration is how long to keep trying while no backend can be reached.
	// Default: 0, which is not to.
	TryDuration caddy.Duration `json:"try_duration,omitempty"`
	// TryInterval is the time between those tries. Default and 0: 250ms.
	TryInterval caddy.Duration `json:"try_interval,omitempty"`
}

// HealthChecks say how the backends' health is found out.
type HealthChecks struct {
	// Active checks connect to each backend now and then.
	Active *ActiveHealthChecks `json:"active,omitempty"`
}

// ActiveHealthChecks connect to every backend at intervals, over TCP.
type ActiveHealthChecks struct {
	// Disabled turns the checks off: every backend counts as up.
	Disabled bool `json:"disabled,omitempty"`
	// Interval is the time from probe to probe of one backend. Default and 0: 10s.
	Interval caddy.Duration `json:"interval,omitempty"`
	// FastInterval is the same while results speak against the verdict. Default
	// and 0: 1s, or Interval if that is less. It may not exceed Interval.
	FastInterval caddy.Duration `json:"fast_interval,omitempty"`
	// Timeout is the time for one probe. Default and 0: 2s.
	Timeout caddy.Duration `json:"timeout,omitempty"`
	// Passes is how many successes in a row bring a down backend up. Default and 0: 2.
	Passes int `json:"passes,omitempty"`
	// Fails is how many failures in a row take an up backend down. Default and 0: 2.
	Fails int `json:"fails,omitempty"`
	// Port is probed instead of the backend's own. Default and 0: the own.
	Port int `json:"port,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Handler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.tcp_lb",
		New: func() caddy.Module { return new(Handler) },
	}
}

// Provision fills in the defaults, resolves placeholders and checks everything.
// It connects nowhere and changes no state of a running config: that waits for
// the start of the app that it reports to.
func (h *Handler) Provision(ctx caddy.Context) error {
	app, err := ctx.App("tcp_lb")
	if err != nil {
		return err
	}
	if err := h.fill(); err != nil {
		return err
	}
	if err := h.check(); err != nil {
		return fmt.Errorf("tcp_lb %q: %w", h.Name, err)
	}
	h.generation, err = app.(*App).join(ctx, h)
	return err
}

// Handle relays one connection. It returns an error only for a listener that
// it can't serve; how a connection ended is the metrics' and the access log's
// business.
func (h *Handler) Handle(cx *layer4.Connection, _ layer4.Handler) error {
	if network := cx.LocalAddr().Network(); network != "tcp" && network != "unix" {
		return fmt.Errorf("tcp_lb %q serves TCP connections only, this listener's network is %q", h.Name, network)
	}
	g := h.generation.live()
	if g == nil {
		return nil
	}
	open.enter()
	defer open.leave()
	g.serve(cx)
	return nil
}

// serve is one connection's story.
func (g *generation) serve(cx *layer4.Connection) {
	rec := record{began: time.Now()}
	defer g.finish(cx, &rec)

	release, ok := g.admit(cx)
	if !ok {
		rec.why = reasonMaxConnections
		return
	}
	defer release()
	defer cx.Close() // before its file is given back

	rec.link, rec.err = g.connect(cx.RemoteAddr())
	if rec.err != nil {
		rec.why = reasonNoBackend
		return
	}
	defer rec.conn.Close()

	s := g.newSession(cx, rec.link)
	rec.entered = s
	if !rec.backend.enter(s) {
		s.end(reasonDrainTimeout)
	}
	rec.why = s.relay.run()
	rec.received, rec.sent = s.relay.up.moved.Load(), s.relay.down.moved.Load()
}

// admit counts the connection against the limits.
func (g *generation) admit(cx *layer4.Connection) (release func(), ok bool) {
	p := g.pool
	if n := p.active.Add(1); g.limit > 0 && n > g.limit {
		p.active.Add(-1)
		g.warnOfLimit(g.limit)
		return nil, false
	}
	release, ok = g.leavePool, true
	if c := acceptedFrom(cx.Conn); c != nil {
		ok = c.admit()
	} else if ok = files.acquirePair(); ok {
		release = g.leavePoolAndFiles
	}
	if !ok {
		p.active.Add(-1)
		g.warnOfLimit(files.limit / filesPerConnection)
	}
	return release, ok
}

func (g *generation) leavePool() { g.pool.active.Add(-1) }

func (g *generation) leavePoolAndFiles() {
	files.releasePair()
	g.leavePool()
}

// newSession makes the relay between the client and its backend.
func (g *generation) newSession(cx *layer4.Connection, l link) *session {
	r := newRelay(clientConn(cx), l.conn, g.idleTimeout)
	r.onPanic = g.logPanic
	r.up.total, r.down.total = &l.backend.stats.received, &l.backend.stats.sent
	if len(cx.MatchingBytes()) > 0 {
		r.up.prefetched = cx
		r.up.pending = func() bool { return len(cx.MatchingBytes()) > 0 }
	}
	return &session{generation: g, relay: r}
}

// clientConn returns the connection to relay: the socket itself if nothing is
// in between, else caddy-l4's view of it.
func clientConn(cx *layer4.Connection) net.Conn {
	switch c := cx.Conn.(type) {
	case *acceptedConn:
		return c.TCPConn
	case *net.TCPConn, *net.UnixConn:
		return c
	}
	return cx
}

// record is what is known of a connection at its end.
type record struct {
	link
	began          time.Time
	entered        *session // nil: it never had a backend
	received, sent uint64
	why            reason
	err            error
}

// finish counts and logs the end of a connection, contains a panic, and lets go
// of the backend.
func (g *generation) finish(cx *layer4.Connection, rec *record) {
	if v := recover(); v != nil {
		g.logPanic(v, debug.Stack())
		rec.why = reasonError
	}
	duration := time.Since(rec.began)
	switch {
	case rec.entered != nil:
		rec.backend.leave(rec.entered, rec.why, duration)
	case rec.why == reasonNoBackend:
		g.pool.noBackend.Add(1)
	case rec.why == reasonMaxConnections:
		g.pool.overLimit.Add(1)
	default:
		g.pool.failed.Add(1)
	}
	g.logAccess(cx, rec, duration)
	if rec.release != nil {
		rec.release()
	}
}

func (g *generation) logPanic(value any, stack []byte) {
	g.logger.Error("panic while handling a connection",
		zap.String("lb", g.name), zap.Any("panic", value), zap.ByteString("stack", stack))
}

// logAccess writes the connection's line, through the newest config's log: that
// of the one which accepted it may be closed.
func (g *generation) logAccess(cx *layer4.Connection, rec *record, duration time.Duration) {
	to := g
	if newest := g.pool.newest.Load(); newest != nil {
		to = newest
	}
	if rec.why == reasonNoBackend {
		to.logger.Debug("no backend could be reached",
			zap.String("lb", g.name), zap.Stringer("client", cx.RemoteAddr()),
			zap.Int("attempt", rec.attempts), zap.Error(rec.err))
	}
	if !to.accessLog {
		return
	}
	var backend string
	if rec.backend != nil {
		backend = rec.backend.address
	}
	fields := []zap.Field{
		zap.String("lb", g.name),
		zap.Stringer("client", cx.RemoteAddr()),
		zap.String("backend", backend),
		zap.Int("attempts", rec.attempts),
		zap.Duration("dial_time", rec.took),
		zap.Duration("duration", duration),
		zap.Uint64("received_bytes", rec.received),
		zap.Uint64("sent_bytes", rec.sent),
		zap.Stringer("reason", rec.why),
	}
	if rec.err != nil && !errors.Is(rec.err, net.ErrClosed) {
		fields = append(fields, zap.Error(rec.err))
	}
	to.access.Info("connection", fields...)
}

// warnOfLimit logs that connections are being refused, once a minute at most.
func (g *generation) warnOfLimit(limit int64) {
	now := time.Now().UnixNano()
	next := g.pool.nextLimitNotice.Load()
	if now < next || !g.pool.nextLimitNotice.CompareAndSwap(next, now+int64(time.Minute)) {
		return
	}
	g.logger.Warn("connection limit reached, closing new connections",
		zap.String("lb", g.name), zap.Int64("limit", limit))
}

// Interface guards
var (
	_ caddy.Provisioner  = (*Handler)(nil)
	_ layer4.NextHandler = (*Handler)(nil)
)
