package tcplb

import (
	"net"
	"testing"

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
	s := startServer(b, func(*net.TCPConn) {})
	t, err := parseTarget(s.address)
	require.NoError(b, err)
	c := &checker{backend: newBackend(nil, s.address, t)}
	c.settings.Store(&assignment{generation: &generation{dial: dialTarget, checks: checkSettings{timeout: hangTimeout}}})
	b.ReportAllocs()
	for b.Loop() {
		_, err := c.probe(b.Context())
		require.NoError(b, err)
	}
}
