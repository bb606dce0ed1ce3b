package tcplb

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/literal"
	"github.com/caddyserver/caddy/v2"
)

// target is where a backend is reached.
type target struct {
	unix    string     // path of a Unix socket, or …
	literal netip.Addr // … a literal IP address, valid if it is one, or …
	host    string     // … a name, which is resolved at each connect, by …
	name    *hostName  // … this; nil if it is none
	port    uint16
	text    string     // of all that, in canonical form
	from    netip.Addr // of this machine, to connect from; not valid = any
}

// hasPlaceholder reports whether the address is known only when it is loaded.
func hasPlaceholder(address string) bool { return strings.ContainsAny(address, "{}") }

// checkText refuses what can't be a metric's label, and what nobody can read in
// one: bytes that are not UTF-8 and characters that don't print. JSON turns
// the former into U+FFFD.
func checkText(address string) error {
	if !utf8.ValidString(address) || strings.ContainsFunc(address, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) {
		return errors.New("want printable characters in UTF-8 only")
	}
	return nil
}

// parseTarget parses host:port, [IPv6]:port or unix//path.
func parseTarget(address string) (target, error) {
	if hasPlaceholder(address) {
		return target{}, errors.New("unresolved placeholder")
	}
	if err := checkText(address); err != nil {
		return target{}, err
	}
	network, host, port, err := caddy.SplitNetworkAddress(address)
	switch {
	case address == "":
		return target{}, errors.New("the address is missing, want host:port")
	case strings.HasPrefix(address, "/"):
		return target{}, errors.New("want host:port, or unix//path for a Unix socket")
	case err != nil:
		return target{}, fmt.Errorf("want host:port: %w", err)
	case network == "unix":
		if host == "" {
			return target{}, errors.New("want unix//path, the path is missing")
		}
		if !strings.HasPrefix(host, "/") && !strings.HasPrefix(host, "@") && !filepath.IsAbs(host) {
			return target{}, fmt.Errorf("want unix//path, from the root: did you mean unix//%s?", host)
		}
		host = path.Clean(host)
		return target{unix: host, text: "unix/" + host}, nil
	case network != "" && network != "tcp":
		return target{}, fmt.Errorf("network %q is not supported, want host:port or unix//path", network)
	case port == "":
		return target{}, errors.New("want host:port, the port is missing or an IPv6 address lacks its brackets")
	case strings.Index(port, "-") > 0:
		return target{}, errors.New("a port range is not supported, list each port as a backend")
	case host == "":
		return target{}, errors.New("want host:port, the host is missing")
	case strings.ContainsAny(host, " /"):
		return target{}, fmt.Errorf("invalid host %q", host)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return target{}, fmt.Errorf("port %q is not a number from 1 to 65535", port)
	}
	t := target{host: strings.ToLower(host), port: uint16(n)}
	if ip, err := netip.ParseAddr(host); err == nil {
		t.literal = ip.Unmap()
	} else if strings.Contains(host, ":") {
		return target{}, fmt.Errorf("%q is not an IPv6 address", host)
	} else if err := literal.Check(host); err != nil {
		return target{}, fmt.Errorf("host %q: %w", host, err)
	} else {
		t.name = nameOf(t.host)
	}
	return t.withPort(t.port), nil
}

// String returns the canonical form, which names the backend everywhere.
func (t target) String() string { return t.text }

// withPort returns the target with another port; a Unix socket has none.
func (t target) withPort(port uint16) target {
	if t.unix != "" {
		return t
	}
	t.port = port
	if t.literal.IsValid() {
		t.text = netip.AddrPortFrom(t.literal, port).String()
	} else {
		t.text = net.JoinHostPort(t.host, strconv.Itoa(int(port)))
	}
	return t
}
