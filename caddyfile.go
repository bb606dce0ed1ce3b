package tcplb

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/literal"
)

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens:
//
//	tcp_lb [<address>...] {
//		name <name>
//		backend <address> [<weight>] [{
//			weight <0-256>
//			backup
//			max_connections <number>
//			health_port <port>
//			proxy_protocol v1|v2|off
//			local_address <address>|off
//			tls [off]
//			tls_server_name <name>
//			tls_trust_pool <module> [...]
//			tls_client_auth <name>|<cert_file> <key_file>
//			tls_insecure_skip_verify
//			tls_timeout <duration>
//			tls_alpn <protocol>...
//			tls_curves <curve>...
//			tls_renegotiation never|once|freely
//		}]
//		dynamic <source> [...]
//		lb_policy <policy> [...]
//		lb_retries <number>
//		lb_try_duration <duration>
//		lb_try_interval <duration>
//		lb_slow_start <duration>
//		health_interval <duration>|off
//		health_fast_interval <duration>
//		health_timeout <duration>
//		health_passes <number>
//		health_fails <number>
//		health_port <port>
//		health_uri <path>
//		health_method <method>
//		health_status <status>
//		health_headers { <name> <value>... }
//		health_body <regexp>
//		health_follow_redirects
//		health_send <text>
//		health_expect <text>|~<regexp>
//		health_check <check> [...]
//		health_tls [<server name>]|off
//		health_tls_insecure_skip_verify
//		health_tls_trust_pool <module> [...]
//		health_proxy_protocol v1|v2|off
//		health_initially_unhealthy
//		close_if_unhealthy [<duration>]
//		fail_duration <duration>
//		max_fails <number>
//		proxy_protocol v1|v2|off
//		local_address <address>|off
//		tls
//		tls_server_name <name>
//		tls_trust_pool <module> [...]
//		tls_client_auth <name>|<cert_file> <key_file>
//		tls_insecure_skip_verify
//		tls_timeout <duration>
//		tls_alpn <protocol>...
//		tls_curves <curve>...
//		tls_renegotiation never|once|freely
//		max_connections <number>
//		max_connections_per_client <number>
//		dial_timeout <duration>
//		idle_timeout <duration>
//		max_lifetime <duration> [<percent>%]
//		drain_timeout <duration>
//		access_log [{
//			connects
//			interval <duration>
//		}]
//	}
//
// Every error names the option, its value, the file and the line.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // handler name
	p := newParser(d)
	start := p.mark()
	for d.NextArg() {
		if err := p.addBackend(h, BackendConfig{Address: d.Val()}); err != nil {
			return err
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := p.option(h); err != nil {
			return err
		}
	}
	if len(h.Backends) == 0 && len(h.DynamicBackendsRaw) == 0 {
		return start.Errf("tcp_lb: no backends: name at least one")
	}
	if err := errors.Join(p.checkIntervals(h), p.checkTLS(h, start)); err != nil {
		return err
	}
	if err := p.checkMisfit(h, start); err != nil {
		return err
	}
	return p.checkConflict(h, start)
}

// parser reads the options of one handler, of a backend, or of the app.
type parser struct {
	*caddyfile.Dispenser
	places    map[string]*caddyfile.Dispenser // of the options that came, by name
	addresses map[string]bool                 // of the backends
	halfTLS   []halfTLS                       // of backends whose own tls is missing
}

func newParser(d *caddyfile.Dispenser) *parser {
	return &parser{Dispenser: d, places: make(map[string]*caddyfile.Dispenser), addresses: make(map[string]bool)}
}

// mark keeps the place of the current token, for errors found later.
func (p *parser) mark() *caddyfile.Dispenser {
	d := caddyfile.NewDispenser([]caddyfile.Token{p.Token()})
	d.Next()
	return d
}

// option reads the option that the current token names.
func (p *parser) option(h *Handler) error {
	name := p.Val()
	o := named(handlerOptions, name)
	if o == nil {
		return p.unknownOption(name)
	}
	if !p.once(o.spec) {
		return p.Errf("tcp_lb: option %s is set twice", name)
	}
	return readOption(p, o, h)
}

func (p *parser) unknownOption(name string) error {
	if _, err := parseTarget(name); err != nil {
		return p.Errf("tcp_lb: %s", unknown("option", name, namesOf(handlerOptions), meantOptions))
	}
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

// once notes the place of an option. It reports false if that is there already
// and may not come again.
func (p *parser) once(s spec) bool {
	if p.places[s.name] != nil && !s.repeats {
		return false
	}
	p.places[s.name] = p.mark()
	return true
}

// readOption reads the option that the current token names into t.
func readOption[T any](p *parser, o *option[T], t *T) error {
	if err := o.kind.readInto(p, o.spec, t); err != nil {
		return err
	}
	if !p.NextBlock(p.Nesting()) {
		return nil
	}
	more := ""
	if o.aside != "" {
		more = ": " + o.aside
	}
	return p.Errf("%s: takes no block, found %q%s", o.name, p.Val(), more)
}

// value reads an option's one argument.
func (p *parser) value(option, want string) (string, error) {
	if !p.NextArg() {
		return "", p.Errf("%s: the value is missing, want %s", option, want)
	}
	value := p.Val()
	if p.NextArg() {
		return "", p.Errf("%s %s: one value is enough, found %q", option, value, p.Val())
	}
	return value, nil
}

// located adds file and line to an error.
func (p *parser) located(err error) error {
	if err == nil {
		return nil
	}
	return p.WrapErr(err)
}

// healthInterval reads a duration, or off.
func (p *parser) healthInterval(s spec, h *Handler) error {
	value, err := p.value(s.name, "a duration such as 10s, or off")
	if err != nil {
		return err
	}
	switch value {
	case "off":
		h.activeChecks().Disabled = true
		return nil
	case "OFF", "Off":
		return p.Errf("%s %s: did you mean off?", s.name, value)
	case "0", "0s", "none", "never", "no", "false", "disabled":
		return p.Errf("%s %s: want a duration such as 10s, or off", s.name, value)
	}
	return named(handlerOptions, s.name).kind.parse(p, s, value, h)
}

// policy reads lb_policy: a module with options of its own.
func (p *parser) policy(_ spec, h *Handler) error {
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
	h.loadBalancing().SelectionPolicyRaw = raw
	return nil
}

// dynamic reads a source of backends: a module with options of its own.
func (p *parser) dynamic(_ spec, h *Handler) error {
	if !p.NextArg() {
		return p.Errf("dynamic: the value is missing, want a source such as a")
	}
	name := p.Val()
	if err := checkSourceName(name); err != nil {
		return p.Errf("dynamic %s: %v", name, err)
	}
	module, err := caddyfile.UnmarshalModule(p.Dispenser, discovery.Namespace+"."+name)
	if err != nil {
		return err // it says what it is of
	}
	if _, ok := module.(discovery.Source); !ok {
		return p.Errf("dynamic %s: module %T is not a source of backends", name, module)
	}
	raw, err := layer4.SetModuleNameInline("source", name, caddyconfig.JSON(module, nil))
	if err != nil {
		return p.Errf("dynamic %s: %v", name, err)
	}
	for _, other := range h.DynamicBackendsRaw {
		if bytes.Equal(other, raw) {
			return p.Errf("dynamic %s: the source is listed twice", name)
		}
	}
	h.DynamicBackendsRaw = append(h.DynamicBackendsRaw, raw)
	return nil
}

// backend reads a line "backend <address> [<weight>]", and its block.
func (p *parser) backend(_ spec, h *Handler) error {
	if !p.NextArg() {
		return p.Errf("backend: the address is missing, want host:port")
	}
	b, at := BackendConfig{Address: p.Val()}, p.mark()
	own := newParser(p.Dispenser)
	if err := own.backendLine(&b); err != nil {
		return err
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		if err := own.backendOption(&b); err != nil {
			return err
		}
	}
	if option, err := b.unfit(b.Address); err != nil {
		return own.places[option].WrapErr(fmt.Errorf("backend %s: %w", b.Address, err))
	}
	if b.TLS.isUnsure() {
		return own.places["tls_insecure_skip_verify"].Errf("backend %s: tls_insecure_skip_verify: nothing is verified with it, so that tls_trust_pool would do nothing: leave one of them out", b.Address)
	}
	p.noteHalfTLS(b.Address, own)
	located := *p
	located.Dispenser = at
	return located.addBackend(h, b)
}

// backendOption reads the option of b that the current token names.
func (p *parser) backendOption(b *BackendConfig) error {
	name := p.Val()
	o := named(backendOptions, name)
	if o == nil {
		return p.Errf("backend %s: %s", b.Address, unknown("option", name, namesOf(backendOptions), meantInBackend(name)))
	}
	if !p.once(o.spec) {
		return p.Errf("backend %s: %s is set twice", b.Address, name)
	}
	if err := readOption(p, o, b); err != nil {
		return fmt.Errorf("backend %s: %w", b.Address, err)
	}
	return nil
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
	if host, _, err := net.SplitHostPort(b.Address); err == nil {
		if err := literal.Check(host); err != nil { // it is no name of a backend's own
			return line.Errf("backend %q: host %q: %v", b.Address, host, err)
		}
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

// weight reads a weight that stands on the backend's line.
func (p *parser) weight(b *BackendConfig, value string) error {
	o := named(backendOptions, "weight")
	p.once(o.spec)
	if err := o.kind.parse(p, o.spec, value, b); err != nil {
		return fmt.Errorf("backend %s: %w", b.Address, err)
	}
	return nil
}

// addBackend checks the address, which may hold placeholders that are known only
// when the config is loaded, and adds the backend.
func (p *parser) addBackend(h *Handler, b BackendConfig) error {
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
	h.Backends = append(h.Backends, b)
	return nil
}

// checkIntervals needs both intervals, in whichever order they came.
func (p *parser) checkIntervals(h *Handler) error {
	place := p.places["health_fast_interval"]
	if place == nil {
		return nil
	}
	if err := checkFastInterval("health_fast_interval", h); err != nil {
		return place.WrapErr(err)
	}
	return nil
}

// checkConflict needs all options of checks.
func (p *parser) checkConflict(h *Handler, start *caddyfile.Dispenser) error {
	if h.HealthChecks == nil {
		return nil
	}
	option, err := h.conflict(func(name string) string { return name })
	if err == nil {
		return nil
	}
	if place := p.places[option]; place != nil {
		start = place
	}
	return start.WrapErr(fmt.Errorf("tcp_lb: %w", err))
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
