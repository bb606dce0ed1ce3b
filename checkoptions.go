package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
)

// checkOptions say what a check asks of a backend, and what follows from that.
func checkOptions() []option[Handler] {
	return []option[Handler]{
		{spec{name: "health_uri", values: "<path>", path: "health_checks.active.uri", unset: "no HTTP check",
			help: "ask for this by HTTP, or HTTPS with `tls` or `health_tls`; see [Checks](docs/checks.md) for this and what follows"},
			asOptionalText("a path such as /healthz", checks.CheckURI, func(h *Handler) *string { return &h.activeChecks().URI })},
		{spec{name: "health_method", values: "<method>", path: "health_checks.active.method", unset: "`GET`",
			help: "of the HTTP check"},
			asOptionalText("a method such as HEAD", checks.CheckMethod, func(h *Handler) *string { return &h.activeChecks().Method }).orShown(`"GET"`)},
		{spec{name: "health_status", values: "<status>", path: "health_checks.active.expect_status", unset: "2xx",
			help: "the status to answer, such as 204, or 2xx for all that begin with a 2; in JSON 204, or 2"},
			asStatus(func(h *Handler) *int { return &h.activeChecks().ExpectStatus })},
		{spec{name: "health_headers", values: "{ <name> <value>... }", path: "health_checks.active.headers", unset: "none",
			help: "of the HTTP check's request, `Host` among them; global placeholders are resolved at load"},
			kind[Handler]{read: (*parser).healthHeaders, check: checkHealthHeaders, show: headersText}},
		{spec{name: "health_body", values: "<regexp>", path: "health_checks.active.expect_body", unset: "any body",
			help: "matches somewhere in the first 64 KB of the body"},
			asOptionalText("a regular expression", checks.CheckPattern, func(h *Handler) *string { return &h.activeChecks().ExpectBody })},
		{spec{name: "health_follow_redirects", path: "health_checks.active.follow_redirects",
			help: "ask again where an answer leads, of the same backend; without it a redirect is a status like others"},
			asFlag(func(h *Handler) *bool { return &h.activeChecks().FollowRedirects })},
		{spec{name: "health_send", values: "<text>", path: dialoguePath, unset: "no dialogue", repeats: true,
			help: `send this, in the order written; escapes are ` + "`\\r \\n \\t \\\\ \\\" \\xNN`"},
			kind[Handler]{read: (*parser).healthSend, check: checkDialogue, show: dialogueText}},
		{spec{name: "health_expect", values: "<text>|~<regexp>", path: dialoguePath, unset: "no dialogue", repeats: true,
			help: "the answer contains this, before the next is sent; escapes as above"},
			kind[Handler]{read: (*parser).healthExpect}},
		{spec{name: "health_check", values: "<check> [...]", path: "health_checks.active.check", unset: "a TCP connect, or what is above",
			help: "a check of one's own, a module"},
			kind[Handler]{read: (*parser).healthCheck, show: func(h *Handler) string { return orNotSet(short(h.activeChecks().CheckRaw)) }}},
		{spec{name: "health_tls", values: "[<server name>]|off", path: "health_checks.active.tls.server_name", unset: "as `tls` says, on the backend's own port",
			help: "checks of any kind speak TLS and verify that name, by default the backend's host; in JSON an empty `tls` is enough, and `off` is `tls.off`"},
			kind[Handler]{read: (*parser).healthTLS, check: checkHealthTLS, show: tlsText}},
		{spec{name: "health_tls_insecure_skip_verify", path: "health_checks.active.tls.insecure_skip_verify",
			help: "checks speak TLS and take any certificate"},
			kind[Handler]{read: (*parser).healthTLSInsecure, show: func(h *Handler) string { return onOrOff(h.checkTLS().InsecureSkipVerify) }}},
		{spec{name: "health_tls_trust_pool", values: "<module> [...]", path: "health_checks.active.tls.ca", unset: "as `tls` says, else the system's CAs",
			help: "checks speak TLS and trust these CAs, such as `file <path>`: a module of `tls.ca_pool.source`"},
			kind[Handler]{read: (*parser).healthTrustPool, show: func(h *Handler) string { return orNotSet(short(h.checkTLS().CARaw)) }}},
		{spec{name: "health_proxy_protocol", values: "v1|v2|off", path: "health_checks.active.proxy_protocol", unset: "as `proxy_protocol`, to the backend's own port",
			help: "checks begin with a PROXY header that says they are the balancer's own (`LOCAL`, in v1 `UNKNOWN`)"},
			asOptionalText("v1, v2 or off", checkProxyOrOff, func(h *Handler) *string { return (*string)(&h.activeChecks().ProxyProtocol) })},

		{spec{name: "health_initially_unhealthy", path: "health_checks.active.initially_unhealthy",
			help: "a backend that is new is down until its first check has passed; a reload leaves those that there are"},
			asFlag(func(h *Handler) *bool { return &h.activeChecks().InitiallyUnhealthy })},
		{spec{name: "close_if_unhealthy", values: "[<duration>]", path: "close_if_unhealthy", unset: "off, connections go on",
			help: "cut the connections of a backend that checks have found down, so long after; without a value, or with 0, at once"},
			kind[Handler]{read: (*parser).closeIfUnhealthy, check: checkCloseIfUnhealthy, show: closeIfUnhealthyText}},
		{spec{name: "fail_duration", values: "<duration>", path: "health_checks.passive.fail_duration", zero: "never",
			help: "a backend with `max_fails` failed connections of clients within this time is taken out for as long, unless it is the last"},
			asDuration(0, 0, plain(func(h *Handler) *caddy.Duration { return &h.passiveChecks().FailDuration }))},
		{spec{name: "max_fails", values: "<number>", path: "health_checks.passive.max_fails", unset: "1",
			help: "connects that fail, and connections that the backend resets, or closes within a second, before it has sent a byte"},
			asNumber(1, maxCounts, 0, plain(func(h *Handler) *int { return &h.passiveChecks().MaxFails })).orShown("1")},
	}
}

const dialoguePath = "health_checks.active.dialogue"

// asOptionalText is a text that may be left out.
func asOptionalText[T any](want string, check func(text string) error, at func(*T) *string) kind[T] {
	return kind[T]{
		read: func(p *parser, s spec, t *T) error {
			text, err := p.value(s.name, want)
			if err != nil {
				return err
			}
			if text == "" {
				return p.Errf("%s \"\": want %s", s.name, want)
			}
			*at(t) = text
			if err := check(text); err != nil {
				return p.Errf("%s %v", s.name, err)
			}
			return nil
		},
		check: func(path string, t *T) error {
			if *at(t) == "" {
				return nil
			}
			if err := check(*at(t)); err != nil {
				return fmt.Errorf("%s %w", path, err)
			}
			return nil
		},
		show: func(t *T) string {
			if *at(t) == "" {
				return notSet
			}
			return strconv.Quote(*at(t))
		},
	}
}

// asStatus is a status such as 204 or 2xx.
func asStatus(at func(*Handler) *int) kind[Handler] {
	return kind[Handler]{
		read: func(p *parser, s spec, h *Handler) error {
			text, err := p.value(s.name, "a status such as 204, or 2xx")
			if err != nil {
				return err
			}
			digits := text
			if len(text) == 3 && strings.HasSuffix(strings.ToLower(text), "xx") {
				digits = text[:1]
			}
			n, err := strconv.Atoi(digits)
			if err != nil || checks.CheckStatus(n) != nil {
				return p.Errf("%s %s: want a status such as 204, or 2xx", s.name, text)
			}
			*at(h) = n
			return nil
		},
		check: func(path string, h *Handler) error {
			if *at(h) == 0 {
				return nil
			}
			if err := checks.CheckStatus(*at(h)); err != nil {
				return fmt.Errorf("%s %w", path, err)
			}
			return nil
		},
		show: func(h *Handler) string {
			n := *at(h)
			switch {
			case n == 0:
				return "2xx"
			case n < 100:
				return fmt.Sprintf("%dxx", n)
			}
			return strconv.Itoa(n)
		},
	}
}

func orNotSet(text string) string {
	if text == "" {
		return notSet
	}
	return text
}

func onOrOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

func headersText(h *Handler) string {
	if len(h.activeChecks().Headers) == 0 {
		return notSet
	}
	raw, _ := json.Marshal(h.activeChecks().Headers)
	return short(raw)
}

func dialogueText(h *Handler) string {
	if len(h.activeChecks().Dialogue) == 0 {
		return notSet
	}
	raw, _ := json.Marshal(h.activeChecks().Dialogue)
	return short(raw)
}

func checkHealthHeaders(path string, h *Handler) error {
	if err := checks.CheckHeaders(h.activeChecks().Headers); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func checkDialogue(path string, h *Handler) error {
	if h.activeChecks().Dialogue == nil {
		return nil
	}
	if err := checks.CheckSteps(h.activeChecks().Dialogue); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// checkProxyOrOff refuses what is no version of the PROXY protocol.
func checkProxyOrOff(version string) error {
	if version != string(proxyOff) && !checks.ProxyVersion(version).Valid() {
		return fmt.Errorf("%s: want v1, v2 or off", version)
	}
	return nil
}

func (p *parser) closeIfUnhealthy(s spec, h *Handler) error {
	h.CloseIfUnhealthy = new(caddy.Duration)
	if !p.NextArg() {
		return nil
	}
	text := p.Val()
	d, err := caddy.ParseDuration(text)
	if err != nil {
		return p.Errf("%s %s: want a duration such as 10s, or nothing for at once%s", s.name, text, durationHint(s, text))
	}
	if err := checkDuration(s.name, caddy.Duration(d), 0); err != nil {
		return p.located(err)
	}
	*h.CloseIfUnhealthy = caddy.Duration(d)
	if p.NextArg() {
		return p.Errf("%s %s: one value is enough, found %q", s.name, text, p.Val())
	}
	return nil
}

func checkCloseIfUnhealthy(path string, h *Handler) error {
	if h.CloseIfUnhealthy == nil {
		return nil
	}
	return checkJSONDuration(path, *h.CloseIfUnhealthy, 0)
}

func closeIfUnhealthyText(h *Handler) string {
	if h.CloseIfUnhealthy == nil {
		return "off"
	}
	return durationText(*h.CloseIfUnhealthy)
}

// healthHeaders reads a block of headers, one a line.
func (p *parser) healthHeaders(s spec, h *Handler) error {
	if p.NextArg() {
		return p.Errf("%s: want the headers in a block, one a line, found %q", s.name, p.Val())
	}
	headers := make(http.Header)
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		name := strings.TrimSuffix(p.Val(), ":")
		values := p.RemainingArgs()
		if len(values) == 0 {
			return p.Errf("%s: %s: the value is missing", s.name, name)
		}
		headers[name] = append(headers[name], values...)
		if err := checks.CheckHeaders(headers); err != nil {
			return p.Errf("%s: %v", s.name, err)
		}
		if p.NextBlock(p.Nesting()) {
			return p.Errf("%s: %s: takes no block, found %q", s.name, name, p.Val())
		}
	}
	if len(headers) == 0 {
		return p.Errf("%s: the value is missing, want a block of headers", s.name)
	}
	h.activeChecks().Headers = headers
	return nil
}

func (p *parser) healthSend(s spec, h *Handler) error {
	text, err := p.value(s.name, `a text such as "PING\r\n"`)
	if err != nil {
		return err
	}
	return p.step(s, h, checks.Step{Send: text})
}

// healthExpect reads a text, or a pattern in one of the forms that ~"a b" can have
// once Caddy has split the line.
func (p *parser) healthExpect(s spec, h *Handler) error {
	args := p.RemainingArgs()
	if len(args) == 2 && args[0] == "~" && args[1] != "" {
		return p.step(s, h, checks.Step{Expect: "~" + args[1]})
	}
	if len(args) == 0 {
		return p.Errf(`%s: the value is missing, want a text such as "+PONG", or ~"regexp"`, s.name)
	}
	for _, quote := range []string{`"`, "`"} {
		inner, opens := strings.CutPrefix(args[0], "~"+quote)
		if !opens {
			continue
		}
		if len(args) == 1 && strings.HasSuffix(inner, quote) {
			return p.step(s, h, checks.Step{Expect: "~" + strings.TrimSuffix(inner, quote)})
		}
		return p.Errf("%s %s: a pattern with spaces has its ~ inside the quotes, or apart from them: ~ %sa b%s", s.name, args[0], quote, quote)
	}
	if len(args) > 1 {
		return p.Errf("%s %s: one value is enough, found %q", s.name, args[0], args[1])
	}
	return p.step(s, h, checks.Step{Expect: args[0]})
}

func (p *parser) step(s spec, h *Handler, step checks.Step) error {
	if err := checks.CheckSteps([]checks.Step{step}); err != nil {
		return p.Errf("%s: %v", s.name, errors.Unwrap(err))
	}
	h.activeChecks().Dialogue = append(h.activeChecks().Dialogue, step)
	return nil
}

// meantChecks has what is meant by the names of others for checks.
var meantChecks = map[string]string{
	"http": "write health_uri <path>", "https": "write health_uri <path> and health_tls", "dialogue": "write health_send <text> and health_expect <text>",
	"tls": "write health_tls", "ssl": "write health_tls", "connect": "leave it out, a TCP connect is what there is without", "tcp": "leave it out, a TCP connect is what there is without",
}

// healthCheck reads a check: a module with options of its own.
func (p *parser) healthCheck(s spec, h *Handler) error {
	if !p.NextArg() {
		return p.Errf("%s: the value is missing, want the name of a module", s.name)
	}
	name := p.Val()
	if hint := meantChecks[name]; hint != "" {
		return p.Errf("%s %s: %s", s.name, name, hint)
	}
	if err := checkModuleName("check", checks.Namespace, name, meantChecks); err != nil {
		return p.Errf("%s %s: %v", s.name, name, err)
	}
	module, err := caddyfile.UnmarshalModule(p.Dispenser, checks.Namespace+"."+name)
	if err != nil {
		return fmt.Errorf("%s %s: %w", s.name, name, err)
	}
	if _, ok := module.(checks.Check); !ok {
		return p.Errf("%s %s: module %T is not a check", s.name, name, module)
	}
	raw, err := layer4.SetModuleNameInline("check", name, caddyconfig.JSON(module, nil))
	if err != nil {
		return p.Errf("%s %s: %v", s.name, name, err)
	}
	h.activeChecks().CheckRaw = raw
	return nil
}
