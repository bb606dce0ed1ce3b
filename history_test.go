package tcplb

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

func TestHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const name = "history of a pool"
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Name, h.Backends = name, backendList(one, two) })
		g.start()
		p, b := g.pool, g.members()[0].Backend
		r := new(recorder)
		r.begin()
		synctest.Wait()
		list, _, _ := r.history(name)
		require.Empty(t, list, "nobody knows what came before")
		require.Nil(t, r.paceOf(b))

		b.stats.opened.Add(20)
		b.stats.received.Add(1000)
		b.stats.sent.Add(5000)
		b.stats.closed[reasonClientClosed].Add(15)
		b.stats.errors[0].Add(10)
		p.closed[reasonNoBackend].Add(10)
		p.closed[reasonClientClosed].Add(3)
		p.waiters.waiting.Store(4)
		time.Sleep(historyPause)
		synctest.Wait()
		list, before, _ := r.history(name)
		require.Len(t, list, 1)
		m := list[0]
		require.True(t, m.At.Equal(time.Now()))
		require.Equal(t, []float64{5, 4, 4, 200, 1000, 2}, []float64{m.Open, m.Waiting, m.New, m.Received, m.Sent, m.Refused})
		require.Zero(t, before[reasonNoBackend], "that is within it")
		require.Zero(t, before[reasonClientClosed])
		pace := r.paceOf(b)
		require.NotNil(t, pace)
		require.Equal(t, []float64{4, 2, 200, 1000}, []float64{pace.Connections, pace.Errors, pace.Received, pace.Sent})
		p.waiters.waiting.Store(0)

		// It is bounded, and oldest first.
		time.Sleep(2 * historyWindow)
		synctest.Wait()
		list, before, _ = r.history(name)
		require.Len(t, list, historyLength)
		for i := range list[1:] {
			require.Equal(t, historyPause, list[i+1].At.Sub(list[i].At))
		}
		require.True(t, list[len(list)-1].At.Equal(time.Now()))
		require.EqualValues(t, 10, before[reasonNoBackend], "that was long ago")
		require.EqualValues(t, 3, before[reasonClientClosed])

		// It goes on while any config wants it, and ends with the last.
		r.begin()
		r.end()
		time.Sleep(historyPause)
		synctest.Wait()
		list, _, _ = r.history(name)
		require.Len(t, list, historyLength)
		require.True(t, list[len(list)-1].At.Equal(time.Now()))
		r.end()
		list, _, _ = r.history(name)
		require.Empty(t, list)
		require.Nil(t, r.paceOf(b))
		b.stats.closed[reasonClientClosed].Add(5)

		// Another begins from the start.
		r.begin()
		time.Sleep(historyPause)
		synctest.Wait()
		list, _, _ = r.history(name)
		require.Len(t, list, 1)
		require.Zero(t, list[0].New)
		r.end()
	})
}

// What docs/status.md says of its size.
func TestHistoryIsSmall(t *testing.T) {
	require.LessOrEqual(t, uintptr(historyLength)*unsafe.Sizeof(historyMoment{}), uintptr(29_000))
	require.LessOrEqual(t, unsafe.Sizeof(pace{}), uintptr(120))
}

// A pool is remembered for as long as its history goes back, and one that comes back
// as another begins anew.
func TestHistoryOfAPoolThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const name = "gone"
		load := func() *generation {
			g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Name, h.Backends = name, backendList(one) })
			g.start()
			return g
		}
		r := new(recorder)
		r.begin()
		defer r.end()
		g := load()
		g.pool.closed[reasonNoBackend].Add(100)
		g.members()[0].Backend.stats.opened.Add(100)
		g.members()[0].Backend.stats.closed[reasonClientClosed].Add(100)
		time.Sleep(time.Minute)
		g.stop()
		time.Sleep(3 * time.Minute) // it is forgotten
		list, _, _ := r.history(name)
		require.NotEmpty(t, list)
		g = load()
		again := time.Now()
		g.pool.closed[reasonNoBackend].Add(12)
		time.Sleep(time.Minute)
		synctest.Wait()
		list, before, _ := r.history(name)
		require.NotEmpty(t, list)
		for _, m := range list {
			require.False(t, m.At.Before(again), "of the pool that is there now")
			require.Less(t, m.New+m.Refused, 100.0, "no count went backwards")
		}
		require.LessOrEqual(t, before[reasonNoBackend], uint64(12))
		g.stop()
		time.Sleep(historyWindow + time.Minute)
		synctest.Wait()
		list, _, _ = r.history(name)
		require.Empty(t, list)
	})
}

// The histories are those of the process: a reload loses nothing of them, a config
// that fails after its start leaves them as they were, and without a page there is
// nobody who records.
func TestHistoryOverReloads(t *testing.T) {
	watchLeftovers(t)
	s := echoServer(t)
	web, lb := freeAddress(t), freeAddress(t)
	second := `"name":"second",` + checksDisabled + "," + backendsJSON(s.address) + "}"
	config := func(idle int) string {
		return statusConfig(t, web, lb, fmt.Sprintf(`"name":"first","idle_timeout":"%dh",%s,%s}`, idle, checksDisabled, backendsJSON("192.0.2.1:1")), second, "")
	}
	runCaddy(t, config(1))
	at := recent.lastLoad()
	seen := func() time.Time {
		recent.mu.Lock()
		defer recent.mu.Unlock()
		if h := recent.pools["second"]; h != nil {
			return h.seen.at
		}
		return time.Time{}
	}
	eventually(t, func() bool { return !seen().IsZero() }, "looked at")
	first := seen()
	for i := range 3 {
		reload(t, config(2+i))
		require.Equal(t, 1, recordings())
	}
	require.True(t, recent.lastLoad().After(at))
	require.False(t, seen().IsZero(), "it is the same one")
	require.False(t, seen().Before(first))

	bad := strings.Replace(config(9), `"listen":["`+web+`"]`, `"listen":["`+web+`","`+s.address+`"]`, 1)
	require.NotEqual(t, bad, config(9))
	require.Error(t, caddy.Load([]byte(bad), true), "the address is taken")
	require.Equal(t, 1, recordings())

	reload(t, strings.Replace(config(9), `"handler":"tcp_lb_status"`, `"handler":"tcp_lb_health"`, 1))
	require.Zero(t, recordings())
	require.True(t, seen().IsZero())
}
