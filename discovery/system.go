package discovery

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// servers say whom to ask, and how.
type servers struct {
	nameServers []string // host:port, to be asked in turn
	timeout     time.Duration
	attempts    int
	names       func(name string) []string // what a name may stand for, fully qualified
	hosts       bool                       // names of the hosts file go first
	library     *net.Resolver              // asked in place of all that; nil = not
}

// With resolvers of the config's own these are not to be had from a file.
const (
	defaultTimeout  = 2 * time.Second
	defaultAttempts = 2
)

// systemConfig is where the system says whom to ask; tests have their own.
var systemConfig = "/etc/resolv.conf"

// ownServers are those of the option resolvers.
func ownServers(resolvers []string) servers {
	s := servers{timeout: defaultTimeout, attempts: defaultAttempts, names: func(name string) []string { return []string{dns.Fqdn(name)} }}
	for _, r := range resolvers {
		s.nameServers = append(s.nameServers, serverAddress(r))
	}
	return s
}

// systemServers reads the system's configuration, which may change at any time.
// Without one it is as for Go's resolver and the C library's.
func systemServers() servers {
	if withoutConfig {
		return servers{library: net.DefaultResolver, names: func(name string) []string { return []string{name} }}
	}
	config, err := dns.ClientConfigFromFile(systemConfig)
	if err != nil {
		config = &dns.ClientConfig{Port: "53", Ndots: 1, Timeout: 5, Attempts: 2}
	}
	if len(config.Servers) == 0 {
		config.Servers = []string{"127.0.0.1", "::1"}
	}
	if len(config.Search) == 0 {
		if host, err := os.Hostname(); err == nil {
			if _, domain, ok := strings.Cut(host, "."); ok && domain != "" {
				config.Search = []string{domain}
			}
		}
	}
	s := servers{
		timeout:  min(time.Duration(config.Timeout)*time.Second, lookupTimeout),
		attempts: min(config.Attempts, 10),
		names:    func(name string) []string { return searched(config, name) },
		hosts:    true,
	}
	for _, server := range config.Servers {
		s.nameServers = append(s.nameServers, net.JoinHostPort(server, config.Port))
	}
	return s
}

// searched returns what a name may stand for with the search domains.
func searched(config *dns.ClientConfig, name string) (names []string) {
	for _, n := range config.NameList(name) {
		if checkName(n) == nil { // else the domain is none, or too long with it
			names = append(names, n)
		}
	}
	return names
}

var errNoDNS = errors.New("DNS is not asked here")

// hostsFile is Go's resolver without DNS: it finds what the hosts file has.
var hostsFile = net.Resolver{
	PreferGo: true,
	Dial:     func(context.Context, string, string) (net.Conn, error) { return nil, errNoDNS },
}

func lookupHostsFile(ctx context.Context, name string) []netip.Addr {
	addrs, err := hostsFile.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return nil
	}
	return addrs
}

// withoutConfig is where the system does not say whom to ask: its own library does
// it all, and tells of no TTL.
const withoutConfig = runtime.GOOS == "windows"
