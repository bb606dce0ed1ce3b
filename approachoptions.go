package tcplb

import (
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// approachOptions say how backends are connected to: all of a handler, or one. unset is
// what holds for the latter.
func approachOptions[T any](unset string, at func(*T) *ApproachConfig) []option[T] {
	return []option[T]{
		{spec{name: "proxy_protocol", values: "v1|v2|off", path: "proxy_protocol", unset: unset,
			help: "tell backends the client's address in a PROXY header, before any of its bytes; see [Towards the backend](docs/backends.md)"},
			asOptionalText("v1, v2 or off", checkProxyOrOff, func(t *T) *string { return (*string)(&at(t).ProxyProtocol) }).orShown(unset)},
	}
}

// unfit finds the option that can't be of a backend at the address, which may hold
// placeholders.
func (c ApproachConfig) unfit(address string) (option string, err error) {
	isUnix := strings.HasPrefix(address, "unix/")
	if isUnix && c.ProxyProtocol != "" && c.ProxyProtocol != proxyOff {
		return "proxy_protocol", fmt.Errorf("proxy_protocol %s: a Unix socket gets no PROXY header", c.ProxyProtocol)
	}
	return "", nil
}

// misfit finds a backend that the handler's options, or its own, can't be of.
func (h *Handler) misfit() (option string, err error) {
	for _, b := range h.Backends {
		if option, err := b.ApproachConfig.over(h.ApproachConfig).unfit(b.Address); err != nil {
			return option, fmt.Errorf("backend %q: %w: leave that out, or write %s off in its block", b.Address, err, option)
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
