package tcplb

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddy.RegisterModule(new(adminAPI))
}

// adminAPI serves GET /tcp_lb/backends on Caddy's admin endpoint.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (*adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.tcp_lb",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Provision registers the metrics with this config's registry, too: after a
// failed load the admin endpoint keeps serving the failed config's.
func (*adminAPI) Provision(ctx caddy.Context) error { return registerMetrics(ctx) }

// Routes implements caddy.AdminRouter.
func (*adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{Pattern: "/tcp_lb/backends", Handler: caddy.AdminHandlerFunc(serveBackends)}}
}

// backendStatus is one backend as the admin API shows it.
type backendStatus struct {
	LB               string     `json:"lb"`
	Address          string     `json:"address"`
	Weight           int64      `json:"weight"` // 0 = no longer in the config, its connections are being drained
	Healthy          bool       `json:"healthy"`
	Active           uint64     `json:"active"`
	ConnectionsTotal uint64     `json:"connections_total"`
	ErrorsTotal      uint64     `json:"errors_total"`
	ReceivedBytes    uint64     `json:"received_bytes"` // from clients
	SentBytes        uint64     `json:"sent_bytes"`     // to clients
	LastCheck        *time.Time `json:"last_check"`     // null = none yet
	LastError        string     `json:"last_error"`     // of the last probe or connect; empty once a probe succeeded and while names resolve
}

func serveBackends(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return caddy.APIError{
			HTTPStatus: http.StatusMethodNotAllowed,
			Err:        fmt.Errorf("method %s is not allowed, want GET", r.Method),
		}
	}
	list := []backendStatus{}
	for _, p := range registry.snapshot() {
		for _, b := range p.backends {
			list = append(list, b.status(p.name))
		}
	}
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(list)
}

func (b *Backend) status(lb string) backendStatus {
	opened, active, _ := b.stats.connections()
	s := backendStatus{
		LB:               lb,
		Address:          b.address,
		Weight:           b.weight.Load(),
		Healthy:          b.healthy.Load(),
		Active:           active,
		ConnectionsTotal: opened,
		ErrorsTotal:      b.stats.dialErrors(),
		ReceivedBytes:    b.stats.received.Load(),
		SentBytes:        b.stats.sent.Load(),
	}
	if at := b.lastCheck.Load(); at != 0 {
		t := time.Unix(0, at).UTC()
		s.LastCheck = &t
	}
	if msg := b.lastError.Load(); msg != nil {
		s.LastError = *msg
	} else {
		s.LastError = b.target.name.troubled()
	}
	return s
}

// Interface guards
var (
	_ caddy.AdminRouter = (*adminAPI)(nil)
	_ caddy.Provisioner = (*adminAPI)(nil)
)
