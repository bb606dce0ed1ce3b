package tcplb

import (
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/loop"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
)

func init() {
	caddy.RegisterModule(new(Handler))
	relay.LimitPipes(int(files.Process.Limit() / 64))
	loop.Limit(int(min(files.Process.Limit()/64, 64)))
}

// Handler is a terminal layer4 handler that relays each TCP connection to one
// of several backends.
//
// Handlers of one name and the same settings share one pool of backends:
// health, position in the rotation, limit and counters.
type Handler struct {
	// Name labels the pool in metrics, logs and the admin API. Placeholders are
	// resolved once, when the config is loaded. Default: "tcp_lb".
	Name string `json:"name,omitempty"`
	// Backends are the servers to choose from, at least one unless there is a source
	// of them.
	Backends []BackendConfig `json:"backends,omitempty"`
	// DynamicBackendsRaw are sources of further backends, modules: each address
	// that one finds is a backend until it is found no more.
	DynamicBackendsRaw []json.RawMessage `json:"dynamic_backends,omitempty" caddy:"namespace=layer4.tcp_lb.sources inline_key=source"`
	// LoadBalancing says how a backend is chosen, and what happens when it can't
	// be reached.
	LoadBalancing *LoadBalancing `json:"load_balancing,omitempty"`
	// HealthChecks say how the backends' health is found out.
	HealthChecks *HealthChecks `json:"health_checks,omitempty"`
	// How backends are connected to, unless they say otherwise.
	ApproachConfig
	// MaxConnections is how many connections the pool serves at once; further
	// ones are closed. Default and 0: as many as the process may have files for,
	// at 2 a connection less a reserve, over all pools. That bound always holds.
	MaxConnections int `json:"max_connections,omitempty"`
	// MaxConnectionsPerClient is how many connections of the pool one client has at
	// once, those among them that wait for a backend; further ones are closed. A client
	// is an IPv4 address or the first 64 bits of an IPv6 address, that of a PROXY header
	// where a handler in front has read one. Clients of a Unix socket have no limit.
	// Default: 0, which is no limit.
	MaxConnectionsPerClient int `json:"max_connections_per_client,omitempty"`
	// CloseIfUnhealthy cuts the connections of a backend that checks have found
	// down, this long after. Default: they go on; 0 = they are cut at once.
	CloseIfUnhealthy *caddy.Duration `json:"close_if_unhealthy,omitempty"`
	// DialTimeout is the time for one connect, with name resolution. Default and
	// 0: 3s.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`
	// IdleTimeout ends a connection after this time without a byte either way,
	// or an eighth of it later at most. Default: 1h; 0 = never.
	IdleTimeout *caddy.Duration `json:"idle_timeout,omitempty"`
	// MaxLifetime ends a connection at this age, counted from when it had its backend.
	// Default: 0, which is never.
	MaxLifetime caddy.Duration `json:"max_lifetime,omitempty"`
	// MaxLifetimeSpread is by how many percent that is less or more, at random for each
	// connection: those that began together, as after a restart, should not end together.
	// Default: 10; 0 = not at all. It is at most 50.
	MaxLifetimeSpread *int `json:"max_lifetime_spread,omitempty"`
	// DrainTimeout is how long open connections may go on when the process exits
	// or their backend has left the config. Default: 30s; 0 = they are cut at once.
	DrainTimeout *caddy.Duration `json:"drain_timeout,omitempty"`
	// AccessLog writes one line for each finished connection.
	AccessLog bool `json:"access_log,omitempty"`
	// AccessLogConnects adds one when a connection has its backend.
	AccessLogConnects bool `json:"access_log_connects,omitempty"`
	// AccessLogInterval adds one so often while it is open. Default: 0, which is none;
	// 1s at least.
	AccessLogInterval caddy.Duration `json:"access_log_interval,omitempty"`

	generation *generation
}

// BackendConfig is one backend of a handler.
type BackendConfig struct {
	// Address is host:port, [IPv6]:port or unix//path. Placeholders are resolved
	// once, when the config is loaded; names at each connect.
	Address string `json:"address"`
	// Weight is the backend's share relative to the others', 0–256. Default: 1;
	// 0 = it gets no new connections, open ones and checks go on.
	Weight *int `json:"weight,omitempty"`
	// Backup keeps the backend back: it takes connections only while none of the
	// others is available.
	Backup bool `json:"backup,omitempty"`
	// MaxConnections is how many connections may be open to the backend at once, or
	// connecting, over all configs. It is passed over while it has as many; when
	// all are full, clients wait in order of arrival, for the try duration at most.
	// Default: 0, which is no limit.
	MaxConnections int `json:"max_connections,omitempty"`
	// HealthPort is probed instead of the backend's own, and of the port that the
	// active checks name for all. Default and 0: as that says.
	HealthPort int `json:"health_port,omitempty"`
	// How this backend is connected to.
	ApproachConfig
}

// LoadBalancing says how a backend is chosen.
type LoadBalancing struct {
	// SelectionPolicyRaw is the policy, a module. Default: round_robin.
	SelectionPolicyRaw json.RawMessage `json:"selection_policy,omitempty" caddy:"namespace=layer4.tcp_lb.selection_policies inline_key=policy"`
	// Retries is how many further backends are tried when a connect fails.
	// Default: every other available one, 3 at most; 0 = none.
	Retries *int `json:"retries,omitempty"`
	// TryDuration is how long to keep trying while no backend can be reached, and
	// to wait while all are full. Default: 0, which is not to.
	TryDuration caddy.Duration `json:"try_duration,omitempty"`
	// TryInterval is the time between those tries. Default and 0: 250ms.
	TryInterval caddy.Duration `json:"try_interval,omitempty"`
	// SlowStart is how long it takes a backend that comes back to get its whole
	// weight, from a tenth on. Default: 0, which is to get it at once.
	SlowStart caddy.Duration `json:"slow_start,omitempty"`
}

// HealthChecks say how the backends' health is found out.
type HealthChecks struct {
	// Active checks ask each backend now and then.
	Active *ActiveHealthChecks `json:"active,omitempty"`
	// Passive checks look at what becomes of clients' connections.
	Passive *PassiveHealthChecks `json:"passive,omitempty"`
}

// ActiveHealthChecks connect to every backend at intervals, and may ask it more:
// by HTTP where URI is set, in a dialogue where Dialogue is, or by a module. All
// of these may be over TLS.
type ActiveHealthChecks struct {
	// Disabled turns the checks off: every backend counts as up.
	Disabled bool `json:"disabled,omitempty"`
	// Interval is the time from probe to probe of one backend. Default and 0: 10s.
	Interval caddy.Duration `json:"interval,omitempty"`
	// FastInterval is the same while results speak against the verdict. After a
	// backend went down it grows from this to Interval. Default and 0: 1s, or
	// Interval if that is less. It may not exceed Interval.
	FastInterval caddy.Duration `json:"fast_interval,omitempty"`
	// Timeout is the time for one probe. Default and 0: 2s.
	Timeout caddy.Duration `json:"timeout,omitempty"`
	// InitiallyUnhealthy has backends that are new down until a check has passed.
	InitiallyUnhealthy bool `json:"initially_unhealthy,omitempty"`
	// Passes is how many successes in a row bring a down backend up. Default and 0: 2.
	Passes int `json:"passes,omitempty"`
	// Fails is how many failures in a row take an up backend down. Default and 0: 2.
	Fails int `json:"fails,omitempty"`
	// Port is probed instead of the backend's own. Default and 0: the own.
	Port int `json:"port,omitempty"`

	// URI is what an HTTP check asks for, a path with or without a query. It makes
	// the checks HTTP checks; this and the next five are those of checks.HTTP.
	URI string `json:"uri,omitempty"`
	// Method is the method. Default: GET.
	Method string `json:"method,omitempty"`
	// ExpectStatus is the status to answer, or its first digit. Default and 0: 2.
	ExpectStatus int `json:"expect_status,omitempty"`
	// Headers are sent along. Default: none.
	Headers http.Header `json:"headers,omitempty"`
	// ExpectBody is a regular expression that the body matches. Default: any body.
	ExpectBody string `json:"expect_body,omitempty"`
	// FollowRedirects asks again where an answer leads. Default: no.
	FollowRedirects bool `json:"follow_redirects,omitempty"`
	// Dialogue is what is sent, and what the answers contain; see checks.Step. It
	// makes the checks dialogues.
	Dialogue []checks.Step `json:"dialogue,omitempty"`
	// CheckRaw is a check of another kind, a module. Default: what is above says.
	CheckRaw json.RawMessage `json:"check,omitempty" caddy:"namespace=layer4.tcp_lb.checks inline_key=check"`
	// TLS has the checks speak TLS, of whatever kind they are; alone it wants a
	// handshake. Default: none.
	TLS *checks.TLS `json:"tls,omitempty"`
	// ProxyProtocol is the version, v1 or v2, of the PROXY header that checks begin
	// with, or off. Default: that of clients' connections, unless the checks go to
	// another port.
	ProxyProtocol checks.ProxyVersion `json:"proxy_protocol,omitempty"`
}

// PassiveHealthChecks take a backend out whose connections fail: connects, and
// connections that it resets, or closes within a second, before it has sent a
// byte. The last backend that is available is never taken out.
type PassiveHealthChecks struct {
	// FailDuration is for how long a failure counts, and a backend is out. Default:
	// 0, which is no passive checks.
	FailDuration caddy.Duration `json:"fail_duration,omitempty"`
	// MaxFails is how many failures take a backend out. Default and 0: 1.
	MaxFails int `json:"max_fails,omitempty"`
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

// Handle relays one connection. It returns when that has ended or, where it is
// a bare one of a tcp_lb listener, when it has its backend: the relay goes on
// by itself and closes both. It returns an error only for a listener that it
// can't serve; how a connection ended is the metrics' and the access log's
// business.
func (h *Handler) Handle(cx *layer4.Connection, _ layer4.Handler) error {
	if network := cx.LocalAddr().Network(); network != "tcp" && network != "unix" {
		return fmt.Errorf("tcp_lb %q serves TCP connections only, this listener's network is %q", h.Name, network)
	}
	if c := acceptedFrom(cx.Conn); c != nil && !c.Arrive() {
		return nil // too late, it was cut off just now
	}
	g := h.generation.live()
	if g == nil {
		return nil
	}
	g.serve(cx)
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner  = (*Handler)(nil)
	_ layer4.NextHandler = (*Handler)(nil)
)
