package tcplb

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

func TestReloadKeepsConnectionsAndPosition(t *testing.T) {
	a, b, c := namedServer(t, "a"), namedServer(t, "b"), namedServer(t, "c")
	lb := freeAddress(t)
	config := func(options string) string {
		return lbConfig(lb, backendsJSON(a.address, b.address, c.address)+options+"}")
	}
	runCaddy(t, config(""))
	next := func() string {
		name, err := ask(lb)
		require.NoError(t, err)
		return name
	}
	require.Equal(t, "a", next())
	reload(t, config(`,"dial_timeout":"4s"`))
	require.Equal(t, "b", next())
	reload(t, config(`,"access_log":false,"dial_timeout":"5s"`))
	require.Equal(t, "c", next())
	require.Equal(t, "a", next())
	requireBooksBalance(t, 4)
}

func TestReloadAddsAndRemovesBackends(t *testing.T) {
	a, b, c := echoServer(t), echoServer(t), echoServer(t)
	lb := freeAddress(t)
	config := func(options string, addresses ...string) string {
		return lbConfig(lb, backendsJSON(addresses...)+options+"}")
	}
	runCaddy(t, config("", a.address, b.address))
	held := make(map[string]*net.TCPConn)
	for _, address := range []string{a.address, b.address} {
		conn := dialClient(t, lb)
		write(t, conn, "x")
		expect(t, conn, "x")
		held[address] = conn
	}

	reload(t, config("", a.address, c.address)) // drain_timeout 30s
	for _, conn := range held {
		write(t, conn, "still here")
		expect(t, conn, "still here")
	}
	status := backendStatuses(t)
	require.EqualValues(t, 0, status[b.address].Weight, "b has left the config …")
	require.EqualValues(t, 1, status[b.address].Active, "… and is still counted")
	require.EqualValues(t, 11, status[b.address].SentBytes)

	// Back while its connection lives: it is the same backend.
	reload(t, config("", a.address, b.address))
	status = backendStatuses(t)
	require.EqualValues(t, 1, status[b.address].Weight)
	require.EqualValues(t, 1, status[b.address].ConnectionsTotal)
	require.NotContains(t, status, c.address, "nothing is left of one without connections")

	// Gone, with the timeout of the config that it leaves.
	reload(t, config(`,"drain_timeout":"0s"`, a.address, b.address))
	reload(t, config(`,"drain_timeout":"0s"`, a.address))
	expectReset(t, held[b.address])
	eventually(t, func() bool { return len(backendStatuses(t)) == 1 }, "the series of b are gone")
	write(t, held[a.address], "untouched")
	expect(t, held[a.address], "untouched")
	require.EqualValues(t, 1, metric(t, "connections_active", nil))
}

// A backend of weight 0 keeps what it has, and gets nothing new.
func TestWeightZero(t *testing.T) {
	a, b := duoServer(t, "a"), duoServer(t, "b")
	lb := freeAddress(t)
	config := func(weightA, weightB int) string {
		return lbConfig(lb, fmt.Sprintf(`"drain_timeout":0,"backends":[{"address":%q,"weight":%d},{"address":%q,"weight":%d}]}`, a.address, weightA, b.address, weightB))
	}
	names := func() (all string) {
		for range 4 {
			name, err := tellName(lb)
			require.NoError(t, err)
			all += name
		}
		return all
	}
	runCaddy(t, config(1, 0))
	require.Equal(t, "aaaa", names())
	open := dialClient(t, lb)
	write(t, open, "s!")
	expect(t, open, "!")
	reload(t, config(0, 1))
	require.Equal(t, "bbbb", names())
	write(t, open, "still here")
	expect(t, open, "still here")
	require.Zero(t, backendStatuses(t)[a.address].Weight)
	eventually(t, func() bool {
		status := backendStatuses(t)[a.address]
		return status.Active == 1 && status.Health == "up"
	}, "the one that is open is counted, and the backend is checked")

	reload(t, config(0, 0))
	refused(t, lb)
	write(t, open, "and here")
	expect(t, open, "and here")
	reload(t, config(1, 1))
	require.ElementsMatch(t, []byte("abab"), []byte(names()))
}

func TestDrainTimeoutIsCounted(t *testing.T) {
	a, b := echoServer(t), echoServer(t)
	lb := freeAddress(t)
	config := func(addresses ...string) string {
		return lbConfig(lb, backendsJSON(addresses...)+`,"drain_timeout":"100ms"}`)
	}
	runCaddy(t, config(a.address, b.address))
	var backend *Backend
	for range 2 {
		c := dialClient(t, lb)
		write(t, c, "x")
		expect(t, c, "x")
	}
	for _, v := range registry.snapshot() {
		for _, each := range v.backends {
			if each.address == b.address {
				backend = each
			}
		}
	}
	began := time.Now()
	reload(t, config(a.address))
	eventually(t, func() bool { return backend.stats.closed[reasonDrainTimeout].Load() == 1 }, "cut")
	require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond, "not before its time")
	require.EqualValues(t, 1, metric(t, "connections_active", nil))
}

func TestHandlersShareAPool(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	first, second, third := freeAddress(t), freeAddress(t), freeAddress(t)
	server := func(key, listen, name string) string {
		return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[{"handler":"tcp_lb","name":%q,%s}]}]}`,
			key, listen, name, backendsJSON(a.address, b.address))
	}
	runCaddy(t, layer4Config(server("1", first, "x")+","+server("2", second, "x")+","+server("3", third, "y")))
	got := ""
	for _, address := range []string{first, second, second, first, third} {
		name, err := ask(address)
		require.NoError(t, err)
		got += name
	}
	require.Equal(t, "abab"+"a", got, "one rotation for both of one name, another for the other")
}

func TestFailedLoadChangesNothing(t *testing.T) {
	a, b := echoServer(t), echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, backendsJSON(a.address)+"}"))
	c := dialClient(t, lb)
	write(t, c, "x")
	expect(t, c, "x")
	before := backendStatuses(t)[a.address]

	for name, config := range map[string]string{
		"provision": lbConfig(lb, backendsJSON(a.address, b.address)+`,"max_connections":-1}`),
		"another handler's provision": layer4Config(fmt.Sprintf(`"srv":{"listen":[%q],"routes":[{"handle":[%s]},{"handle":[{"handler":"nonesuch"}]}]}`,
			lb, withHandler(backendsJSON(b.address)+"}"))),
		// Apps start in no fixed order, and those that did are stopped again.
		"start of another app": strings.Replace(
			lbConfig(lb, backendsJSON(a.address, b.address)+`,"drain_timeout":"0s"}`),
			`"apps":{`, `"apps":{"http":{"servers":{"srv":{"listen":["unix//nonexistent/socket"]}}},`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			require.Error(t, caddy.Load([]byte(config), true))
			write(t, c, "y")
			expect(t, c, "y")
			after := backendStatuses(t)
			require.Len(t, after, 1)
			require.Equal(t, before.ConnectionsTotal, after[a.address].ConnectionsTotal)
			require.EqualValues(t, 1, after[a.address].Weight)
			probed := b.acceptedCount()
			eventually(t, func() bool { return len(registry.snapshot()) == 1 }, "one pool")
			require.Equal(t, probed, b.acceptedCount())
		})
	}
	other := dialClient(t, lb)
	write(t, other, "new ones are served")
	expect(t, other, "new ones are served")
}

// A handler goes on after its config has ended: for connections that were
// accepted before and come to it after.
func TestHandlerAfterItsConfig(t *testing.T) {
	noPoolsYet(t)
	s := echoServer(t)
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(s.address) })
	g.dial = dialTarget
	g.start()
	g.stop()
	require.Empty(t, registry.snapshot())

	live := g.live()
	require.Same(t, g, live)
	l, err := connect(live)
	require.NoError(t, err)
	require.Len(t, registry.snapshot(), 1, "counted again")
	_, _ = io.WriteString(l.conn, "x")
	expect(t, l.conn, "x")
	require.NoError(t, l.conn.Close())

	// What it does now is counted in the pool that ends after it, and once.
	b := l.backend
	b.stats.received.Add(5)
	ended := b.pool
	l.release()
	require.Empty(t, registry.snapshot())
	require.EqualValues(t, 5, ended.gone.received)
	l, err = connect(live)
	require.NoError(t, err)
	require.Same(t, b, l.backend, "the same one again")
	require.Same(t, ended, b.pool, "while its series are shown")
	require.NoError(t, l.conn.Close())
	b.stats.received.Add(2)
	require.EqualValues(t, 7, registry.snapshot()[0].total().received)
	l.release()
	require.EqualValues(t, 7, ended.gone.received)

	forgetDeparted()
	l, err = connect(live)
	require.NoError(t, err)
	require.Same(t, b, l.backend)
	require.NotSame(t, ended, b.pool, "another one later")
	require.NoError(t, l.conn.Close())
	b.stats.received.Add(1)
	again := b.pool
	l.release()
	require.EqualValues(t, 1, again.gone.received)

	never, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(s.address) })
	never.stop()
	require.Nil(t, never.live(), "a config that never ran serves nothing")
}

// A listener accepts before all apps of its config have started.
func TestHandlerBeforeItsConfigRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noPoolsYet(t)
		f := newFakeNet()
		backend := func(h *Handler) { h.Backends = backendList("a:1") }
		serving := func(g *generation) chan *generation {
			answer := make(chan *generation, 1)
			go func() { answer <- g.live() }()
			synctest.Wait()
			return answer
		}

		first, _ := testGeneration(t, f, backend)
		answer := serving(first)
		require.Empty(t, answer, "it waits for the start")
		require.Empty(t, registry.snapshot())
		first.start()
		require.Same(t, first, <-answer)

		second, _ := testGeneration(t, f, backend)
		require.Same(t, first, <-serving(second), "the running one serves meanwhile")
		second.start()
		require.Same(t, second, <-serving(second))
		require.Same(t, first, <-serving(first), "until it is stopped")
		first.stop()
		require.Same(t, second, <-serving(first))
		second.stop()

		failed, _ := testGeneration(t, f, backend)
		answer = serving(failed)
		failed.stop()
		require.Nil(t, <-answer)
	})
}

// startWatcher is an app that looks, when it is started, at what has begun.
type startWatcher struct{}

var seenAtStart struct {
	pools atomic.Int64
	fail  atomic.Bool
}

func (startWatcher) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "tcp_lb_test_start_watcher", New: func() caddy.Module { return new(startWatcher) }}
}

func (startWatcher) Start() error {
	seenAtStart.pools.Add(int64(len(registry.snapshot())))
	if seenAtStart.fail.Load() {
		return errors.New("fails as told")
	}
	return nil
}

func (startWatcher) Stop() error { return nil }

func init() { caddy.RegisterModule(startWatcher{}) }

func watchStart(config string) string {
	return strings.Replace(config, `"apps":{`, `"apps":{"tcp_lb_test_start_watcher":{},`, 1)
}

// Apps start in no fixed order; a backend may be one that another app serves.
func TestNothingBeginsBeforeAllAppsRun(t *testing.T) {
	s := namedServer(t, "a")
	for range 10 {
		noPoolsYet(t)
		runCaddy(t, watchStart(lbConfig(freeAddress(t), backendsJSON(s.address)+"}")))
		require.Len(t, registry.snapshot(), 1)
		require.NoError(t, caddy.Stop())
	}
	require.Zero(t, seenAtStart.pools.Swap(0))
}
