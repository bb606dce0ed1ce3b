package discovery

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/literal"
	"github.com/caddyserver/caddy/v2"
)

const (
	defaultRefresh = 30 * time.Second
	minRefresh     = time.Second
	maxRefresh     = 365 * 24 * time.Hour
)

var allVersions = []string{"ipv4", "ipv6"}

// fill is for what both sources have.
func (a *A) fill() error {
	if err := resolve("name", &a.Name); err != nil {
		return err
	}
	if err := resolve("port", (*string)(&a.Port)); err != nil {
		return err
	}
	a.Name = strings.ToLower(a.Name)
	return errors.Join(checkHost(a.Name, string(a.Port)), a.DNS.fill())
}

func (s *SRV) fill() error {
	if err := resolve("name", &s.Name); err != nil {
		return err
	}
	s.Name = strings.ToLower(s.Name)
	return errors.Join(checkService(s.Name), s.DNS.fill())
}

func (d *DNS) fill() error {
	if d.Refresh == 0 {
		d.Refresh = caddy.Duration(defaultRefresh)
	}
	if err := checkRefresh(d.Refresh); err != nil {
		if d.Refresh > 0 && d.Refresh < caddy.Duration(time.Millisecond) {
			return fmt.Errorf(`%w: write "%ds" (a number without a unit counts nanoseconds)`, err, int64(d.Refresh))
		}
		return err
	}
	d.Resolvers = slices.Clone(d.Resolvers)
	for i := range d.Resolvers {
		if err := resolve("resolvers", &d.Resolvers[i]); err != nil {
			return err
		}
	}
	if len(d.Versions) == 0 {
		d.Versions = slices.Clone(allVersions)
	}
	return errors.Join(checkResolvers(d.Resolvers), checkVersions(d.Versions))
}

// resolve fills in placeholders.
func resolve(option string, value *string) error {
	resolved, err := caddy.NewReplacer().ReplaceOrErr(*value, true, true)
	if err != nil {
		return fmt.Errorf("%s %q: %w", option, *value, err)
	}
	*value = resolved
	return nil
}

func (d DNS) families() families {
	return families{v4: slices.Contains(d.Versions, "ipv4"), v6: slices.Contains(d.Versions, "ipv6")}
}

// share returns the lookups of these settings.
func (d DNS) share(source string, f finder) (*lookups, error) {
	slices.Sort(d.Versions)
	settings, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	return share(source+" "+string(settings), func() *lookups {
		return newLookups(source, time.Duration(d.Refresh), d.Resolvers, f)
	})
}

// checkHost checks a name that has addresses.
func checkHost(name, port string) error {
	host, itsPort, hasPort := strings.Cut(name, ":")
	switch _, err := netip.ParseAddr(name); {
	case err == nil:
		return fmt.Errorf("name %s: want a name in DNS: for an address write backend %s", name, net.JoinHostPort(name, cmp.Or(port, "<port>")))
	case hasPort && checkName(host) == nil && isPort(itsPort):
		return fmt.Errorf("name %s: want the port by itself: write dynamic a %s %s", name, host, itsPort)
	case strings.HasPrefix(name, "_") && checkName(name) == nil && port == "":
		return fmt.Errorf("name %s: did you mean dynamic srv %s?", name, name)
	}
	return checkName(name)
}

// checkService checks a name that has SRV records.
func checkService(name string) error {
	if _, err := netip.ParseAddr(name); err == nil {
		return fmt.Errorf("name %s: want a name in DNS, such as _postgres._tcp.db.internal", name)
	}
	return checkName(name)
}

// checkName refuses what DNS can't be asked for, and Go's resolver would not.
func checkName(name string) error {
	labels := strings.Split(strings.TrimSuffix(name, "."), ".")
	switch {
	case name == "":
		return errors.New("the name is missing, want one in DNS such as db.internal")
	case len(name) > 254 || len(name) == 254 && !strings.HasSuffix(name, "."):
		return fmt.Errorf("name %.40q...: want at most 253 characters, it has %d", name, len(name))
	}
	if err := literal.Check(name); err != nil {
		return fmt.Errorf("name %q: %w", name, err)
	}
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.HasPrefix(label, "-") || strings.ContainsFunc(label, notInNames) {
			return fmt.Errorf("name %q: want a name in DNS such as db.internal: letters, digits, - and _ between dots, up to 63 (IDNs as xn--...)", name)
		}
	}
	return nil
}

func notInNames(c rune) bool {
	return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
}

func isPort(text string) bool { _, err := parsePort(text); return err == nil }

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	switch {
	case text == "":
		return 0, errors.New("the port is missing, want a number from 1 to 65535")
	case err != nil || n == 0:
		return 0, fmt.Errorf("port %s: want a number from 1 to 65535", text)
	}
	return uint16(n), nil
}

func checkRefresh(d caddy.Duration) error {
	switch {
	case time.Duration(d) < minRefresh:
		return fmt.Errorf("refresh %s: want a duration of at least %s", time.Duration(d), minRefresh)
	case time.Duration(d) > maxRefresh:
		return fmt.Errorf("refresh %s: want a duration of at most %s", time.Duration(d), maxRefresh)
	}
	return nil
}

func checkResolvers(resolvers []string) error {
	seen := make(map[string]bool, len(resolvers))
	for _, r := range resolvers {
		if err := checkResolver(r); err != nil {
			return err
		}
		if seen[serverAddress(r)] {
			return fmt.Errorf("resolvers %s: it is listed twice", r)
		}
		seen[serverAddress(r)] = true
	}
	return nil
}

// checkResolver takes an IP address or a name, with or without a port.
func checkResolver(resolver string) error {
	if scheme, rest, ok := strings.Cut(resolver, "/"); ok {
		switch rest = strings.Trim(rest, "/"); scheme {
		case "udp", "tcp":
			return fmt.Errorf("resolvers %s: write %s: UDP comes first, and TCP where an answer is too long for it", resolver, rest)
		case "tls:", "https:", "quic:":
			return fmt.Errorf("resolvers %s: want an address such as 10.0.0.53: DNS is asked without TLS", resolver)
		default:
			return fmt.Errorf("resolvers %s: want an address such as 10.0.0.53: did you mean %s?", resolver, rest)
		}
	}
	host, port := splitResolver(resolver)
	_, err := netip.ParseAddr(host)
	if err != nil && checkName(host) != nil {
		return fmt.Errorf("resolvers %q: want an address such as 10.0.0.53, or host:port", resolver)
	}
	if !isPort(port) {
		return fmt.Errorf("resolvers %s: port %q is not a number from 1 to 65535", resolver, port)
	}
	return nil
}

// splitResolver takes a resolver apart, whose port is 53 if it has none.
func splitResolver(resolver string) (host, port string) {
	bare := strings.TrimSuffix(strings.TrimPrefix(resolver, "["), "]")
	if _, err := netip.ParseAddr(bare); err == nil {
		return bare, "53"
	}
	if host, port, err := net.SplitHostPort(resolver); err == nil {
		return host, port
	}
	return resolver, "53"
}

// serverAddress is host:port.
func serverAddress(resolver string) string { return net.JoinHostPort(splitResolver(resolver)) }

func checkVersions(versions []string) error {
	for i, v := range versions {
		if !slices.Contains(allVersions, v) {
			return fmt.Errorf("versions %s: want ipv4, ipv6 or both%s", v, versionHint(v))
		}
		if slices.Contains(versions[:i], v) {
			return fmt.Errorf("versions %s: it is listed twice", v)
		}
	}
	return nil
}

func versionHint(version string) string {
	switch strings.ToLower(version) {
	case "4", "v4", "ip4", "inet", "a", "ipv4":
		return ": did you mean ipv4?"
	case "6", "v6", "ip6", "inet6", "aaaa", "ipv6":
		return ": did you mean ipv6?"
	case "both", "all", "any":
		return `: both are the default`
	}
	return ""
}
