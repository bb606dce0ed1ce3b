package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// Each option is declared once, here. The Caddyfile's parser, the defaults, the
// refusals, the comparison of two handlers and what is said of mistakes work
// from these tables, and tests hold README, docs/options.md and comments to them. A further
// option is its field and its row.

// spec is what is said of an option.
type spec struct {
	name    string // in a Caddyfile
	values  string // what follows it there
	path    string // in JSON, from the object that it belongs to
	unset   string // what holds without it, where its default does not tell
	zero    string // what 0 means, where that is not the default
	help    string // in Markdown
	aside   string // of what one looks for here in vain, and finds elsewhere
	repeats bool   // it may come more than once
}

// option is an option of a T: of a handler, of one of its backends, or of the
// app. What holds for a handler or for one backend has a row in either table.
type option[T any] struct {
	spec
	kind kind[T]
}

// They are set as the program starts, since what their rows name looks at them.
var (
	handlerOptions []option[Handler]
	backendOptions []option[BackendConfig] // in a backend's block
	globalOptions  []option[App]
)

func init() {
	handlerOptions = []option[Handler]{
		{spec{name: "name", values: "<name>", path: "name", unset: "`tcp_lb`",
			help: "the pool's name in metrics, logs and the admin API; placeholders are resolved as in addresses"},
			asText("a name", defaultName, checkName, plain(func(h *Handler) *string { return &h.Name }))},
		{spec{name: "backend", values: "<address> [<weight>]", path: "backends", unset: "weight 1", repeats: true,
			help: "a backend; options of its own stand in a block, the weight may stand there, too"},
			kind[Handler]{read: (*parser).backend, check: checkBackends}},
		{spec{name: "dynamic", values: "<source> [...]", path: "dynamic_backends", unset: "none", repeats: true,
			help: "backends that come and go: each address that the source finds is one"},
			kind[Handler]{read: (*parser).dynamic, show: sourcesText}},

		{spec{name: "lb_policy", values: "<policy> [...]", path: "load_balancing.selection_policy", unset: "`round_robin`",
			help: "who gets a connection: `round_robin`, `least_conn`, `random`, `random_choose`, `first` or `ip_hash`, all by weight but `first`; see [Policies](docs/policies.md)"},
			asModule(defaultPolicy, func(h *Handler) *json.RawMessage { return &h.loadBalancing().SelectionPolicyRaw }).readBy((*parser).policy)},
		{spec{name: "lb_retries", values: "<number>", path: "load_balancing.retries", unset: "3, or as many as there are", zero: "none",
			help: "further backends to try when a connect fails"},
			asNumber(0, maxRetries, defaultRetries, optional(func(h *Handler) **int { return &h.loadBalancing().Retries }))},
		{spec{name: "lb_try_duration", values: "<duration>", path: "load_balancing.try_duration", zero: "not to wait",
			help: "how long to keep trying while no backend can be reached"},
			asDuration(0, 0, plain(func(h *Handler) *caddy.Duration { return &h.loadBalancing().TryDuration }))},
		{spec{name: "lb_try_interval", values: "<duration>", path: "load_balancing.try_interval",
			help: "the pause between those tries"},
			asDuration(minDuration, defaultTryInterval, plain(func(h *Handler) *caddy.Duration { return &h.loadBalancing().TryInterval }))},
		{spec{name: "lb_slow_start", values: "<duration>", path: "load_balancing.slow_start", zero: "its weight at once",
			help: "how long a backend that comes back, or joins, takes to get its whole weight, from a tenth on (but with `first`); see [Slow start](docs/policies.md#slow-start)"},
			asDuration(0, 0, plain(func(h *Handler) *caddy.Duration { return &h.loadBalancing().SlowStart }))},

		{spec{name: "health_interval", values: "<duration>|off", path: "health_checks.active.interval",
			help: "from probe to probe of one backend; `off` is `disabled` in JSON"},
			asDuration(minDuration, defaultInterval, plain(func(h *Handler) *caddy.Duration { return &h.activeChecks().Interval })).
				readBy((*parser).healthInterval).shownBy(intervalText)},
		{spec{name: "health_fast_interval", values: "<duration>", path: "health_checks.active.fast_interval", unset: "1s, or the interval if less",
			help: "the same while a verdict is changing, and just after a backend went down"},
			asDuration(minDuration, defaultFastInterval, plain(func(h *Handler) *caddy.Duration { return &h.activeChecks().FastInterval })).
				filledBy(fillFastInterval).checkedBy(checkFastInterval)},
		{spec{name: "health_timeout", values: "<duration>", path: "health_checks.active.timeout",
			help: "for one probe"},
			asDuration(minDuration, defaultCheckTimeout, plain(func(h *Handler) *caddy.Duration { return &h.activeChecks().Timeout }))},
		{spec{name: "health_passes", values: "<number>", path: "health_checks.active.passes",
			help: "successes in a row that bring a down backend up"},
			asNumber(1, maxCounts, defaultPasses, plain(func(h *Handler) *int { return &h.activeChecks().Passes }))},
		{spec{name: "health_fails", values: "<number>", path: "health_checks.active.fails",
			help: "failures in a row that take an up backend down"},
			asNumber(1, maxCounts, defaultFails, plain(func(h *Handler) *int { return &h.activeChecks().Fails }))},
		{spec{name: "health_port", values: "<port>", path: "health_checks.active.port", unset: "the backend's own port",
			help: "probe this port instead"},
			asNumber(1, math.MaxUint16, 0, plain(func(h *Handler) *int { return &h.activeChecks().Port })).orShown("the backend's own")},
	}
	handlerOptions = append(handlerOptions, checkOptions()...)
	handlerOptions = append(handlerOptions, approachOptions("off", func(h *Handler) *ApproachConfig { return &h.ApproachConfig })...)
	handlerOptions = append(handlerOptions, []option[Handler]{

		{spec{name: "max_connections", values: "<number>", path: "max_connections", unset: "as many as the limit of open files allows",
			help: "of this pool; further ones are closed"},
			asNumber(0, math.MaxInt32, 0, plain(func(h *Handler) *int { return &h.MaxConnections }))},
		{spec{name: "max_connections_per_client", values: "<number>", path: "max_connections_per_client", unset: "no limit",
			help: "of this pool that one client has at once, by its address (IPv6: by /64), or that of a PROXY header that was read; further ones are closed (see [who is one](docs/connections.md#max_connections_per_client))"},
			asNumber(0, math.MaxInt32, 0, plain(func(h *Handler) *int { return &h.MaxConnectionsPerClient }))},
		{spec{name: "dial_timeout", values: "<duration>", path: "dial_timeout",
			help: "for one connect, name resolution included"},
			asDuration(minDuration, defaultDialTimeout, plain(func(h *Handler) *caddy.Duration { return &h.DialTimeout }))},
		{spec{name: "idle_timeout", values: "<duration>", path: "idle_timeout", zero: "never",
			help: "end a connection after this time without a byte either way, or an eighth later at most"},
			asDuration(0, defaultIdleTimeout, optional(func(h *Handler) **caddy.Duration { return &h.IdleTimeout }))},
		{spec{name: "max_lifetime", values: "<duration> [<percent>%]", path: "max_lifetime", unset: "none",
			help: "end a connection at this age, less or more by up to so much at random (10% unless it is said; `max_lifetime_spread` in JSON, where 0 is none); see [max_lifetime](docs/connections.md#max_lifetime)"},
			asLifetime()},
		{spec{name: "drain_timeout", values: "<duration>", path: "drain_timeout", zero: "at once",
			help: "what open connections get on exit, or when their backend leaves the config, before they are cut"},
			asDuration(0, defaultDrainTimeout, optional(func(h *Handler) **caddy.Duration { return &h.DrainTimeout }))},
		{spec{name: "access_log", values: "[{ ... }]", path: "access_log", unset: "off", aside: "Caddy's global option log says where its lines go",
			help: "one line for each finished connection, WARN if it failed, else INFO; see [Logs](docs/logs.md)"},
			asAccessLog()},
	}...)

	backendOptions = []option[BackendConfig]{
		{spec{name: "weight", values: "<0-256>", path: "weight", zero: "no new connections, open ones go on",
			help: "its share relative to the others'"},
			asNumber(0, maxWeight, defaultWeight, optional(func(b *BackendConfig) **int { return &b.Weight }))},
		{spec{name: "backup", path: "backup",
			help: "takes connections only while no other backend is available"},
			asFlag(func(b *BackendConfig) *bool { return &b.Backup })},
		{spec{name: "max_connections", values: "<number>", path: "max_connections", unset: "no limit",
			help: "open to this backend at once, or connecting; what is over goes to the others, or waits up to `lb_try_duration`"},
			asNumber(0, math.MaxInt32, 0, plain(func(b *BackendConfig) *int { return &b.MaxConnections }))},
		{spec{name: "health_port", values: "<port>", path: "health_port", unset: "the handler's",
			help: "probe this port of the backend instead"},
			asNumber(1, math.MaxUint16, 0, plain(func(b *BackendConfig) *int { return &b.HealthPort })).orShown("the handler's")},
	}
	backendOptions = append(backendOptions, approachOptions("the handler's", func(b *BackendConfig) *ApproachConfig { return &b.ApproachConfig })...)

	globalOptions = []option[App]{
		{spec{name: "handshake_timeout", values: "<duration>", path: "handshake_timeout", zero: "none",
			help: "what a connection of a `tcp_lb/` listener gets from being accepted to reaching `tcp_lb`, a TLS handshake and the like included (see [Silent clients](docs/operating.md#silent-clients))"},
			asDuration(0, defaultHandshakeTimeout, optional(func(a *App) **caddy.Duration { return &a.HandshakeTimeout }))},
		{spec{name: "shutdown_delay", values: "<duration>", path: "shutdown_delay", zero: "none",
			help: "how long an exit goes on as before, while `tcp_lb_health` answers 503, before listening stops and `drain_timeout` begins; see [shutdown_delay](docs/connections.md#shutdown_delay)"},
			asDuration(0, 0, plain(func(a *App) *caddy.Duration { return &a.ShutdownDelay }))},
	}
}

// named returns the option of the name, or nil.
func named[T any](options []option[T], name string) *option[T] {
	for i := range options {
		if options[i].name == name {
			return &options[i]
		}
	}
	return nil
}

func namesOf[T any](options []option[T]) (names []string) {
	for _, o := range options {
		names = append(names, o.name)
	}
	return names
}

// specAt returns what is said of the option at the path of a handler's JSON, or
// of the app's; nothing if there is none.
func specAt(path string) spec {
	if _, inBackend, ok := strings.Cut(path, "]."); ok {
		return atPath(backendOptions, inBackend)
	}
	for _, list := range [][]option[Handler]{handlerOptions, accessLogOptions} {
		if s := atPath(list, path); s.name != "" {
			return s
		}
	}
	return atPath(globalOptions, path)
}

func atPath[T any](options []option[T], path string) spec {
	for _, o := range options {
		if o.path == path {
			return o.spec
		}
	}
	return spec{}
}

// fillIn puts the defaults where nothing is set, in the order of the options.
func fillIn[T any](t *T, options []option[T]) {
	for _, o := range options {
		if o.kind.fill != nil {
			o.kind.fill(t)
		}
	}
}

// checkAll refuses what is wrong in t, whose defaults are filled in. It names
// options as the JSON does. The Caddyfile's parser makes the same checks
// earlier, where it knows the line.
func checkAll[T any](t *T, options []option[T]) error {
	var errs []error
	for _, o := range options {
		if o.kind.check != nil {
			errs = append(errs, o.kind.check(o.path, t))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return errors.New(oneLine(err))
	}
	return nil
}

// difference returns the first option in which a and b differ, and its value in
// each, in the words of a Caddyfile. Their defaults are filled in.
func difference[T any](a, b *T, options []option[T]) (name, inA, inB string, differ bool) {
	for _, o := range options {
		if o.kind.show == nil {
			continue
		}
		if x, y := o.kind.show(a), o.kind.show(b); x != y {
			return o.name, x, y, true
		}
	}
	return "", "", "", false
}

func (h *Handler) loadBalancing() *LoadBalancing {
	setDefault(&h.LoadBalancing, new(LoadBalancing))
	return h.LoadBalancing
}

func (h *Handler) activeChecks() *ActiveHealthChecks {
	setDefault(&h.HealthChecks, new(HealthChecks))
	setDefault(&h.HealthChecks.Active, new(ActiveHealthChecks))
	return h.HealthChecks.Active
}

func (h *Handler) passiveChecks() *PassiveHealthChecks {
	setDefault(&h.HealthChecks, new(HealthChecks))
	setDefault(&h.HealthChecks.Passive, new(PassiveHealthChecks))
	return h.HealthChecks.Passive
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func intervalText(h *Handler) string {
	if h.activeChecks().Disabled {
		return "off"
	}
	return durationText(h.activeChecks().Interval)
}

// fillFastInterval comes after the interval is filled in.
func fillFastInterval(h *Handler) {
	a := h.activeChecks()
	setDefault(&a.FastInterval, min(caddy.Duration(defaultFastInterval), a.Interval))
}

// checkFastInterval compares the two intervals, where they are used at all.
func checkFastInterval(option string, h *Handler) error {
	a := h.activeChecks()
	interval := a.Interval
	setDefault(&interval, caddy.Duration(defaultInterval))
	if !a.Disabled && a.FastInterval > interval {
		return fmt.Errorf("%s %s: may not exceed the interval, %s", option, time.Duration(a.FastInterval), time.Duration(interval))
	}
	return nil
}
