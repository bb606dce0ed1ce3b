package tcplb_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
)

// Memcached wants a server that answers.
type Memcached struct {
	// Version is what its version begins with. Default: any.
	Version string `json:"version,omitempty"`
}

func init() { caddy.RegisterModule(new(Memcached)) }

func (*Memcached) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "layer4.tcp_lb.checks.memcached", New: func() caddy.Module { return new(Memcached) }}
}

// Check implements checks.Check.
func (m *Memcached) Check(ctx context.Context, t checks.Target) error {
	conn, err := t.Dial(ctx)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "version\r\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(io.LimitReader(conn, 256)).ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(line, "VERSION "+m.Version) {
		return fmt.Errorf("answered %q, want version %s", line, m.Version)
	}
	return nil
}

// UnmarshalCaddyfile reads "health_check memcached [<version>]".
func (m *Memcached) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		m.Version = d.Val()
	}
	return nil
}

// Interface guards
var (
	_ checks.Check          = (*Memcached)(nil)
	_ caddyfile.Unmarshaler = (*Memcached)(nil)
)
