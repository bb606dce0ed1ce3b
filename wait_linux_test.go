package tcplb

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A client that leaves while it waits has no place any more, and never reaches
// a backend. One that only half-closes behind a request is there still.
func TestWaitingClientLeaves(t *testing.T) {
	watchLeftovers(t)
	s := startServer(t, func(c *net.TCPConn) { echo(c) })
	s.kill()
	lb := startLB(t, fastChecks+","+patient, s.address)
	eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "down")
	closes, resets, resetsLater, asks := dialClient(t, lb), dialClient(t, lb), dialClient(t, lb), dialClient(t, lb)
	write(t, resets, "a request")
	write(t, resetsLater, "a request")
	write(t, asks, "a request")
	require.NoError(t, asks.CloseWrite())
	eventuallyWaiting(t, 4)
	require.NoError(t, closes.Close())
	for i, c := range []*net.TCPConn{resets, resetsLater} {
		require.NoError(t, c.SetLinger(0))
		require.NoError(t, c.Close())
		eventuallyWaiting(t, 2-i)
	}
	require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("backend", "", "reason", "client_closed")))
	require.EqualValues(t, 2, metric(t, "connections_closed_total", labels("backend", "", "reason", "client_reset")))

	s.start()
	expect(t, asks, "a request")
	expectEOF(t, asks)
	requireBooksBalance(t, 1)
	require.Zero(t, metric(t, "connections_closed_total", labels("reason", "no_backend")))
}

// A client that has sent something and closed may want it delivered, whatever
// kind of socket it comes by.
func TestMessageOfAClientThatHasLeft(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			address := "127.0.0.1:0"
			if network == "unix" {
				address = filepath.Join(t.TempDir(), "s")
			}
			ln, err := net.Listen(network, address)
			require.NoError(t, err)
			defer ln.Close()
			c, err := net.Dial(network, ln.Addr().String())
			require.NoError(t, err)
			s, err := ln.Accept()
			require.NoError(t, err)
			defer s.Close()
			write(t, c, "message")
			require.NoError(t, c.Close())
			w := waiter{watch: watchHangup(s, true)}
			require.Equal(t, reasonNone, w.wait(time.Now().Add(50*time.Millisecond)), "its end is there by now")
			require.NoError(t, s.SetReadDeadline(time.Time{}))
			expect(t, s, "message")
			require.Equal(t, reasonClientClosed, watchHangup(s, true).look())
		})
	}
}

// Nor does one that leaves while its connect is under way.
func TestClientLeavesDuringItsConnect(t *testing.T) {
	watchLeftovers(t)
	for name, config := range map[string]func(lb, hole string) string{
		"plain": func(lb, hole string) string {
			return lbConfig(lb, `"dial_timeout":"1h",`+checksDisabled+","+backendsJSON(hole)+"}")
		},
		"wrapped": func(lb, hole string) string {
			return routeConfig(lb, `{"handler":"throttle"}`, "", `"dial_timeout":"1h",`+checksDisabled+","+backendsJSON(hole)+"}", "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			hole, lb := blackHole(t), freeAddress(t)
			runCaddy(t, config(lb, hole))
			c := dialClient(t, lb)
			write(t, c, "x")
			eventuallyWaiting(t, 1) // that is, its connect takes long
			require.NoError(t, c.SetLinger(0))
			require.NoError(t, c.Close())
			eventually(t, func() bool { return open.n.Load() == 0 }, "it is over")
			require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("reason", "client_reset")))
			require.Zero(t, metric(t, "connection_errors_total", labels("backend", hole)), "no fault of the backend's")
		})
	}
}
