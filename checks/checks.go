// Package checks finds out whether a backend is well, by asking it.
//
// A check is a guest module in the namespace layer4.tcp_lb.checks, whose inline
// key is "check". Here are connect, http and dialogue. One of somebody else's is
// a Check that Caddy can make:
//
//	func init() { caddy.RegisterModule(new(Memcached)) }
//
//	// Memcached wants a server that has room for so many connections more.
//	type Memcached struct {
//		Spare int `json:"spare,omitempty"`
//	}
//
//	func (*Memcached) CaddyModule() caddy.ModuleInfo {
//		return caddy.ModuleInfo{ID: "layer4.tcp_lb.checks.memcached", New: func() caddy.Module { return new(Memcached) }}
//	}
//
//	func (m *Memcached) Check(ctx context.Context, t checks.Target) error {
//		conn, err := t.Dial(ctx)
//		if err != nil {
//			return err
//		}
//		if _, err := io.WriteString(conn, "stats\r\n"); err != nil {
//			return err
//		}
//		lines := bufio.NewScanner(conn)
//		for lines.Scan() && lines.Text() != "END" {
//			var spare int
//			if n, _ := fmt.Sscanf(lines.Text(), "STAT spare_conns %d", &spare); n == 1 && spare < m.Spare {
//				return fmt.Errorf("room for %d connections more, want %d", spare, m.Spare)
//			}
//		}
//		return lines.Err()
//	}
//
// With UnmarshalCaddyfile it can be written after health_check, and what follows
// its name is its own to read.
package checks

import (
	"context"
	"net"
)

// Namespace is that of the checks' modules.
const Namespace = "layer4.tcp_lb.checks"

// Check asks a backend whether it is well. One serves all backends of a pool,
// many at once.
type Check interface {
	// Check returns nil if the backend is well, or else what is wrong with it, in
	// words that its operator reads: "HTTP 503, want 2xx".
	//
	// It returns soon after ctx ends, which has the time for the whole of it, and
	// leaves no goroutine behind. It may be called again where it had to be broken
	// off, and be under way when its config ends.
	Check(ctx context.Context, t Target) error
}

// Target is a backend that is to be checked. It may get more fields.
type Target struct {
	// Address is where the check connects: host:port, or unix//path.
	Address string
	// Host is the host in that, a name or an IP address; empty for a Unix socket.
	Host string
	// Dial connects to it, as the balancer does: within its budget of files, with
	// the PROXY header and the TLS that the config wants of checks.
	//
	// A check has one connection at a time: the next Dial closes the one before,
	// and the last is closed when Check returns. Reads and writes end with the ctx
	// of Check.
	Dial func(ctx context.Context) (net.Conn, error)
}
