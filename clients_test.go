package tcplb

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

func TestWhoIsOneClient(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
		text string // of a
	}{
		{"192.0.2.1", "192.0.2.1", true, "192.0.2.1"},
		{"192.0.2.1", "192.0.2.2", false, "192.0.2.1"},
		{"192.0.2.1", "::ffff:192.0.2.1", true, "192.0.2.1"},
		{"::ffff:192.0.2.1", "::ffff:192.0.2.2", false, "192.0.2.1"},
		{"2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", true, "2001:db8:0:1::/64"},
		{"2001:db8:0:1::1", "2001:db8:0:2::1", false, "2001:db8:0:1::/64"},
		{"fe80::1%eth0", "fe80::2%eth1", true, "fe80::/64"},
		{"64:ff9b::192.0.2.1", "192.0.2.1", true, "192.0.2.1"},
		{"64:ff9b::192.0.2.1", "64:ff9b::192.0.2.2", false, "192.0.2.1"},
		{"64:ff9b:1::1", "64:ff9b:1::2", true, "64:ff9b:1::/64"},
		{"0.0.0.0", "::", false, "0.0.0.0"},
		{"192.0.2.1", "0:0:c000:201::", false, "192.0.2.1"},
	} {
		a, b := clientKeyOf(netip.MustParseAddr(c.a)), clientKeyOf(netip.MustParseAddr(c.b))
		require.Equal(t, c.same, a == b, "%s and %s", c.a, c.b)
		require.Equal(t, c.text, a.String())
		require.NotZero(t, a.kind)
	}
	require.Zero(t, clientKeyOf(netip.Addr{}))
}

// entries is how many clients are remembered.
func (c *clients) entries() (n int) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		n += len(s.open)
		s.mu.Unlock()
	}
	return n
}

// Whatever clients do, as many are remembered as have a connection, and maps that
// had to grow are let go.
func TestClientsAreBounded(t *testing.T) {
	var c clients
	keyOf := func(net, host int) clientKey {
		return clientKeyOf(netip.AddrFrom16([16]byte{0: 0x20, 5: byte(net >> 16), 6: byte(net >> 8), 7: byte(net), 14: byte(host >> 8), 15: byte(host)}))
	}
	for i := range 10_000 {
		require.True(t, c.enter(keyOf(7, i), 0), "without a limit, and counted all the same")
	}
	require.Equal(t, 1, c.entries(), "one network is one client, whatever it has to choose from")
	require.False(t, c.enter(keyOf(7, 1<<15), 10_000))
	require.True(t, c.enter(keyOf(7, 1<<15), 10_001))
	for range 10_001 {
		c.leave(keyOf(7, 1))
	}
	for i := range 100_000 {
		require.True(t, c.enter(keyOf(i, 1), 1))
		require.False(t, c.enter(keyOf(i, 2), 1))
	}
	require.Equal(t, 100_000, c.entries())
	for i := range 100_000 {
		c.leave(keyOf(i, 2))
	}
	require.Zero(t, c.entries())
	for i := range c.shards {
		require.Nil(t, c.shards[i].open, "too large to be kept")
	}
	for range 2 {
		require.True(t, c.enter(clientKey{}, 1), "nobody has no limit")
	}
	require.Zero(t, c.entries())
}

// However many come and go at once, none has more than its limit, and none is
// refused that has less.
func TestClientsAtRandom(t *testing.T) {
	var c clients
	const limit = 3
	var open [8]atomic.Int64
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 5000 {
				i := rand.IntN(len(open))
				key := clientKeyOf(netip.AddrFrom4([4]byte{3: byte(i)}))
				if !c.enter(key, limit) {
					continue
				}
				if n := open[i].Add(1); n > limit {
					t.Errorf("%d connections", n)
				}
				open[i].Add(-1)
				c.leave(key)
			}
		})
	}
	all.Wait()
	require.Zero(t, c.entries())
}

const perClient = `"name":"web",` + checksDisabled + `,"max_connections_per_client":%d,`

// withWarnings has a config write its warnings to a file.
func withWarnings(t testing.TB, config string) (_ string, lines func() string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "log")
	config = strings.Replace(config, `"default":{"level":"ERROR"}`, fmt.Sprintf(
		`"default":{"level":"WARN","include":["layer4.handlers.tcp_lb"],"writer":{"output":"file","filename":%q}}`, file), 1)
	return config, func() string {
		b, _ := os.ReadFile(file)
		return string(b)
	}
}

// counts waits until the one pool has so many connections.
func counts(t testing.TB, n float64) {
	t.Helper()
	eventually(t, func() bool { return metric(t, "pool_connections", nil) == n }, "%v connections", n)
}

func TestMaxConnectionsPerClient(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			s, lb := echoServer(t), freeAddress(t)
			config, warnings := withWarnings(t, lbConfig(network+lb, fmt.Sprintf(perClient, 2)+backendsJSON(s.address)+"}"))
			runCaddy(t, config)
			first, _ := hold(t, lb), hold(t, lb)
			refused(t, lb)
			refused(t, lb)
			require.NoError(t, first.Close())
			counts(t, 1)
			third := hold(t, lb)
			refused(t, lb)
			for _, name := range []string{"connections_closed_total", "connection_errors_total"} {
				labels := labels("lb", "web", "backend", "", map[string]string{"connections_closed_total": "reason", "connection_errors_total": "error_type"}[name], "max_connections_per_client")
				eventually(t, func() bool { return metric(t, name, labels) == 3 }, "%s", name)
			}
			require.EqualValues(t, 2, metric(t, "pool_connections", nil), "who is refused takes no place")
			eventually(t, func() bool { return strings.Contains(warnings(), "a client has its limit of connections") }, "a warning")
			require.Contains(t, warnings(), `"client":"127.0.0.1","max_connections_per_client":2,"connections":1`)
			require.NoError(t, third.SetLinger(0))
			require.NoError(t, third.Close())
			counts(t, 1)
			fourth := hold(t, lb)
			s.kill()
			expectReset(t, fourth)
			s.start()
			counts(t, 0)
			hold(t, lb)
		})
	}
}

// Clients who have one connection after the other have no more than one at once,
// whoever ends it.
func TestOneConnectionAfterTheOther(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			old := clientPauses
			t.Cleanup(func() { clientPauses = old })
			clientPauses = slices.Repeat([]time.Duration{time.Millisecond}, 30_000) // as long as it takes
			closes, echoes := namedServer(t, "x"), echoServer(t)
			lb := freeAddress(t)
			runCaddy(t, lbConfig(network+lb, fmt.Sprintf(perClient, 1)+backendsJSON(closes.address, echoes.address)+"}"))
			for range 300 {
				c := dialClient(t, lb)
				write(t, c, "x")
				expect(t, c, "x")
				require.NoError(t, c.Close())
			}
			requireBooksBalance(t, 300)
		})
	}
}

// A client that is over its limit many times at once leaves others the time that
// they may need.
func TestOneClientLeavesPausesToOthers(t *testing.T) {
	c := new(clients)
	flood, other := clientKey{kind: 4, bits: 1}, clientKey{kind: 4, bits: 2}
	for range mostPausing {
		c.pause(flood)
	}
	require.False(t, c.pause(flood))
	for range mostPausingOfOne {
		require.True(t, c.pause(other))
	}
	for range mostPausingOfOne {
		c.resume(flood)
		c.resume(other)
	}
	require.Zero(t, c.pausing)
	require.Empty(t, c.pauses)
	for i := range mostPausing {
		require.True(t, c.pause(clientKey{kind: 4, bits: uint64(i)}))
	}
	require.False(t, c.pause(other), "however many clients")
}

// proxied opens a connection of a client that a PROXY header names.
func proxied(t testing.TB, lb, client string) *net.TCPConn {
	t.Helper()
	c := dialClient(t, lb)
	version := "TCP6"
	if netip.MustParseAddr(client).Is4() {
		version = "TCP4"
	}
	write(t, c, fmt.Sprintf("PROXY %s %s %s 1111 2222\r\nx", version, client, client))
	return c
}

// Behind a proxy that says who the client is, that counts.
func TestClientsBehindAProxy(t *testing.T) {
	watchLeftovers(t)
	s, lb := echoServer(t), freeAddress(t)
	runCaddy(t, routeConfig(lb, `{"handler":"proxy_protocol"}`, "", fmt.Sprintf(perClient, 1)+backendsJSON(s.address)+"}", ""))
	for _, client := range []string{"192.0.2.1", "192.0.2.2", "2001:db8:0:1::1", "2001:db8:0:2::1"} {
		expect(t, proxied(t, lb, client), "x")
	}
	for _, client := range []string{"192.0.2.2", "2001:db8:0:1:2:3:4:5", "::ffff:192.0.2.1"} {
		_, err := proxied(t, lb, client).Read(make([]byte, 1))
		require.Error(t, err, client)
	}
}

// Clients of a Unix socket have no address, and no limit.
func TestClientsOfAUnixSocket(t *testing.T) {
	watchLeftovers(t)
	s, lb := echoServer(t), filepath.Join(t.TempDir(), "lb")
	runCaddy(t, lbConfig("unix/"+lb, fmt.Sprintf(perClient, 1)+backendsJSON(s.address)+"}"))
	for range 3 {
		c, err := net.Dial("unix", lb)
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
		write(t, c, "x")
		expect(t, c, "x")
	}
}

// A reload changes the limit for new connections; those that are open are counted,
// also where they came before there was one.
func TestReloadKeepsCountOfClients(t *testing.T) {
	watchLeftovers(t)
	a, b, lb := echoServer(t), echoServer(t), freeAddress(t)
	config := func(limit int, s *server) string {
		return lbConfig("tcp_lb/"+lb, fmt.Sprintf(perClient, limit)+backendsJSON(s.address)+"}")
	}
	runCaddy(t, config(0, a))
	first, second := hold(t, lb), hold(t, lb)
	reload(t, config(2, b))
	refused(t, lb)
	reload(t, config(3, b))
	third := hold(t, lb)
	refused(t, lb)
	reload(t, config(1, b))
	for _, c := range []*net.TCPConn{first, second} {
		write(t, c, "x") // over the limit by now, and none of them is new
		expect(t, c, "x")
		require.NoError(t, c.Close())
	}
	counts(t, 1)
	refused(t, lb)
	require.NoError(t, third.Close())
	counts(t, 0)
	hold(t, lb)
	require.Error(t, caddy.Load([]byte(strings.Replace(config(0, b), `"apps":{`, `"apps":{"http":{"servers":{"srv":{"listen":["unix//nonexistent/socket"]}}},`, 1)), true))
	refused(t, lb)
}

// Who waits for a backend has a connection, and who leaves has none.
func TestWaitingClientsCount(t *testing.T) {
	watchLeftovers(t)
	lb, backend := freeAddress(t), freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, fmt.Sprintf(perClient, 2)+`"load_balancing":{"try_duration":"1h"},`+backendsJSON(backend)+"}"))
	waits := func(n float64) {
		eventually(t, func() bool { return metric(t, "waiting_connections", nil) == n }, "%v wait", n)
	}
	first := dialClient(t, lb)
	_ = dialClient(t, lb)
	waits(2)
	refused(t, lb)
	require.NoError(t, first.Close())
	waits(1)
	_ = dialClient(t, lb)
	waits(2)
	refused(t, lb)
}

// Connections that come, stay, and go at random while configs with other limits
// follow each other are counted once each, and leave nothing.
func TestClientsOverReloads(t *testing.T) {
	watchLeftovers(t)
	s, lb := echoServer(t), freeAddress(t)
	config := func(limit int) string {
		return routeConfig("tcp_lb/"+lb, `{"handler":"proxy_protocol"}`, "", fmt.Sprintf(perClient, limit)+backendsJSON(s.address)+"}", "")
	}
	runCaddy(t, config(3))
	p := registry.newest("web").pool
	var served, turnedAway atomic.Int64
	var all sync.WaitGroup
	stop := make(chan struct{})
	for range 8 {
		all.Go(func() {
			var open []net.Conn
			for !isClosed(stop) {
				c := proxied(t, lb, fmt.Sprintf("192.0.2.%d", rand.IntN(6)))
				if n, _ := c.Read(make([]byte, 1)); n == 1 {
					served.Add(1)
					open = append(open, c)
				} else {
					turnedAway.Add(1)
				}
				for len(open) > rand.IntN(4) {
					if rand.IntN(2) == 0 {
						_ = open[0].(*net.TCPConn).SetLinger(0)
					}
					_ = open[0].Close()
					open = open[1:]
				}
			}
			for _, c := range open {
				_ = c.Close()
			}
		})
	}
	for i := range 20 {
		before := served.Load()
		reload(t, config(1+i%4))
		eventually(t, func() bool { return served.Load() > before+20 }, "clients that are served")
	}
	close(stop)
	all.Wait()
	requireBooksBalance(t, int(served.Load()))
	require.EqualValues(t, turnedAway.Load(), metric(t, "connections_closed_total", labels("reason", "max_connections_per_client")))
	require.Positive(t, turnedAway.Load())
	require.Zero(t, p.clients.entries())
	require.Zero(t, p.active.Load())
}

func BenchmarkClients(b *testing.B) {
	var c clients
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		key := clientKey{4, rand.Uint64()}
		for pb.Next() {
			key.bits += 1 << 40
			c.enter(key, 0)
			c.leave(key)
		}
	})
}
