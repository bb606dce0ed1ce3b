package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
)

// Defaults of the options.
const (
	defaultName         = "tcp_lb"
	defaultWeight       = 1
	defaultRetries      = 3
	defaultTryInterval  = 250 * time.Millisecond
	defaultInterval     = 10 * time.Second
	defaultFastInterval = time.Second
	defaultCheckTimeout = 2 * time.Second
	defaultPasses       = 2
	defaultFails        = 2
	defaultDialTimeout  = 3 * time.Second
	defaultIdleTimeout  = time.Hour
	defaultDrainTimeout = 30 * time.Second

	defaultHandshakeTimeout = 10 * time.Second

	maxWeight  = 256
	maxRetries = 100
	maxCounts  = 1000

	minDuration = time.Millisecond // but for 0
	maxDuration = 365 * 24 * time.Hour
)

var defaultPolicy = json.RawMessage(`{"policy":"round_robin"}`)

// fill puts the defaults where nothing is set and resolves placeholders.
func (h *Handler) fill() error {
	setDefault(&h.Name, defaultName)
	repl := caddy.NewReplacer()
	name, err := repl.ReplaceOrErr(h.Name, true, true)
	if err != nil {
		return fmt.Errorf("tcp_lb %q: name: %w", h.Name, err)
	}
	h.Name = name
	for i := range h.Backends {
		b := &h.Backends[i]
		address, err := repl.ReplaceOrErr(b.Address, true, true)
		if err != nil {
			return fmt.Errorf("tcp_lb %q: backend %q: %w", h.Name, b.Address, err)
		}
		b.Address = address
		setDefault(&b.Weight, new(defaultWeight))
	}
	setDefault(&h.LoadBalancing, new(LoadBalancing))
	lb := h.LoadBalancing
	if len(lb.SelectionPolicyRaw) == 0 {
		lb.SelectionPolicyRaw = defaultPolicy
	}
	setDefault(&lb.Retries, new(defaultRetries))
	setDefault(&lb.TryInterval, caddy.Duration(defaultTryInterval))

	setDefault(&h.HealthChecks, new(HealthChecks))
	setDefault(&h.HealthChecks.Active, new(ActiveHealthChecks))
	a := h.HealthChecks.Active
	setDefault(&a.Interval, caddy.Duration(defaultInterval))
	setDefault(&a.FastInterval, min(caddy.Duration(defaultFastInterval), a.Interval))
	setDefault(&a.Timeout, caddy.Duration(defaultCheckTimeout))
	setDefault(&a.Passes, defaultPasses)
	setDefault(&a.Fails, defaultFails)

	setDefault(&h.DialTimeout, caddy.Duration(defaultDialTimeout))
	setDefault(&h.IdleTimeout, new(caddy.Duration(defaultIdleTimeout)))
	setDefault(&h.DrainTimeout, new(caddy.Duration(defaultDrainTimeout)))
	return nil
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// check refuses what is wrong in a config whose defaults are filled in, naming
// options as the JSON does. The Caddyfile parser makes the same checks earlier,
// where it knows the line.
func (h *Handler) check() error {
	lb, a := h.LoadBalancing, h.HealthChecks.Active
	err := errors.Join(
		checkName(h.Name),
		checkBackends(h.Backends),
		checkRange("load_balancing.retries", *lb.Retries, 0, maxRetries),
		checkJSONDuration("load_balancing.try_duration", lb.TryDuration, 0),
		checkJSONDuration("load_balancing.try_interval", lb.TryInterval, time.Millisecond),
		checkJSONDuration("health_checks.active.interval", a.Interval, time.Millisecond),
		checkJSONDuration("health_checks.active.fast_interval", a.FastInterval, time.Millisecond),
		checkFastInterval("health_checks.active.fast_interval", *a),
		checkJSONDuration("health_checks.active.timeout", a.Timeout, time.Millisecond),
		checkRange("health_checks.active.passes", a.Passes, 1, maxCounts),
		checkRange("health_checks.active.fails", a.Fails, 1, maxCounts),
		checkRange("health_checks.active.port", a.Port, 0, math.MaxUint16),
		checkRange("max_connections", h.MaxConnections, 0, math.MaxInt32),
		checkJSONDuration("dial_timeout", h.DialTimeout, time.Millisecond),
		checkJSONDuration("idle_timeout", *h.IdleTimeout, 0),
		checkJSONDuration("drain_timeout", *h.DrainTimeout, 0),
	)
	if err == nil {
		return nil
	}
	return errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
}

func checkName(name string) error {
	if name == "" || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return fmt.Errorf("name %q: want a text of printable characters", name)
	}
	return nil
}

// checkBackends refuses an empty list, a bad entry and one listed twice.
func checkBackends(backends []BackendConfig) error {
	if len(backends) == 0 {
		return errors.New("no backends: want at least one")
	}
	seen := make(map[string]bool, len(backends))
	for _, b := range backends {
		t, err := parseBackend(b.Address)
		if err != nil {
			return fmt.Errorf("backend %q: %w", b.Address, err)
		}
		if seen[t.String()] {
			return fmt.Errorf("backend %q is listed twice", b.Address)
		}
		seen[t.String()] = true
		if b.Weight != nil {
			if err := checkRange("weight", *b.Weight, 1, maxWeight); err != nil {
				return fmt.Errorf("backend %q: %w", b.Address, err)
			}
		}
	}
	return nil
}

func checkRange(option string, n, low, high int) error {
	if n < low || n > high {
		return fmt.Errorf("%s %d: want a number from %d to %d", option, n, low, high)
	}
	return nil
}

func checkDuration(option string, d caddy.Duration, low time.Duration) error {
	switch {
	case d < 0:
		return fmt.Errorf("%s %s: want a duration that is not negative", option, time.Duration(d))
	case time.Duration(d) < low:
		return fmt.Errorf("%s %s: want a duration of at least %s", option, time.Duration(d), low)
	case d > 0 && time.Duration(d) < minDuration:
		return fmt.Errorf("%s %s: want 0 or a duration of at least %s", option, time.Duration(d), minDuration)
	case time.Duration(d) > maxDuration:
		return fmt.Errorf("%s %s: want a duration of at most %s", option, time.Duration(d), maxDuration)
	}
	return nil
}

// checkJSONDuration is checkDuration for JSON, where a number has no unit: 10 is
// taken for seconds by those who write it.
func checkJSONDuration(option string, d caddy.Duration, low time.Duration) error {
	err := checkDuration(option, d, low)
	if d > 0 && time.Duration(d) < minDuration {
		return fmt.Errorf(`%w: write "%ds" (a number without a unit counts nanoseconds)`, err, int64(d))
	}
	return err
}

// checkFastInterval compares the two intervals, where they are used at all.
func checkFastInterval(option string, a ActiveHealthChecks) error {
	setDefault(&a.Interval, caddy.Duration(defaultInterval))
	if !a.Disabled && a.FastInterval > a.Interval {
		return fmt.Errorf("%s %s: may not exceed the interval, %s", option, time.Duration(a.FastInterval), time.Duration(a.Interval))
	}
	return nil
}

// newGeneration turns a checked handler into what serves its connections.
func (h *Handler) newGeneration(ctx caddy.Context) (*generation, error) {
	fingerprint, err := h.fingerprint()
	if err != nil {
		return nil, err
	}
	name := h.policyName()
	if name == "" {
		return nil, fmt.Errorf("tcp_lb %q: selection policy %s: want an object such as %s", h.Name, short(h.LoadBalancing.SelectionPolicyRaw), defaultPolicy)
	}
	if err := checkPolicyName(name); err != nil {
		return nil, fmt.Errorf("tcp_lb %q: selection policy: %w", h.Name, err)
	}
	policy, err := ctx.LoadModule(h.LoadBalancing, "SelectionPolicyRaw")
	if err != nil {
		return nil, fmt.Errorf("tcp_lb %q: loading the selection policy: %w", h.Name, err)
	}
	selection, ok := policy.(SelectionPolicy)
	if !ok {
		return nil, fmt.Errorf("tcp_lb %q: module %T is not a selection policy", h.Name, policy)
	}
	a := h.HealthChecks.Active
	g := &generation{
		name:        h.Name,
		fingerprint: fingerprint,
		policy:      selection,
		policyName:  name,
		retries:     *h.LoadBalancing.Retries,
		tryDuration: time.Duration(h.LoadBalancing.TryDuration),
		tryInterval: time.Duration(h.LoadBalancing.TryInterval),
		checks: checkSettings{
			enabled:      !a.Disabled,
			interval:     time.Duration(a.Interval),
			fastInterval: time.Duration(a.FastInterval),
			timeout:      time.Duration(a.Timeout),
			passes:       a.Passes,
			fails:        a.Fails,
			port:         uint16(a.Port),
		},
		dialTimeout:  time.Duration(h.DialTimeout),
		idleTimeout:  time.Duration(*h.IdleTimeout),
		drainTimeout: time.Duration(*h.DrainTimeout),
		voice:        voice{accessLog: h.AccessLog, limit: int64(h.MaxConnections)},
		ctx:          ctx,
		dial:         dialTarget,
		started:      make(chan struct{}),
		stopped:      make(chan struct{}),
	}
	g.setLogger(ctx.Logger())
	for _, b := range h.Backends {
		t, err := parseTarget(b.Address)
		if err != nil {
			return nil, err
		}
		g.config = append(g.config, member{target: t, weight: *b.Weight})
	}
	return g, nil
}

// policyName returns the name in the policy's JSON; empty if there is none.
func (h *Handler) policyName() string {
	var policy struct {
		Name string `json:"policy"`
	}
	if json.Unmarshal(h.LoadBalancing.SelectionPolicyRaw, &policy) != nil {
		return ""
	}
	return policy.Name
}

// fingerprint is equal for two handlers of the same settings only, however
// their addresses are spelled.
func (h *Handler) fingerprint() (string, error) {
	canonical := *h
	canonical.Backends = slices.Clone(h.Backends)
	for i, b := range canonical.Backends {
		t, err := parseTarget(b.Address)
		if err != nil {
			return "", err
		}
		canonical.Backends[i].Address = t.String()
	}
	b, err := json.Marshal(canonical)
	return string(b), err
}
