package tcplb

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCompactAddr(t *testing.T) {
	for _, ip := range []net.IP{
		net.ParseIP("192.0.2.1"),       // of 16 bytes
		net.ParseIP("192.0.2.1").To4(), // of 4
		net.ParseIP("2001:db8::1"),
	} {
		long := &net.TCPAddr{IP: ip, Port: 4000}
		short := compact(long)
		require.IsType(t, compactAddr{}, short)
		require.Equal(t, long.String(), short.String())
		require.Equal(t, long.Network(), short.Network())
		require.Equal(t, addrPortOf(long).Addr().Unmap(), addrPortOf(short).Addr())
		require.Equal(t, addrPortOf(long).Port(), addrPortOf(short).Port())
	}
	link := &net.TCPAddr{IP: net.ParseIP("fe80::1"), Port: 4000, Zone: "eth0"}
	require.Equal(t, link.String(), compact(link).String())
	unix := &net.UnixAddr{Name: "@", Net: "unix"}
	require.Same(t, unix, compact(unix))
	require.Nil(t, compact(nil))
	for _, odd := range []*net.TCPAddr{nil, {}, {IP: net.IP{1, 2, 3}}} {
		require.Equal(t, odd.String(), compact(odd).String())
	}
}
