package discovery

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddy.RegisterModule(new(A))
	caddy.RegisterModule(new(SRV))
}

// A finds the addresses of a name in DNS, A and AAAA records: each is a backend.
//
// A lookup that fails, or finds nothing, changes nothing.
type A struct {
	// Name is the name. Without the system's search domains if it ends in a dot.
	// Placeholders are resolved once, when the config is loaded.
	Name string `json:"name"`
	// Port is that of all the backends, 1–65535; a text may have placeholders.
	Port Port `json:"port"`
	DNS

	lookups *lookups
}

// SRV finds the servers of a service in DNS, SRV records: each address of each
// target is a backend, with the record's port and weight. Those of the lowest
// priority serve, all others are backups.
//
// A lookup that fails, or finds nothing, changes nothing. Weights above 256 are
// scaled down in proportion; beside others, a weight of 0 is the least there is.
type SRV struct {
	// Name is the name, such as _postgres._tcp.db.internal. Without the system's
	// search domains if it ends in a dot. Placeholders are resolved once, when the
	// config is loaded.
	Name string `json:"name"`
	DNS

	lookups *lookups
}

// DNS says how DNS is asked.
type DNS struct {
	// Refresh is the time from lookup to lookup, or the least TTL of the last
	// answer if that is less, but 1s at least. Default and 0: 30s.
	Refresh caddy.Duration `json:"refresh,omitempty"`
	// Resolvers are the name servers, host or host:port, asked in turn until one
	// answers. Placeholders are resolved once, when the config is loaded. Default:
	// the system's, with its search domains and its hosts file.
	Resolvers []string `json:"resolvers,omitempty"`
	// Versions are the versions of IP to look for: ipv4, ipv6. Default: both.
	Versions []string `json:"versions,omitempty"`
}

// Namespace is that of the sources' modules.
const Namespace = "layer4.tcp_lb.sources"

// Port is a port, in JSON a number or a text.
type Port string

// UnmarshalJSON takes both.
func (p *Port) UnmarshalJSON(b []byte) error {
	if text := (*string)(p); len(b) > 0 && b[0] == '"' {
		return json.Unmarshal(b, text)
	}
	var number json.Number
	if err := json.Unmarshal(b, &number); err != nil {
		return fmt.Errorf("port %s: want a number from 1 to 65535", b)
	}
	*p = Port(number)
	return nil
}

// MarshalJSON writes a number where it can.
func (p Port) MarshalJSON() ([]byte, error) {
	if n, err := strconv.ParseUint(string(p), 10, 16); err == nil {
		return json.Marshal(n)
	}
	return json.Marshal(string(p))
}

// CaddyModule returns the Caddy module information.
func (*A) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: Namespace + ".a", New: func() caddy.Module { return new(A) }}
}

// CaddyModule returns the Caddy module information.
func (*SRV) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: Namespace + ".srv", New: func() caddy.Module { return new(SRV) }}
}

// Provision fills in the defaults, resolves placeholders and checks everything. It
// asks nobody.
func (a *A) Provision(caddy.Context) error {
	if err := a.fill(); err != nil {
		return fmt.Errorf("source a: %w", err)
	}
	source := fmt.Sprintf("a %s %s", a.Name, a.Port)
	port, err := parsePort(string(a.Port))
	if err != nil {
		return fmt.Errorf("source a: %w", err)
	}
	a.lookups, err = a.share(source, &addressFinder{name: a.Name, port: port, wanted: a.families()})
	return err
}

// Provision fills in the defaults, resolves placeholders and checks everything. It
// asks nobody.
func (s *SRV) Provision(caddy.Context) error {
	if err := s.fill(); err != nil {
		return fmt.Errorf("source srv: %w", err)
	}
	var err error
	s.lookups, err = s.share("srv "+s.Name, &serviceFinder{name: s.Name, wanted: s.families()})
	return err
}

// Cleanup gives up the share in the lookups.
func (a *A) Cleanup() error { return a.lookups.giveUp() }

// Cleanup gives up the share in the lookups.
func (s *SRV) Cleanup() error { return s.lookups.giveUp() }

// Run is for Source.
func (a *A) Run(ctx context.Context, update func([]Found)) { a.lookups.run(ctx, update) }

// Run is for Source.
func (s *SRV) Run(ctx context.Context, update func([]Found)) { s.lookups.run(ctx, update) }

// Status is for Reporter.
func (a *A) Status() Status { return a.lookups.report() }

// Status is for Reporter.
func (s *SRV) Status() Status { return s.lookups.report() }

// Interface guards
var (
	_ caddy.Provisioner  = (*A)(nil)
	_ caddy.CleanerUpper = (*A)(nil)
	_ Source             = (*A)(nil)
	_ Reporter           = (*A)(nil)
	_ caddy.Provisioner  = (*SRV)(nil)
	_ caddy.CleanerUpper = (*SRV)(nil)
	_ Source             = (*SRV)(nil)
	_ Reporter           = (*SRV)(nil)
)
