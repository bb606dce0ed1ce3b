package tcplb

import (
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
)

// busy has all processors' places taken until free is called.
func busy(t testing.TB) (free func()) {
	t.Helper()
	var turns []*secure.Turn
	free = func() {
		for _, turn := range turns {
			turn.Give()
		}
	}
	t.Cleanup(free)
	for range computing * runtime.GOMAXPROCS(0) {
		turns = append(turns, processors.Join())
		require.NoError(t, turns[len(turns)-1].Take(t.Context()))
	}
	return free
}

// Thousands that come at once, or what there is time for here, wait for the
// processors. No backend is blamed for that, and none hears of a client before its turn.
func TestTLSHandshakesWaitForTheirTurns(t *testing.T) {
	watchLeftovers(t)
	const clients = 300
	a := newIssuer(t)
	one, other := a.server(t, nil, secureEcho), a.server(t, nil, secureEcho)
	lb := startTLS(t, "tcp_lb/", a.trusted("")+`,"dial_timeout":"3s"`, one.address, other.address)
	free := busy(t)
	var conns []*net.TCPConn
	for range clients {
		conns = append(conns, dialClient(t, lb))
		write(t, conns[len(conns)-1], "x")
	}
	eventually(t, func() bool { return open.n.Load() == clients }, "all are there")
	time.Sleep(3100 * time.Millisecond) // longer than a backend has
	require.Zero(t, one.acceptedCount()+other.acceptedCount())
	free()
	for _, c := range conns {
		expect(t, c, "x")
		require.NoError(t, c.Close())
	}
	requireBooksBalance(t, clients)
	require.Zero(t, metric(t, "connection_errors_total", nil))
	require.EqualValues(t, clients, metric(t, "wait_duration_seconds", nil))
}

func TestTLSClientLeavesBeforeItsTurn(t *testing.T) {
	watchLeftovers(t)
	a := newIssuer(t)
	s := a.server(t, nil, secureEcho)
	lb := startTLS(t, "tcp_lb/", a.trusted(""), s.address)
	free := busy(t)
	c := dialClient(t, lb)
	eventually(t, func() bool { return open.n.Load() == 1 }, "it is there")
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	eventually(t, func() bool { return metric(t, "connections_closed_total", labels("reason", "client_reset")) == 1 }, "the end of it")
	free()
	echoed(t, lb, 10)
	require.Equal(t, 1, s.acceptedCount())
	require.Zero(t, metric(t, "connection_errors_total", nil))
}

func TestExitWhileHandshakesWait(t *testing.T) {
	for name, c := range map[string]struct {
		drain  string
		served bool
	}{"and have no time": {"0s", false}, "and have time": {"1h", true}} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			a, lb := newIssuer(t), freeAddress(t)
			s := a.server(t, nil, secureEcho)
			noPoolsYet(t)
			require.NoError(t, caddy.Load([]byte(lbConfig("tcp_lb/"+lb, fmt.Sprintf(`{%s,%s,%s,"drain_timeout":%q}`, backendsJSON(s.address), a.trusted(""), uncheckedJSON, c.drain))), true))
			free := busy(t)
			client := dialClient(t, lb)
			write(t, client, "x")
			eventually(t, func() bool { return open.n.Load() == 1 }, "it is there")
			require.NoError(t, caddy.Stop())
			if !c.served {
				_, err := io.ReadAll(client)
				require.Error(t, err)
				eventually(t, func() bool { return open.n.Load() == 0 }, "the end of it")
				require.Zero(t, s.acceptedCount())
				return
			}
			free()
			expect(t, client, "x")
			require.NoError(t, client.Close())
			eventually(t, func() bool { return open.n.Load() == 0 }, "the end of it")
		})
	}
}

// Who waits while its backend leaves the config goes to one that has come.
func TestReloadWhileHandshakesWait(t *testing.T) {
	watchLeftovers(t)
	a, lb := newIssuer(t), freeAddress(t)
	old, other := a.server(t, nil, secureEcho), a.server(t, nil, secureEcho)
	config := func(s *server) string {
		return lbConfig("tcp_lb/"+lb, fmt.Sprintf(`{%s,%s,%s}`, backendsJSON(s.address), a.trusted(""), uncheckedJSON))
	}
	runCaddy(t, config(old))
	free := busy(t)
	c := dialClient(t, lb)
	write(t, c, "x")
	eventually(t, func() bool { return open.n.Load() == 1 }, "it is there")
	reload(t, config(other))
	free()
	expect(t, c, "x")
	require.Equal(t, 1, other.acceptedCount())
	require.Zero(t, old.acceptedCount())
}

// A backend that accepts and never answers holds up its own clients only, and those
// a tenth of a second for each that may begin at once.
func TestTLSBackendThatNeverAnswers(t *testing.T) {
	watchLeftovers(t)
	const clients = 2*begun + 1
	a, stalled, well := newIssuer(t), freeAddress(t), freeAddress(t)
	silent, s := startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }), a.server(t, nil, secureEcho)
	options := a.trusted("") + "," + uncheckedJSON + `,"dial_timeout":"10m"`
	runCaddy(t, layer4Config(fmt.Sprintf(`"a":{"listen":[%q],"routes":[{"handle":[%s]}]},"b":{"listen":[%q],"routes":[{"handle":[%s]}]}`,
		"tcp_lb/"+stalled, withHandler(fmt.Sprintf(`{"name":"stalled",%s,%s}`, backendsJSON(silent.address), options)),
		"tcp_lb/"+well, withHandler(fmt.Sprintf(`{"name":"well",%s,%s}`, backendsJSON(s.address), options)))))
	var conns []*net.TCPConn
	for range clients {
		conns = append(conns, dialClient(t, stalled))
	}
	eventually(t, func() bool { return silent.acceptedCount() >= begun }, "handshakes")
	echoed(t, well, 10)
	require.Zero(t, metric(t, "wait_duration_seconds", labels("lb", "well")))
	eventually(t, func() bool { return silent.acceptedCount() == clients }, "all have begun")
	for _, c := range conns {
		require.NoError(t, c.SetLinger(0))
		require.NoError(t, c.Close())
	}
	eventually(t, func() bool { return metric(t, "connections_closed_total", labels("reason", "client_reset")) == clients }, "the end of them")
}
