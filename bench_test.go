package tcplb

import (
	"io"
	"net"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// BenchmarkDial connects to a literal address and closes.
func BenchmarkDial(b *testing.B) {
	s := startServer(b, func(*net.TCPConn) {})
	t, err := parseTarget(s.address)
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		c, err := dialTarget(b.Context(), t, hangTimeout)
		require.NoError(b, err)
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
}

// BenchmarkProbe is one health check, with what the backend does for it. At one
// each 10 s, 10,000 backends make a thousand a second.
func BenchmarkProbe(b *testing.B) {
	http := &checks.HTTP{URI: "/healthz"}
	require.NoError(b, http.Provision(caddy.Context{}))
	answers := startServer(b, func(c *net.TCPConn) {
		if readRequest(c) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		}
	})
	for name, p := range map[string]struct {
		s     *server
		check checks.Check
	}{
		"connect": {startServer(b, func(*net.TCPConn) {}), nil},
		"http":    {answers, http},
	} {
		b.Run(name, func(b *testing.B) {
			t, err := parseTarget(p.s.address)
			require.NoError(b, err)
			c := &checker{backend: newBackend(nil, p.s.address, t)}
			c.settings.Store(&assignment{generation: &generation{
				dial: dialTarget, checks: checkSettings{timeout: hangTimeout}, inquiry: inquiry{check: p.check},
			}})
			b.ReportAllocs()
			for b.Loop() {
				_, err := c.probe(b.Context())
				require.NoError(b, err)
			}
		})
	}
}
