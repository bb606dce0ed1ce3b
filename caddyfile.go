package tcplb

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
)

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens:
//
//	tcp_lb [<address>...] {
//		name <name>
//		backend <address> [<weight>] [{
//			weight <1-256>
//		}]
//		lb_policy <policy> [...]
//		lb_retries <number>
//		lb_try_duration <duration>
//		lb_try_interval <duration>
//		health_interval <duration>|off
//		health_fast_interval <duration>
//		health_timeout <duration>
//		health_passes <number>
//		health_fails <number>
//		health_port <port>
//		max_connections <number>
//		dial_timeout <duration>
//		idle_timeout <duration>
//		drain_timeout <duration>
//		access_log
//	}
//
// Every error names the option, its value, the file and the line.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // handler name
	p := parser{Dispenser: d, h: h, seen: make(map[string]bool), addresses: make(map[string]bool)}
	start := p.mark()
	for d.NextArg() {
		if err := p.addBackend(BackendConfig{Address: d.Val()}); err != nil {
			return err
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := p.option(); err != nil {
			return err
		}
	}
	if len(h.Backends) == 0 {
		return start.Errf("tcp_lb: no backends: name at least one")
	}
	return p.checkIntervals()
}

// parser reads the options of one handler.
type parser struct {
	*caddyfile.Dispenser
	h            *Handler
	seen         map[string]bool // options
	addresses    map[string]bool // backends
	fastInterval *caddyfile.Dispenser
}

// optionParsers has every option but backend, which alone may come again.
var optionParsers = map[string]func(*parser) error{
	"name":                 (*parser).name,
	"lb_policy":            (*parser).policy,
	"lb_retries":           number(0, maxRetries, func(h *Handler, n int) { h.loadBalancing().Retries = &n }),
	"lb_try_duration":      duration(0, func(h *Handler, d caddy.Duration) { h.loadBalancing().TryDuration = d }),
	"lb_try_interval":      duration(time.Millisecond, func(h *Handler, d caddy.Duration) { h.loadBalancing().TryInterval = d }),
	"health_interval":      (*parser).healthInterval,
	"health_fast_interval": duration(time.Millisecond, func(h *Handler, d caddy.Duration) { h.activeChecks().FastInterval = d }),
	"health_timeout":       duration(time.Millisecond, func(h *Handler, d caddy.Duration) { h.activeChecks().Timeout = d }),
	"health_passes":        number(1, maxCounts, func(h *Handler, n int) { h.activeChecks().Passes = n }),
	"health_fails":         number(1, maxCounts, func(h *Handler, n int) { h.activeChecks().Fails = n }),
	"health_port":          number(1, math.MaxUint16, func(h *Handler, n int) { h.activeChecks().Port = n }),
	"max_connections":      number(0, math.MaxInt32, func(h *Handler, n int) { h.MaxConnections = n }),
	"dial_timeout":         duration(time.Millisecond, func(h *Handler, d caddy.Duration) { h.DialTimeout = d }),
	"idle_timeout":         duration(0, func(h *Handler, d caddy.Duration) { h.IdleTimeout = &d }),
	"drain_timeout":        duration(0, func(h *Handler, d caddy.Duration) { h.DrainTimeout = &d }),
	"access_log":           (*parser).accessLog,
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

// mark keeps the place of the current token, for errors found later.
func (p *parser) mark() *caddyfile.Dispenser {
	d := caddyfile.NewDispenser([]caddyfile.Token{p.Token()})
	d.Next()
	return d
}

// option reads the option that the current token names.
func (p *parser) option() error {
	name := p.Val()
	if name == "backend" {
		return p.backend()
	}
	parse, ok := optionParsers[name]
	if _, err := parseTarget(name); !ok && err == nil {
		line, more := "backend "+name, ""
		if rest := p.RemainingArgs(); len(rest) > 0 {
			if _, err := strconv.Atoi(rest[0]); err == nil {
				line += " " + rest[0]
			} else {
				more = ", one a line"
			}
		}
		return p.Errf("tcp_lb: unknown option %q: write %s%s", name, line, more)
	}
	if !ok {
		return p.Errf("tcp_lb: %s", unknown("option", name, optionNames(), meantOptions))
	}
	if p.seen[name] {
		return p.Errf("tcp_lb: option %s is set twice", name)
	}
	p.seen[name] = true
	if name == "health_fast_interval" {
		p.fastInterval = p.mark()
	}
	if err := parse(p); err != nil {
		return err
	}
	return p.noBlock(name)
}

func (p *parser) noBlock(name string) error {
	if p.NextBlock(p.Nesting()) {
		hint := ""
		if name == "access_log" {
			hint = ": Caddy's global option log says where its lines go"
		}
		return p.Errf("%s: takes no block, found %q%s", name, p.Val(), hint)
	}
	return nil
}

// value reads the option's one argument.
func (p *parser) value(want string) (option, value string, err error) {
	option = p.Val()
	if !p.NextArg() {
		return "", "", p.Errf("%s: the value is missing, want %s", option, want)
	}
	value = p.Val()
	if p.NextArg() {
		return "", "", p.Errf("%s %s: one value is enough, found %q", option, value, p.Val())
	}
	return option, value, nil
}

// located adds file and line to an error.
func (p *parser) located(err error) error {
	if err == nil {
		return nil
	}
	return p.WrapErr(err)
}

func number(low, high int, set func(*Handler, int)) func(*parser) error {
	return func(p *parser) error {
		option, value, err := p.value("a number")
		if err != nil {
			return err
		}
		n, err := p.parseNumber(option, value, low, high)
		if err != nil {
			return err
		}
		set(p.h, n)
		return nil
	}
}

func (p *parser) parseNumber(option, value string, low, high int) (int, error) {
	n, err := strconv.Atoi(value)
	if err != nil {
		return 0, p.Errf("%s %s: want a number from %d to %d%s", option, value, low, high, valueHint(option, value))
	}
	return n, p.located(checkRange(option, n, low, high))
}

func duration(low time.Duration, set func(*Handler, caddy.Duration)) func(*parser) error {
	return func(p *parser) error {
		option, value, err := p.value("a duration such as 10s")
		if err != nil {
			return err
		}
		d, err := p.parseDuration(option, value, low)
		if err != nil {
			return err
		}
		set(p.h, d)
		return nil
	}
}

func (p *parser) parseDuration(option, value string, low time.Duration) (caddy.Duration, error) {
	d, err := caddy.ParseDuration(value)
	if err != nil {
		return 0, p.Errf("%s %s: want a duration such as 10s%s", option, value, durationHint(option, value))
	}
	return caddy.Duration(d), p.located(checkDuration(option, caddy.Duration(d), low))
}

func (p *parser) name() error {
	_, value, err := p.value("a name")
	if err != nil {
		return err
	}
	p.h.Name = value
	return p.located(checkName(value))
}

func (p *parser) healthInterval() error {
	option, value, err := p.value("a duration such as 10s, or off")
	if err != nil {
		return err
	}
	switch value {
	case "off":
		p.h.activeChecks().Disabled = true
		return nil
	case "OFF", "Off":
		return p.Errf("%s %s: did you mean off?", option, value)
	case "0", "0s", "none", "never", "no", "false", "disabled":
		return p.Errf("%s %s: want a duration such as 10s, or off", option, value)
	}
	p.h.activeChecks().Interval, err = p.parseDuration(option, value, time.Millisecond)
	return err
}

func (p *parser) accessLog() error {
	p.h.AccessLog = true
	if p.NextArg() {
		return p.Errf("access_log: takes no value, found %q: it is off unless it is there, and Caddy's global option log says where its lines go", p.Val())
	}
	return nil
}

// policy reads lb_policy: a module with options of its own.
func (p *parser) policy() error {
	if !p.NextArg() {
		return p.Errf("lb_policy: the value is missing, want a policy such as round_robin")
	}
	name := p.Val()
	if err := checkPolicyName(name); err != nil {
		return p.Errf("lb_policy %s: %v", name, err)
	}
	module, err := caddyfile.UnmarshalModule(p.Dispenser, policyNamespace+"."+name)
	if err != nil {
		return fmt.Errorf("lb_policy %s: %w", name, err)
	}
	if _, ok := module.(SelectionPolicy); !ok {
		return p.Errf("lb_policy %s: module %T is not a selection policy", name, module)
	}
	raw, err := layer4.SetModuleNameInline("policy", name, caddyconfig.JSON(module, nil))
	if err != nil {
		return p.Errf("lb_policy %s: %v", name, err)
	}
	p.h.loadBalancing().SelectionPolicyRaw = raw
	return nil
}

// backend reads a line "backend <address> [<weight>]", and its block.
func (p *parser) backend() error {
	if !p.NextArg() {
		return p.Errf("backend: the address is missing, want host:port")
	}
	b, at := BackendConfig{Address: p.Val()}, p.mark()
	if err := p.backendLine(&b); err != nil {
		return err
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		if name := p.Val(); name != "weight" {
			return p.Errf("backend %s: %s", b.Address, unknown("option", name, []string{"weight"}, meantOfBackend))
		}
		_, value, err := p.value("a number")
		if err != nil {
			return err
		}
		if err := p.weight(&b, value); err != nil {
			return err
		}
		if err := p.noBlock("weight"); err != nil {
			return err
		}
	}
	located := *p
	located.Dispenser = at
	return located.addBackend(b)
}

// backendLine reads what follows the address: a weight at most.
func (p *parser) backendLine(b *BackendConfig) error {
	if !p.NextArg() {
		return nil
	}
	found, next := p.Val(), ""
	line := p.mark()
	more := p.NextArg()
	if more {
		next = strings.TrimRight(p.Val(), ";")
	}
	if bare := strings.TrimRight(found, ";"); bare != found {
		weight := strings.TrimPrefix(bare, "weight=")
		if _, err := strconv.Atoi(weight); err == nil {
			return line.Errf("backend %s: write backend %s %s: %s", b.Address, b.Address, weight, noSemicolons)
		}
		found = bare
	}
	if strings.ContainsAny(b.Address, ",;") { // the word after it is no weight
		return line.Errf("backend %q: %v", b.Address, misspelled(b.Address, nil))
	}
	if _, err := strconv.Atoi(found); err != nil {
		if err := backendLineError(b.Address, found, next); err != nil {
			return line.Errf("backend %s: %v", b.Address, err)
		}
	}
	if err := p.weight(b, found); err != nil {
		return err
	}
	if !more {
		return nil
	}
	if err := backendLineError(b.Address, next, ""); err != nil {
		return p.Errf("backend %s: %v", b.Address, err)
	}
	return p.Errf("backend %s: want an address and a weight, found %q as well", b.Address, next)
}

func (p *parser) weight(b *BackendConfig, value string) error {
	if b.Weight != nil {
		return p.Errf("backend %s: weight is set twice", b.Address)
	}
	n, err := p.parseNumber("weight", value, 1, maxWeight)
	if err != nil {
		return fmt.Errorf("backend %s: %w", b.Address, err)
	}
	b.Weight = &n
	return nil
}

// addBackend checks the address, which may hold placeholders that are known only
// when the config is loaded, and adds the backend.
func (p *parser) addBackend(b BackendConfig) error {
	t, err := target{text: b.Address}, checkText(b.Address)
	if !hasPlaceholder(b.Address) {
		t, err = parseBackend(b.Address)
	}
	if err != nil {
		return p.located(fmt.Errorf("backend %q: %w", b.Address, err))
	}
	canonical := t.String()
	if p.addresses[canonical] {
		return p.Errf("backend %q is listed twice", b.Address)
	}
	p.addresses[canonical] = true
	p.h.Backends = append(p.h.Backends, b)
	return nil
}

// checkIntervals needs both intervals, in whichever order they came.
func (p *parser) checkIntervals() error {
	if p.fastInterval == nil {
		return nil
	}
	if err := checkFastInterval("health_fast_interval", *p.h.HealthChecks.Active); err != nil {
		return p.fastInterval.WrapErr(err)
	}
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
