package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
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

// fill puts the defaults where nothing is set and resolves placeholders. It refuses what
// can be seen only before that.
func (h *Handler) fill() error {
	_, tooSlow := h.tlsTooSlow(func(option string) string { return named(handlerOptions, option).path })
	fillIn(h, handlerOptions)
	repl := caddy.NewReplacer()
	name, err := repl.ReplaceOrErr(h.Name, true, true)
	if err != nil {
		return fmt.Errorf("tcp_lb %q: name: %w", h.Name, err)
	}
	h.Name = name
	if tooSlow != nil {
		return fmt.Errorf("tcp_lb %q: %w", h.Name, tooSlow)
	}
	if err := errors.Join(h.resolve(repl), h.resolveHealthTLS(repl)); err != nil {
		return fmt.Errorf("tcp_lb %q: %w", h.Name, err)
	}
	for i := range h.Backends {
		b := &h.Backends[i]
		address, err := repl.ReplaceOrErr(b.Address, true, true)
		if err != nil {
			return fmt.Errorf("tcp_lb %q: backend %q: %w", h.Name, b.Address, err)
		}
		b.Address = address
		if err := b.resolve(repl); err != nil {
			return fmt.Errorf("tcp_lb %q: backend %q: %w", h.Name, b.Address, err)
		}
		fillIn(b, backendOptions)
	}
	return nil
}

// check refuses what is wrong in a config whose defaults are filled in.
func (h *Handler) check() error {
	if err := checkAll(h, handlerOptions); err != nil {
		return err
	}
	if _, err := h.misfit(); err != nil {
		return err
	}
	byPath := func(option string) string { return named(handlerOptions, option).path }
	if _, err := h.tlsConflict(byPath); err != nil {
		return err
	}
	_, err := h.conflict(byPath)
	return err
}

func checkName(option, name string) error {
	if name == "" || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return fmt.Errorf("%s %q: want a text of printable characters", option, name)
	}
	return nil
}

// checkBackends refuses an empty list, unless there is a source of backends, a bad
// entry and one listed twice.
func checkBackends(_ string, h *Handler) error {
	if len(h.Backends) == 0 && len(h.DynamicBackendsRaw) == 0 {
		return errors.New("no backends: want at least one")
	}
	seen := make(map[string]bool, len(h.Backends))
	for i := range h.Backends {
		b := &h.Backends[i]
		t, err := parseBackend(b.Address)
		if err != nil {
			return fmt.Errorf("backend %q: %w", b.Address, err)
		}
		if seen[t.String()] {
			return fmt.Errorf("backend %q is listed twice", b.Address)
		}
		seen[t.String()] = true
		if err := checkAll(b, backendOptions); err != nil {
			return fmt.Errorf("backend %q: %w", b.Address, err)
		}
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
	sources, err := h.loadSources(ctx)
	if err != nil {
		return nil, fmt.Errorf("tcp_lb %q: %w", h.Name, err)
	}
	a := h.HealthChecks.Active
	asks, err := a.asks()
	if err != nil {
		return nil, err
	}
	inquiry, err := h.newInquiry(ctx)
	if err != nil {
		return nil, fmt.Errorf("tcp_lb %q: %w", h.Name, err)
	}
	g := &generation{
		inquiry:     inquiry,
		sources:     sources,
		name:        h.Name,
		fingerprint: fingerprint,
		policy:      selection,
		policyName:  name,
		retries:     *h.LoadBalancing.Retries,
		tryDuration: time.Duration(h.LoadBalancing.TryDuration),
		tryInterval: time.Duration(h.LoadBalancing.TryInterval),
		slowStart:   time.Duration(h.LoadBalancing.SlowStart),
		checks: checkSettings{
			enabled:      !a.Disabled,
			interval:     time.Duration(a.Interval),
			fastInterval: time.Duration(a.FastInterval),
			timeout:      time.Duration(a.Timeout),
			passes:       a.Passes,
			fails:        a.Fails,
			port:         uint16(a.Port),
			asks:         asks,
			text:         a.text(),

			initiallyDown: a.InitiallyUnhealthy,
		},
		passive: passiveSettings{
			failDuration: time.Duration(h.passiveChecks().FailDuration),
			maxFails:     max(1, h.passiveChecks().MaxFails),
		},
		closeAfter:   (*time.Duration)(h.CloseIfUnhealthy),
		dialTimeout:  time.Duration(h.DialTimeout),
		idleTimeout:  time.Duration(*h.IdleTimeout),
		lifetime:     h.lifetime(),
		drainTimeout: time.Duration(*h.DrainTimeout),
		voice: voice{accessLog: h.AccessLog, limit: int64(h.MaxConnections), clientLimit: int64(h.MaxConnectionsPerClient),
			logConnects: h.AccessLogConnects, logInterval: time.Duration(h.AccessLogInterval)},
		ctx:     ctx,
		dial:    dialTarget,
		started: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	g.setLogger(ctx.Logger())
	return g, h.enlist(g)
}

// enlist makes the backends that the config names members of g.
func (h *Handler) enlist(g *generation) error {
	loaded, err := make(securities), error(nil)
	g.begins = h.ApproachConfig
	if g.approach, err = newApproach(g.ctx, h.ApproachConfig, loaded); err != nil {
		return fmt.Errorf("tcp_lb %q: %w", h.Name, err)
	}
	for _, b := range h.Backends {
		t, err := parseTarget(b.Address)
		if err != nil {
			return err
		}
		m := member{target: t, weight: *b.Weight, backup: b.Backup, maxConnections: b.MaxConnections, healthPort: uint16(b.HealthPort), approach: g.approach}
		if b.ApproachConfig != (ApproachConfig{}) {
			if m.approach, err = newApproach(g.ctx, b.ApproachConfig.over(h.ApproachConfig), loaded); err != nil {
				return fmt.Errorf("tcp_lb %q: backend %q: %w", h.Name, b.Address, err)
			}
		}
		g.config = append(g.config, m)
	}
	for _, s := range loaded {
		s.ofChecks = g.inquiry.over(s.config)
	}
	return nil
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
