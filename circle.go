package tcplb

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// checkCircle refuses a backend that is a listener of the pool itself: each
// connection, and each probe, would cause the next one until none is left.
func checkCircle(servers []*layer4Server, h *Handler) error {
	for _, b := range h.Backends {
		t, err := parseTarget(b.Address)
		if err != nil {
			return err
		}
		if err := refuseCircle(servers, h.Name, t); err != nil {
			return fmt.Errorf("backend %q: %w: name the server behind it", b.Address, err)
		}
	}
	return nil
}

// refuseCircle is checkCircle for one backend of the pool.
func refuseCircle(servers []*layer4Server, pool string, t target) error {
	for _, s := range servers {
		if !slices.Contains(s.pools, pool) {
			continue
		}
		for _, a := range s.addresses {
			if a.takes(t) {
				return fmt.Errorf("it is the pool's own listener, %s, and each connection would cause the next one", a.text)
			}
		}
	}
	return nil
}

// takes reports whether the listener is known to get what is sent to the target.
// Of a listener on all of a host's addresses that is what goes to the host itself.
func (a listenAddress) takes(t target) bool {
	if t.unix != "" {
		path, _, _ := strings.Cut(a.Host, "|") // the rest is its permissions
		return a.Network == "unix" && path == t.unix
	}
	switch a.Network {
	case "tcp", "tcp4", "tcp6", networkName:
	default:
		return false
	}
	if uint(t.port) < a.StartPort || uint(t.port) > a.EndPort {
		return false
	}
	for _, to := range t.here() {
		if a.Network == "tcp4" && !to.Is4() || a.Network == "tcp6" && to.Is4() {
			continue
		}
		host, err := netip.ParseAddr(a.Host)
		switch {
		case a.Host == "", err == nil && host.IsUnspecified():
			if to.IsLoopback() {
				return true
			}
		case err == nil && host.Unmap() == to, strings.EqualFold(a.Host, "localhost") && to == loopbacks[0]:
			return true
		}
	}
	return false
}

var loopbacks = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}

// here returns the addresses that are known without a lookup. A connect to the
// unspecified address is one to this host.
func (t target) here() []netip.Addr {
	switch {
	case strings.TrimSuffix(t.host, ".") == "localhost":
		return loopbacks
	case !t.literal.IsValid():
		return nil
	case t.literal == netip.IPv4Unspecified():
		return loopbacks[:1]
	case t.literal == netip.IPv6Unspecified():
		return loopbacks[1:]
	}
	return []netip.Addr{t.literal}
}
