package tcplb

import (
	"context"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
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

// takes is a handler that takes the connection's descriptor for itself.
type takes struct{}

// taken are the descriptors that it got; -1 for none.
var taken = make(chan int, 1)

func (takes) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "layer4.handlers.tcplb_test_takes", New: func() caddy.Module { return new(takes) }}
}

// Handle has no file for a copy of the descriptor, which the connection would
// need if it were a socket of Go's already.
func (takes) Handle(cx *layer4.Connection, _ layer4.Handler) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}); err != nil {
		return err
	}
	fd, _ := acceptedFrom(cx.Conn).Detach()
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	taken <- fd
	return err
}

func init() { caddy.RegisterModule(takes{}) }

// What caddy-l4 does before it calls a handler makes no socket of Go's of a
// connection, as long as no matcher has to read.
func TestConnectionReachesHandlerAsItWasAccepted(t *testing.T) {
	watchLeftovers(t)
	lb := freeAddress(t)
	for name, routes := range map[string]string{
		"a route":         layer4Routes(`{"handler":"tcplb_test_takes"}`),
		"a route in one":  layer4Routes(`{"handler":"subroute",` + layer4Routes(`{"handler":"tcplb_test_takes"}`) + `}`),
		"an address only": `"routes":[{"match":[{"remote_ip":{"ranges":["127.0.0.0/8"]}}],"handle":[{"handler":"tcplb_test_takes"}]}]`,
	} {
		t.Run(name, func(t *testing.T) {
			runCaddy(t, layer4Config(`"srv":{"listen":["tcp_lb/`+lb+`"],`+routes+`}`))
			c := dialClient(t, lb)
			fd := <-taken
			require.GreaterOrEqual(t, fd, 0)
			_, err := unix.Write(fd, []byte("x"))
			require.NoError(t, err)
			expect(t, c, "x")
			require.NoError(t, unix.Close(fd))
			expectEOF(t, c)
		})
	}
}
