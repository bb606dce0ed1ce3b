package tcplb

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// Hands, reloads, failing loads, probes and clients, all at once and at random:
// in the end each backend is as it was set last, and the books balance.
func TestHandsUnderLoad(t *testing.T) {
	watchLeftovers(t)
	requireSharedListener(t)
	var backends []*server
	for i := range 4 {
		backends = append(backends, duoServer(t, fmt.Sprint("backend ", i)))
	}
	lb := freeAddress(t)
	runCaddy(t, variedConfig("tcp_lb/"+lb, 1, backends))
	checked(t)
	t.Cleanup(forgetHands)
	l := startLoad(lb, 8, 20)
	k := startBookkeeper()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 { // the first backend is left alone, by hands
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for !isClosed(stop) {
				b := backends[1+rnd.IntN(3)]
				state := []handState{stateReady, stateDrain}[rnd.IntN(2)]
				_, _ = registry.setByHand([]string{"", defaultName}[rnd.IntN(2)], b.address, handChange{
					state: &state, weight: new(rnd.IntN(5)), resetWeight: rnd.IntN(3) == 0,
				})
			}
		})
	}
	for round := range 20 {
		done := l.short.Load()
		// Not one without the first: others may be drained by hand.
		reload(t, variedConfig("tcp_lb/"+lb, 1+round%3, backends))
		require.Error(t, caddy.Load([]byte(strings.Replace(variedConfig("tcp_lb/"+lb, 2, backends), `"apps":{`,
			`"apps":{"http":{"servers":{"srv":{"listen":["unix//nonexistent/socket"]}}},`, 1)), true))
		eventually(t, func() bool { return l.short.Load() > done+100 }, "load between reloads")
	}
	close(stop)
	wg.Wait()
	_, err := registry.setByHand("", "", handChange{})
	require.NoError(t, err)
	for _, b := range registry.snapshot()[0].configured {
		h := b.byHand()
		require.Equal(t, h.state == stateReady && h.weightOr(b.given) > 0, b.Available())
	}
	k.finish(t)
	l.finish(t)
	requireBooksBalance(t, int(l.short.Load())+20)
}

// One change of very many costs about what it costs to look at them.
func TestHandOverManyBackends(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) {
		for i := range 10_000 {
			h.Backends = append(h.Backends, BackendConfig{Address: fmt.Sprintf("10.%d.%d.%d:80", i/40000, i/200, i%200)})
		}
		checksOff(h)
	})
	g.start()
	changed := setState(t, t.Name(), "", stateDrain)
	require.Len(t, changed, 10_000)
	require.Empty(t, pickCounts(g, 10))
	require.True(t, slices.IsSortedFunc(changed, func(a, b *Backend) int { return strings.Compare(a.address, b.address) }))
	setState(t, t.Name(), "", stateReady)
	require.Len(t, pickCounts(g, 10_000), 10_000)
}

// By the time an exit drains, nothing that is set by hand gives more time, or less.
func TestHandDuringTheEnd(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) {
		h.Backends = backendList(one)
		h.DrainTimeout = new(caddy.Duration(time.Hour))
		checksOff(h)
	})
	g.start()
	b := g.members()[0].Backend
	require.Equal(t, wasTaken, b.take())
	g.stop()
	drain := func() (end time.Time, runs, cut bool) {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.drainEnd, b.drain != nil, b.cutAt
	}
	end, runs, _ := drain()
	require.True(t, runs)
	for _, s := range []handState{stateMaint, stateReady, stateDrain, stateMaint} {
		setState(t, t.Name(), one, s)
		now, runs, cut := drain()
		require.Equal(t, end, now, s.String())
		require.True(t, runs && !cut, s.String())
	}
	b.release()
	require.Empty(t, registry.snapshot())
}

// What is set by hand is everywhere that one looks.
func TestHandIsShown(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) {
		h.Backends = []BackendConfig{{Address: one, Weight: new(2)}, {Address: two, Weight: new(4)}, {Address: three}}
		checksOff(h)
	})
	g.start()
	setState(t, "", one, stateMaint)
	setHand(t, "", two, handChange{weight: new(7)})
	for _, c := range []struct {
		address, state    string
		weight, effective int64
	}{{one, "maint", 2, 0}, {two, "ready", 4, 7}, {three, "ready", 1, 1}} {
		s := backendStatuses(t)[c.address]
		require.Equal(t, c.state, s.State)
		require.Equal(t, c.weight, s.Weight)
		require.EqualValues(t, c.effective, s.EffectiveWeight)
		require.EqualValues(t, c.weight, metric(t, "backend_weight", labels("backend", c.address)))
		require.EqualValues(t, c.effective, metric(t, "backend_effective_weight", labels("backend", c.address)))
		for _, state := range stateNames {
			require.Equal(t, oneIf(state == c.state), metric(t, "backend_state", labels("backend", c.address, "state", state)), state)
		}
	}
	s := registry.snapshot()[0].summary()
	require.Equal(t, map[string]int{"ready": 2, "drain": 0, "maint": 1}, s.States)
	require.EqualValues(t, 8, s.EffectiveWeight)
	require.Equal(t, []int{3, 2, 0}, []int{s.Backends, s.Available, s.Draining})
}
