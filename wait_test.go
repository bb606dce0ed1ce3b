package tcplb

import (
	"fmt"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

const patient = `"load_balancing":{"try_duration":"1h"}`

// waitingClients are clients who say their own number and have it sent back.
func waitingClients(t testing.TB, lb string, n int) []*net.TCPConn {
	t.Helper()
	var list []*net.TCPConn
	for i := range n {
		c := dialClient(t, lb)
		write(t, c, fmt.Sprintf("%04d", i))
		list = append(list, c)
	}
	eventuallyWaiting(t, n)
	return list
}

func eventuallyWaiting(t testing.TB, n int) {
	t.Helper()
	eventually(t, func() bool {
		pools := registry.snapshot()
		return len(pools) == 1 && pools[0].waiters.n.Load() == int64(n)
	}, "%d clients wait", n)
}

// Those who wait when a config comes are served by it, also where it is of
// other backends altogether.
func TestWaitingClientsAreServedByTheNewestConfig(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			dead, s, lb := freeAddress(t), echoServer(t), freeAddress(t)
			config := func(address string) string {
				return lbConfig(network+lb, patient+","+fastChecks+","+backendsJSON(address)+"}")
			}
			last := strings.Replace(config(s.address), patient, patient+`,"idle_timeout":"2s"`, 1)
			runCaddy(t, config(dead))
			eventually(t, func() bool { return !backendStatuses(t)[dead].Healthy }, "down")
			clients := waitingClients(t, lb, 20)
			reload(t, config(dead)+" ") // still dead: they wait on
			reload(t, last)
			for i, c := range clients {
				expect(t, c, fmt.Sprintf("%04d", i))
				expectReset(t, c) // as its idle_timeout says
			}
			requireBooksBalance(t, 20)
			require.EqualValues(t, 20, metric(t, "connections_closed_total", labels("reason", "idle_timeout")))
			require.Zero(t, metric(t, "connections_closed_total", labels("reason", "no_backend")))
		})
	}
}

// A config without the pool has no backend for those who wait, nor has an exit.
func TestWaitingClientsEndWithTheirPool(t *testing.T) {
	watchLeftovers(t)
	dead, s, lb := freeAddress(t), echoServer(t), freeAddress(t)
	config := func(name, address string) string {
		return lbConfig("tcp_lb/"+lb, fmt.Sprintf(`"name":%q,%s,%s,%s}`, name, patient, fastChecks, backendsJSON(address)))
	}
	for _, end := range []func(){
		func() { reload(t, config("other", s.address)) },
		func() { require.NoError(t, caddy.Stop()) },
	} {
		runCaddy(t, config("web", dead))
		eventually(t, func() bool { return !backendStatuses(t)[dead].Healthy }, "down")
		c := waitingClients(t, lb, 1)[0]
		end()
		expectClosed(t, c)
		require.NoError(t, caddy.Stop())
	}
}

// expectClosed expects an end, in order or not: that depends on whether all that
// the client has sent was read.
func expectClosed(t testing.TB, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.Error(t, err)
	require.NotErrorIs(t, err, errTimeout(err))
}

// errTimeout is err where that is a timeout.
func errTimeout(err error) error {
	if n, ok := err.(net.Error); ok && n.Timeout() {
		return err
	}
	return errNoBackend
}

// Who waits is served as soon as a backend is up, not when the interval is over.
func TestWaitEndsWithTheOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, logs := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(time.Hour), TryInterval: caddy.Duration(time.Hour)}
		})
		g.start()
		defer g.stop()
		synctest.Wait()
		require.Equal(t, 1, logs.FilterMessageSnippet("no backend is available").Len())
		go func() {
			time.Sleep(10 * time.Minute)
			f.fail(one, nil)
		}()
		l, err := connect(g)
		require.NoError(t, err)
		l.release()
		require.Equal(t, time.Now().UnixNano(), g.members()[0].Backend.stats.turnedAt.Load())
		require.Equal(t, 1, logs.FilterMessageSnippet("a backend is available again").Len())
	})
}

// Those who are turned away are told of in the log: how many, once a minute.
func TestRefusalsAreLoggedNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		defer g.stop()
		synctest.Wait()
		warnings := func() (list []any) {
			for _, l := range logs.FilterMessageSnippet("clients are turned away, ").All() {
				list = append(list, l.ContextMap()["clients"])
			}
			return list
		}
		refuse := func(n int) {
			for range n {
				far, near := net.Pipe()
				g.serve(layer4Connection(near))
				_ = far.Close()
			}
		}
		refuse(100)
		require.Equal(t, []any{uint64(1)}, warnings())
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, []any{uint64(1), uint64(99)}, warnings(), "none is left out")
		time.Sleep(time.Hour)
		refuse(1)
		require.Equal(t, []any{uint64(1), uint64(99), uint64(1)}, warnings(), "a first one at once")
		require.Equal(t, 101, logs.FilterMessage("no backend could be reached").Len(), "each at DEBUG")
		require.EqualValues(t, 101, g.pool.closed[reasonNoBackend].Load())
	})
}

// A thousand clients who wait have the backends probed as often as one does.
func TestCallsForProbesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(10 * time.Second)}
		})
		g.start()
		defer g.stop()
		synctest.Wait()
		before := len(f.times(one))
		for range 100 {
			go func() { _, _ = connect(g) }()
		}
		time.Sleep(11 * time.Second)
		probes := len(f.times(one)) - before
		require.Greater(t, probes, 10, "more often than without them")
		require.LessOrEqual(t, probes, 11*20, "at most each 50 ms")
		require.Zero(t, g.pool.waiters.n.Load())
	})
}

// The pool's changes reach one who is about to wait.
func TestNoChangeIsMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
		g.start()
		defer g.stop()
		began := time.Now()
		s := search{pool: g.pool}
		s.waiter.request = &s.request
		s.request.tried = []*Backend{g.members()[0].Backend}
		defer s.end()
		before := g.pool.changes.Load()
		g.pool.changed() // between the round and the wait
		s.wait(g, before, began.Add(time.Hour))
		require.Zero(t, time.Since(began))
		s.wait(g, g.pool.changes.Load(), began.Add(time.Hour))
		require.Equal(t, time.Hour, time.Since(began))
	})
}

// An old config is gone while its connection lives: here it is told by the
// generation, from which everything else of it can be reached.
func TestConnectionKeepsNoConfig(t *testing.T) {
	requireSharedListener(t)
	for name, match := range map[string]string{
		"bare":             "",
		"behind a matcher": `{"regexp":{"pattern":"^x","count":1}}`,
	} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			s, lb := echoServer(t), freeAddress(t)
			config := func(dial int) string {
				return routeConfig("tcp_lb/"+lb, "", match, fmt.Sprintf(`"dial_timeout":"%ds",%s}`, dial, backendsJSON(s.address)), "")
			}
			runCaddy(t, config(1))
			c := hold(t, lb)
			require.Equal(t, map[string]int{"*relay.Looped": 1}, relaysOf(t))
			requireCollected(t, defaultName, c, config(2), config(3), config(4))
		})
	}
}

// relaysOf counts the open connections by what relays them.
func relaysOf(t testing.TB) map[string]int {
	t.Helper()
	kinds := make(map[string]int)
	for _, p := range registry.snapshot() {
		for _, b := range p.backends {
			b.visitSessions(func(some []*session) {
				for _, s := range some {
					kinds[fmt.Sprintf("%T", s.relay)]++
				}
			})
		}
	}
	return kinds
}

// requireCollected loads the configs, one after the other as Caddy keeps the last
// one or two, and checks that the one before them is gone while its connection lives.
func requireCollected(t testing.TB, pool string, c net.Conn, configs ...string) {
	t.Helper()
	collected := make(chan struct{})
	runtime.AddCleanup(registry.newest(pool), func(done chan struct{}) { close(done) }, collected)
	for _, config := range configs {
		reload(t, config)
	}
	eventually(t, func() bool {
		runtime.GC()
		return isClosed(collected)
	}, "the config that accepted the connection is collected")
	write(t, c, "y")
	expect(t, c, "y")
}

// Nor do the connections of a pool that has left the config.
func TestRemovedPoolKeepsNoConfig(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	s, lb := echoServer(t), freeAddress(t)
	config := func(name string) string {
		return lbConfig("tcp_lb/"+lb, fmt.Sprintf(`"name":%q,"drain_timeout":"1h",%s}`, name, backendsJSON(s.address)))
	}
	runCaddy(t, config("v1"))
	c := hold(t, lb)
	require.Equal(t, map[string]int{"*relay.Looped": 1}, relaysOf(t))
	requireCollected(t, "v1", c, config("v2"), config("v3"), config("v4"))
}

func TestAccessLogOfFailedConnects(t *testing.T) {
	f := newFakeNet()
	down(f, one, two)
	g, logs := testGeneration(t, f, func(h *Handler) {
		h.Backends = backendList(one, two)
		h.AccessLog = true
		checksOff(h)
	})
	g.start()
	defer g.stop()
	far, near := tcpPair(t)
	g.serve(layer4Connection(near))
	expectEOF(t, far)

	failures := logs.FilterMessage("connect failed").All()
	require.Len(t, failures, 2)
	for i, address := range []string{one, two} {
		m := failures[i].ContextMap()
		require.Equal(t, address, m["backend"])
		require.Equal(t, "refused", m["error"])
		require.EqualValues(t, i+1, m["attempt"])
		require.Equal(t, far.LocalAddr().String(), m["client"])
	}
	lines := logs.FilterMessage("connection").All()
	require.Len(t, lines, 1)
	m := lines[0].ContextMap()
	require.Equal(t, "no_backend", m["reason"])
	require.Equal(t, []any{
		map[string]any{"backend": one, "error": "refused"},
		map[string]any{"backend": two, "error": "refused"},
	}, m["failed"])
	require.NotContains(t, m["error"], "\n")
	require.Equal(t, "warn", lines[0].Level.String(), "failures stand out")
	require.True(t, strings.HasSuffix(lines[0].LoggerName, "access."+t.Name()), "each pool has a name to filter by")
}

// What is remembered of a client's failed connects is bounded.
func TestFailedConnectsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(time.Minute)}
			checksOff(h)
		})
		g.start()
		defer g.stop()
		l, err := connect(g)
		require.ErrorIs(t, err, errNoBackend)
		require.Greater(t, l.attempts, 200)
		require.Len(t, l.failed, maxFailedConnects)
	})
}
