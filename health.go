package tcplb

import (
	"encoding/json"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(HealthHandler{})
	httpcaddyfile.RegisterHandlerDirective("tcp_lb_health", parseHealthHandler)
	httpcaddyfile.RegisterDirectiveOrder("tcp_lb_health", httpcaddyfile.Before, "respond")
}

// HealthHandler is an HTTP handler that tells a load balancer or an orchestrator
// in front whether this one can serve: 200 while every pool of the config has an
// available backend, 503 otherwise. The body is
//
//	{"status":"ok","pools":[{"name":"web","available":2,"total":3}]}
//
// where status is "ok" if all backends are available, "degraded" if some are not,
// and "unavailable" with a 503.
type HealthHandler struct{}

// CaddyModule returns the Caddy module information.
func (HealthHandler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.tcp_lb_health",
		New: func() caddy.Module { return new(HealthHandler) },
	}
}

type healthStatus struct {
	Status string       `json:"status"`
	Pools  []poolStatus `json:"pools"`
}

type poolStatus struct {
	Name      string `json:"name"`
	Available int    `json:"available"`
	Total     int    `json:"total"`
}

// currentHealth returns the health of all pools of the running config, and
// whether each has a backend.
func currentHealth() (status healthStatus, ok bool) {
	status, ok = healthStatus{Status: "ok", Pools: []poolStatus{}}, true
	degraded := false
	for _, p := range registry.snapshot() {
		if len(p.configured) == 0 {
			continue // only its last connections are left
		}
		s := poolStatus{Name: p.name, Total: len(p.configured)}
		for _, b := range p.configured {
			if b.Available() {
				s.Available++
			}
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

// ServeHTTP implements caddyhttp.MiddlewareHandler; it ends the chain.
func (HealthHandler) ServeHTTP(w http.ResponseWriter, _ *http.Request, _ caddyhttp.Handler) error {
	status, ok := currentHealth()
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

// UnmarshalCaddyfile reads the directive; it has no options:
//
//	tcp_lb_health [<matcher>]
func (HealthHandler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // directive name
	if d.NextArg() {
		return d.Errf("tcp_lb_health: takes no arguments, found %q", d.Val())
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("tcp_lb_health: takes no block, found %q", d.Val())
	}
	return nil
}

// Interface guards
var (
	_ caddyhttp.MiddlewareHandler = (*HealthHandler)(nil)
	_ caddyfile.Unmarshaler       = (*HealthHandler)(nil)
)
