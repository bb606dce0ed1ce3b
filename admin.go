package tcplb

import (
	"encoding/json"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

func init() {
	caddy.RegisterModule(new(adminAPI))
}

// adminAPI serves /tcp_lb/backends, /tcp_lb/pools and /tcp_lb/connections on Caddy's
// admin endpoint.
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
	return []caddy.AdminRoute{
		{Pattern: "/tcp_lb/backends", Handler: caddy.AdminHandlerFunc(serveBackends)},
		{Pattern: "/tcp_lb/pools", Handler: caddy.AdminHandlerFunc(servePools)},
		{Pattern: "/tcp_lb/connections", Handler: caddy.AdminHandlerFunc(serveConnections)},
	}
}

// backendStatus is one backend as the admin API shows it.
type backendStatus struct {
	LB               string     `json:"lb"`
	Address          string     `json:"address"`
	Configured       bool       `json:"configured"`       // false = no longer in the config, its connections are being drained
	Weight           int64      `json:"weight"`           // in the config; 0 if it is not there
	State            string     `json:"state"`            // set by hand: ready, drain or maint
	EffectiveWeight  float64    `json:"effective_weight"` // of weight, state, the weight set by hand, and slow start; 0 = no new connections
	Source           string     `json:"source,omitempty"` // what found it; empty = the config names it
	Healthy          bool       `json:"healthy"`          // false = new connections don't go to it, since checks say so
	Health           string     `json:"health"`           // up, down, or unchecked: checks are off or have yet to tell
	Active           uint64     `json:"active"`
	Connecting       uint64     `json:"connecting"`      // connects under way: with none and none active, nobody is there
	MaxConnections   int64      `json:"max_connections"` // 0 = no limit
	Backup           bool       `json:"backup"`
	ConnectionsTotal uint64     `json:"connections_total"`
	ErrorsTotal      uint64     `json:"errors_total"`
	ReceivedBytes    uint64     `json:"received_bytes"`          // from clients
	SentBytes        uint64     `json:"sent_bytes"`              // to clients
	LastCheck        *time.Time `json:"last_check"`              // null = none yet
	LastError        string     `json:"last_error"`              // of the last probe or connect; empty once a probe succeeded, or a connect without checks, and while names resolve
	LastConnect      *time.Time `json:"last_connect"`            // for a client; null = none yet
	EjectedUntil     *time.Time `json:"ejected_until,omitempty"` // since clients' connections failed; nil = it is not
	LastConnectError string     `json:"last_connect_error"`      // empty = it worked
}

// poolSummary is one pool as the admin API shows it. Its numbers are those since
// the pool began, of backends that have left the config, too.
type poolSummary struct {
	LB               string             `json:"lb"`
	Backends         int                `json:"backends"`          // in the running config
	Available        int                `json:"available"`         // of those
	Draining         int                `json:"draining"`          // backends that left the config and have yet to end
	EffectiveWeight  float64            `json:"effective_weight"`  // sum over the backends
	States           map[string]int     `json:"states"`            // of the backends, as set by hand: how many are ready, drain and maint
	Sources          []discovery.Status `json:"sources,omitempty"` // of backends, which tell how they fare
	Active           uint64             `json:"active"`
	Waiting          int64              `json:"waiting"` // for a backend to be available, or for a place at one
	ConnectionsTotal uint64             `json:"connections_total"`
	ErrorsTotal      uint64             `json:"errors_total"` // failed connects
	RetriesTotal     uint64             `json:"retries_total"`
	NoBackend        uint64             `json:"no_backend"`                 // clients turned away for want of a backend …
	MaxConnections   uint64             `json:"max_connections"`            // … or over a limit
	OverClientLimit  uint64             `json:"max_connections_per_client"` // … or over the limit of one client
	ReceivedBytes    uint64             `json:"received_bytes"`             // from clients
	SentBytes        uint64             `json:"sent_bytes"`                 // to clients
}

func serveBackends(w http.ResponseWriter, r *http.Request) error {
	switch {
	case r.Method == http.MethodPatch:
		return changeBackends(w, r)
	case !isRead(r):
		return methodNotAllowed(w, r, "GET, HEAD, PATCH")
	}
	set, err := parameters(r, "lb", "address")
	if err != nil {
		return err
	}
	filter, err := parseBackendFilter(set)
	if err != nil {
		return err
	}
	list := []backendStatus{}
	for _, p := range registry.snapshot() {
		for _, b := range p.backends {
			if filter.matches(p.name, b) {
				list = append(list, b.status(p.name))
			}
		}
	}
	return sendJSON(w, list)
}

func servePools(w http.ResponseWriter, r *http.Request) error {
	if !isRead(r) {
		return methodNotAllowed(w, r, "GET, HEAD")
	}
	set, err := parameters(r, "lb")
	if err != nil {
		return err
	}
	list := []poolSummary{}
	for _, p := range registry.snapshot() {
		if lb := set["lb"]; lb == "" || lb == p.name {
			list = append(list, p.summary())
		}
	}
	return sendJSON(w, list)
}

func sendJSON(w http.ResponseWriter, list any) error {
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(list)
}

func (v poolView) summary() poolSummary {
	t := v.total()
	s := poolSummary{
		LB:               v.name,
		Backends:         len(v.configured),
		Draining:         len(v.backends) - len(v.configured),
		States:           map[string]int{"ready": 0, "drain": 0, "maint": 0},
		ConnectionsTotal: t.connections,
		ErrorsTotal:      t.errors,
		RetriesTotal:     t.retries,
		Waiting:          v.waiters.waiting.Load(),
		NoBackend:        v.closed[reasonNoBackend].Load(),
		MaxConnections:   v.closed[reasonMaxConnections].Load(),
		OverClientLimit:  v.closed[reasonMaxConnectionsPerClient].Load(),
		ReceivedBytes:    t.received,
		SentBytes:        t.sent,
	}
	tenths, now := int64(0), time.Now()
	for _, b := range v.configured {
		if b.Available() {
			s.Available++
		}
		tenths += b.effectiveTenths(now)
		s.States[b.byHand().state.String()]++
	}
	s.EffectiveWeight = float64(tenths) / slowSteps
	for _, b := range v.backends {
		_, active, _ := b.stats.connections()
		s.Active += active
	}
	if g := v.newest.Load(); g != nil {
		s.Sources = g.sourceStatuses()
	}
	return s
}

// health is the verdict in words: whoever has not asked does not know.
func (b *Backend) health() string {
	switch {
	case !b.isChecked():
		return "unchecked"
	case b.healthy.Load():
		return "up"
	default:
		return "down"
	}
}

func (b *Backend) status(lb string) backendStatus {
	opened, active, _ := b.stats.connections()
	s := backendStatus{
		LB:               lb,
		Address:          b.address,
		Configured:       b.used(),
		Weight:           b.weight.Load(),
		State:            b.byHand().state.String(),
		EffectiveWeight:  b.effectiveWeight(),
		Source:           textOf(&b.source),
		Healthy:          b.healthy.Load(),
		Health:           b.health(),
		Active:           active,
		Connecting:       uint64(max(b.Load()-int64(active), 0)),
		MaxConnections:   b.limit.Load(),
		Backup:           b.backup.Load(),
		ConnectionsTotal: opened,
		ErrorsTotal:      b.stats.dialErrors(),
		ReceivedBytes:    b.stats.received.Load(),
		SentBytes:        b.stats.sent.Load(),
	}
	s.LastCheck, s.LastConnect = momentOf(&b.lastCheck), momentOf(&b.lastConnect)
	s.EjectedUntil = momentOf(&b.ejected)
	s.LastError, s.LastConnectError = textOf(&b.lastError), textOf(&b.lastConnectError)
	if s.LastError == "" {
		s.LastError = b.target.name.troubled()
	}
	return s
}

// momentOf returns the time in Unix nanoseconds; nil for 0.
func momentOf(at *atomic.Int64) *time.Time {
	n := at.Load()
	if n == 0 {
		return nil
	}
	return new(time.Unix(0, n).UTC())
}

func textOf(p *atomic.Pointer[string]) string {
	if text := p.Load(); text != nil {
		return *text
	}
	return ""
}

// Interface guards
var (
	_ caddy.AdminRouter = (*adminAPI)(nil)
	_ caddy.Provisioner = (*adminAPI)(nil)
)
