package tcplb

import (
	"errors"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/prometheus/client_golang/prometheus"
)

func init() {
	caddy.RegisterModule(new(App))
}

// App gives the tcp_lb handlers of a config a start and a stop, which layer4
// handlers don't have: health checks begin when the config runs, not when it is
// only validated. Handlers bring it in by themselves; it has no options.
type App struct {
	events      *caddyevents.App
	generations map[string]*generation // by pool name
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "tcp_lb",
		New: func() caddy.Module { return new(App) },
	}
}

// Provision prepares the app.
func (a *App) Provision(ctx caddy.Context) error {
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	a.events = events.(*caddyevents.App)
	a.generations = make(map[string]*generation)
	return registerMetrics(ctx)
}

// join returns the generation that serves h, shared by all handlers of the
// config that have its name and settings.
func (a *App) join(ctx caddy.Context, h *Handler) (*generation, error) {
	g, err := h.newGeneration(ctx)
	if err != nil {
		return nil, err
	}
	if other := a.generations[h.Name]; other != nil {
		if other.fingerprint != g.fingerprint {
			return nil, fmt.Errorf("two tcp_lb handlers named %q have different settings: give one another name, or both the same settings", h.Name)
		}
		return other, nil
	}
	g.events = a.events
	a.generations[h.Name] = g
	return g, nil
}

// Start puts the config's pools to work and starts their health checks.
func (a *App) Start() error {
	for _, g := range a.generations {
		g.start()
	}
	return nil
}

// Stop takes the config's pools out of work. Connections go on if their backend
// is in the next config, and for drain_timeout if not.
func (a *App) Stop() error {
	for _, g := range a.generations {
		g.stop()
	}
	return nil
}

// Cleanup stops what a failed start of the config left behind.
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
	_ caddy.App          = (*App)(nil)
	_ caddy.Provisioner  = (*App)(nil)
	_ caddy.CleanerUpper = (*App)(nil)
)
