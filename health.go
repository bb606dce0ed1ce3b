package tcplb

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(HealthHandler))
	httpcaddyfile.RegisterHandlerDirective("tcp_lb_health", parseHealthHandler)
	httpcaddyfile.RegisterDirectiveOrder("tcp_lb_health", httpcaddyfile.Before, "respond")
}

// HealthHandler is an HTTP handler that tells a load balancer or an orchestrator
// in front whether this one can serve: 200 while every pool of the config, or
// every one that is named, has an available backend, 503 otherwise. The body is
//
//	{"status":"ok","pools":[{"name":"web","available":2,"total":3}]}
//
// where status is "ok" if all backends are available, "degraded" if some are not,
// and "unavailable" with a 503. While the process exits it is that, whatever the
// backends are, and "shutting_down" is true.
//
// A backend is available once a check has found it up, or at once where checks
// are off. What one config has found out holds for the next.
type HealthHandler struct {
	// Pools are the names of those that count. Default: all of the config.
	Pools []string `json:"pools,omitempty"`

	app *App
}

// CaddyModule returns the Caddy module information.
func (*HealthHandler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.tcp_lb_health",
		New: func() caddy.Module { return new(HealthHandler) },
	}
}

// Provision resolves placeholders. Whether there are pools of those names shows
// when all apps of the config are provisioned: see App.Start.
func (h *HealthHandler) Provision(ctx caddy.Context) error {
	app, err := ctx.App("tcp_lb")
	if err != nil {
		return err
	}
	h.app = app.(*App)
	if h.Pools, err = resolvePools(h.Pools); err != nil {
		return fmt.Errorf("tcp_lb_health: %w", err)
	}
	h.app.ask("tcp_lb_health", h.Pools)
	return nil
}

// resolvePools resolves the placeholders in names of pools.
func resolvePools(names []string) ([]string, error) {
	repl := caddy.NewReplacer()
	var list []string
	for _, name := range names {
		resolved, err := repl.ReplaceOrErr(name, true, true)
		if err != nil {
			return nil, fmt.Errorf("pool %q: %w", name, err)
		}
		if slices.Contains(list, resolved) {
			return nil, fmt.Errorf("pool %q is listed twice", resolved)
		}
		list = append(list, resolved)
	}
	return list, nil
}

type healthStatus struct {
	Status string `json:"status"`
	// ShuttingDown: the process exits, and serves for a while yet.
	ShuttingDown bool `json:"shutting_down,omitempty"`

	Pools []poolStatus `json:"pools"`
}

type poolStatus struct {
	Name      string `json:"name"`
	Available int    `json:"available"`
	Total     int    `json:"total"`
}

// health returns the health of the pools, of all if none is named, and whether
// each has a backend.
func (a *App) health(names []string) (status healthStatus, ok bool) {
	status, ok = healthStatus{Status: "ok", Pools: []poolStatus{}}, true
	if len(names) == 0 {
		names = a.poolNames()
	}
	degraded := false
	if caddy.Exiting() {
		status.ShuttingDown, ok = true, false
	}
	for _, name := range names {
		s := poolStatus{Name: name}
		if g := a.generations[name]; g != nil { // else the config is about to be refused, see Start
			s = g.health()
		}
		ok = ok && s.Available > 0
		degraded = degraded || s.Available < s.Total
		status.Pools = append(status.Pools, s)
	}
	switch {
	case !ok:
		status.Status = "unavailable"
	case degraded:
		status.Status = "degraded"
	}
	return status, ok
}

// health returns how many backends can serve. Around a reload, when another
// config's generation has the pool, that is what it says; while none has it none can.
func (g *generation) health() poolStatus {
	s := poolStatus{Name: g.name, Total: len(g.config)}
	serving := g
	if !isClosed(g.started) || isClosed(g.stopped) {
		serving = registry.newest(g.name)
	}
	if serving == nil {
		return s
	}
	s.Total = len(serving.members())
	for _, m := range serving.members() {
		known := m.Backend.isChecked() || serving.standing || !serving.checks.enabled
		if known && m.Backend.Available() {
			s.Available++
		}
	}
	return s
}

// ServeHTTP implements caddyhttp.MiddlewareHandler; it ends the chain.
func (h *HealthHandler) ServeHTTP(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
	status, ok := h.app.health(h.Pools)
	body, err := json.Marshal(status)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, err = w.Write(append(body, '\n'))
	return err
}

func parseHealthHandler(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	var handler HealthHandler
	return &handler, handler.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile reads the directive:
//
//	tcp_lb_health [<matcher>] [<pool>...]
//
// As everywhere in Caddy a first argument that begins with /, * or @ is the
// matcher.
func (h *HealthHandler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // directive name
	for d.NextArg() {
		if d.Val() == "" {
			return d.Errf("tcp_lb_health: want names of pools, found an empty one")
		}
		if slices.Contains(h.Pools, d.Val()) {
			return d.Errf("tcp_lb_health: pool %q is listed twice", d.Val())
		}
		h.Pools = append(h.Pools, d.Val())
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("tcp_lb_health: takes no block, found %q: names of pools stand on the line", d.Val())
	}
	return nil
}

// Interface guards
var (
	_ caddyhttp.MiddlewareHandler = (*HealthHandler)(nil)
	_ caddyfile.Unmarshaler       = (*HealthHandler)(nil)
	_ caddy.Provisioner           = (*HealthHandler)(nil)
)
