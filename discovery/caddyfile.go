package discovery

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets up the source from Caddyfile tokens:
//
//	a <name> <port> {
//		refresh <duration>
//		resolvers <address>...
//		versions ipv4|ipv6...
//	}
func (a *A) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	p := newParser(d)
	args := d.RemainingArgs()
	if len(args) > 0 {
		a.Name = args[0]
	}
	if len(args) > 1 {
		a.Port = Port(args[1])
	}
	if !placeholder(a.Name) {
		if err := checkHost(a.Name, string(a.Port)); err != nil {
			return p.Errf("dynamic a: %v", err)
		}
	}
	if !placeholder(string(a.Port)) {
		if _, err := parsePort(string(a.Port)); err != nil {
			return p.Errf("dynamic a %s: %v", a.Name, err)
		}
	}
	if len(args) > 2 {
		return p.Errf("dynamic a %s: want a name and a port, found %q as well", a.Name, args[2])
	}
	return p.options("dynamic a "+a.Name, &a.DNS)
}

// UnmarshalCaddyfile sets up the source from Caddyfile tokens:
//
//	srv <name> {
//		refresh <duration>
//		resolvers <address>...
//		versions ipv4|ipv6...
//	}
func (s *SRV) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	p := newParser(d)
	args := d.RemainingArgs()
	if len(args) > 0 {
		s.Name = args[0]
	}
	if !placeholder(s.Name) {
		if err := checkService(s.Name); err != nil {
			return p.Errf("dynamic srv: %v", err)
		}
	}
	if len(args) > 1 {
		if isPort(args[1]) {
			return p.Errf("dynamic srv %s: want a name alone, found %q as well: ports are in the SRV records", s.Name, args[1])
		}
		return p.Errf("dynamic srv %s: want a name alone, found %q as well", s.Name, args[1])
	}
	return p.options("dynamic srv "+s.Name, &s.DNS)
}

// parser reads the options of one source.
type parser struct {
	*caddyfile.Dispenser
}

func newParser(d *caddyfile.Dispenser) parser {
	d.Next() // the source's name
	return parser{d}
}

func placeholder(text string) bool { return strings.Contains(text, "{") }

// readers read the values of the options, one at least, into what they are of.
var readers = map[string]func(dns *DNS, values []string) error{
	"refresh":   readRefresh,
	"resolvers": readResolvers,
	"versions":  readVersions,
}

// options reads the block of a source.
func (p parser) options(source string, dns *DNS) error {
	seen := make(map[string]bool)
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		option := p.Val()
		read := readers[option]
		switch {
		case read == nil:
			return p.Errf("%s: unknown option %q%s (there are refresh, resolvers, versions)", source, option, optionHint(option))
		case seen[option]:
			return p.Errf("%s: option %s is set twice", source, option)
		}
		seen[option] = true
		values := p.RemainingArgs()
		if len(values) == 0 {
			return p.Errf("%s: %s: the value is missing", source, option)
		}
		if err := read(dns, values); err != nil {
			return p.Errf("%s: %v", source, err)
		}
		if p.NextBlock(p.Nesting()) {
			return p.Errf("%s: %s: takes no block, found %q", source, option, p.Val())
		}
	}
	return nil
}

// optionHint says what may be meant by a name that is no option.
func optionHint(name string) string {
	name = strings.ToLower(strings.TrimSuffix(name, ":"))
	meant := map[string]string{
		"interval": "refresh", "ttl": "refresh", "every": "refresh", "hold": "refresh", "valid": "refresh",
		"nameserver": "resolvers", "nameservers": "resolvers", "dns": "resolvers", "server": "resolvers", "servers": "resolvers",
		"ipv4": "versions ipv4", "ipv6": "versions ipv6", "family": "versions", "ip_version": "versions", "network": "versions",
	}[name]
	for option := range readers {
		if meant == "" && len(name) >= 3 && strings.HasPrefix(option, name[:3]) {
			meant = option
		}
	}
	if meant == "" {
		return ""
	}
	return fmt.Sprintf(": did you mean %s?", meant)
}

func readRefresh(dns *DNS, values []string) error {
	if len(values) > 1 {
		return fmt.Errorf("refresh %s: one value is enough, found %q", values[0], values[1])
	}
	d, err := caddy.ParseDuration(values[0])
	if err != nil {
		if _, bare := strconv.ParseFloat(values[0], 64); bare == nil {
			return fmt.Errorf("refresh %s: want a duration such as 30s: did you mean %ss?", values[0], values[0])
		}
		return fmt.Errorf("refresh %s: want a duration such as 30s", values[0])
	}
	dns.Refresh = caddy.Duration(d)
	return checkRefresh(dns.Refresh)
}

func readResolvers(dns *DNS, values []string) error {
	dns.Resolvers = values
	if slices.ContainsFunc(values, placeholder) {
		return nil // for when the config is loaded
	}
	return checkResolvers(values)
}

func readVersions(dns *DNS, values []string) error {
	dns.Versions = values
	return checkVersions(values)
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*A)(nil)
	_ caddyfile.Unmarshaler = (*SRV)(nil)
)
