package tcplb

import (
	"context"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// listenAs opens the address as a config does, which ends with the returned
// function.
func listenAs(t testing.TB, address string) (net.Listener, context.CancelFunc) {
	t.Helper()
	na, err := caddy.ParseNetworkAddress(address)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := na.Listen(ctx, 0, net.ListenConfig{})
	require.NoError(t, err)
	t.Cleanup(func() { cancel(); _ = ln.(net.Listener).Close() })
	return ln.(net.Listener), cancel
}

func TestListenAddresses(t *testing.T) {
	port := portOf(freeAddress(t))
	for address, want := range map[string]string{
		"tcp_lb/127.0.0.1:" + port:              "127.0.0.1:" + port,
		"tcp_lb/:" + port:                       "[::]:" + port,
		"TCP_LB/localhost:" + port:              "127.0.0.1:" + port,
		"tcp_lb/127.0.0.1:" + port + "-" + port: "127.0.0.1:" + port,
	} {
		ln, _ := listenAs(t, address)
		require.Equal(t, want, ln.Addr().String(), address)
		require.NoError(t, ln.Close())
	}
	held := listen(t) // without SO_REUSEPORT
	defer held.Close()
	na, err := caddy.ParseNetworkAddress("tcp_lb/" + held.Addr().String())
	require.NoError(t, err)
	_, err = na.Listen(t.Context(), 0, net.ListenConfig{})
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.ErrorContains(t, err, held.Addr().String())

	na, err = caddy.ParseNetworkAddress("tcp_lb/127.0.0.1:14000-14001")
	require.NoError(t, err)
	all, err := na.ListenAll(t.Context(), net.ListenConfig{})
	require.NoError(t, err)
	for i, ln := range all {
		require.True(t, strings.HasSuffix(ln.(net.Listener).Addr().String(), []string{":14000", ":14001"}[i]))
		require.NoError(t, ln.(net.Listener).Close())
	}
}

// A config may change from Caddy's listener to the shared one, and back.
func TestSharedListenerBesideCaddys(t *testing.T) {
	address := freeAddress(t)
	caddys, _ := listenAs(t, address)
	shared, _ := listenAs(t, "tcp_lb/"+address)
	require.NoError(t, caddys.Close())
	again, _ := listenAs(t, address)
	require.NoError(t, shared.Close())
	require.NoError(t, again.Close())
}
