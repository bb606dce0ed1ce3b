package tcplb

import (
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// approachOptions say how backends are connected to: all of a handler, or one. unset is
// what holds for the latter.
func approachOptions[T any](unset string, at func(*T) *ApproachConfig) []option[T] {
	return append([]option[T]{
		{spec{name: "proxy_protocol", values: "v1|v2|off", path: "proxy_protocol", unset: unset,
			help: "tell backends the client's address in a PROXY header, before any of its bytes; see [Towards the backend](docs/backends.md)"},
			asOptionalText("v1, v2 or off", checkProxyOrOff, func(t *T) *string { return (*string)(&at(t).ProxyProtocol) }).orShown(unset)},
		{spec{name: "local_address", values: "<address>|off", path: "local_address", unset: unset,
			help: "connect to backends from this IP address of the machine, checks included; `off` = as the system routes"},
			asOptionalText("an IP address, or off", checkLocalAddress, func(t *T) *string { return &at(t).LocalAddress }).orShown(unset)},
	}, tlsOptions(unset, func(t *T) **BackendTLS { return &at(t).TLS })...)
}

// resolve fills in placeholders, and gives an address the one form that it has.
func (c *ApproachConfig) resolve(repl *caddy.Replacer) error {
	text, err := repl.ReplaceOrErr(c.LocalAddress, true, true)
	if err != nil {
		return fmt.Errorf("local_address %q: %w", c.LocalAddress, err)
	}
	if a := localAddress(text); a.IsValid() {
		text = a.String()
	}
	c.LocalAddress = text
	return c.TLS.resolve(repl)
}

// unfit finds the option that can't be of a backend at the address, which may hold
// placeholders.
func (c ApproachConfig) unfit(address string) (option string, err error) {
	isUnix := strings.HasPrefix(address, "unix/")
	if isUnix && c.ProxyProtocol != "" && c.ProxyProtocol != proxyOff {
		return "proxy_protocol", fmt.Errorf("proxy_protocol %s: a Unix socket gets no PROXY header", c.ProxyProtocol)
	}
	if c.LocalAddress == "" || c.LocalAddress == localOff || hasPlaceholder(c.LocalAddress) {
		return "", nil
	}
	if isUnix {
		return "local_address", fmt.Errorf("local_address %s: a Unix socket is not connected to from an IP address", c.LocalAddress)
	}
	if t, err := parseTarget(address); err == nil && t.literal.IsValid() && t.literal.Is4() != localAddress(c.LocalAddress).Is4() {
		return "local_address", unlike(localAddress(c.LocalAddress), t.literal)
	}
	return "", nil
}

// misfit finds a backend that the handler's options, or its own, can't be of.
func (h *Handler) misfit() (option string, err error) {
	for _, b := range h.Backends {
		if option, err := b.ApproachConfig.over(h.ApproachConfig).unfit(b.Address); err != nil {
			return option, fmt.Errorf("backend %q: %w: leave that out, or have %s off for it", b.Address, err, option)
		}
	}
	return "", nil
}

// checkMisfit needs all options, and all backends. What a backend's own block says
// was checked there.
func (p *parser) checkMisfit(h *Handler, start *caddyfile.Dispenser) error {
	option, err := h.misfit()
	if err == nil {
		return nil
	}
	if place := p.places[option]; place != nil {
		start = place
	}
	return start.WrapErr(fmt.Errorf("tcp_lb: %w", err))
}
