package tcplb

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// setState sets the state of backends, and forgets at the test's end.
func setState(t testing.TB, lb, address string, s handState) []*Backend {
	t.Helper()
	return setHand(t, lb, address, handChange{state: &s})
}

func setHand(t testing.TB, lb, address string, c handChange) []*Backend {
	t.Helper()
	t.Cleanup(forgetHands)
	changed, err := registry.setByHand(lb, address, c)
	require.NoError(t, err)
	return changed
}

// forgetHands makes the process one in which nothing was set by hand.
func forgetHands() {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	clear(registry.hands)
}

func TestHandState(t *testing.T) {
	for s := range numStates {
		parsed, err := parseHandState(s.String())
		require.NoError(t, err)
		require.Equal(t, s, parsed)
	}
	_, err := parseHandState("down")
	require.EqualError(t, err, `state "down": want one of ready, drain, maint`)
}

// pickCounts returns what is picked in n picks, by address.
func pickCounts(g *generation, n int) map[string]int {
	got := make(map[string]int)
	for range n {
		if b := choice(g); b != nil {
			got[b.address]++
		}
	}
	return got
}

// A drained backend takes nothing new and is checked; one in maint is not, and
// begins as a new one.
func TestStatesByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		h := newStuckHandler()
		close(h.goOn)
		end := handleEvents(t, g, h)
		defer end()
		g.start()
		time.Sleep(15 * time.Second)
		b := g.members()[0].Backend

		changed := setState(t, "", one, stateDrain)
		require.Equal(t, []*Backend{b}, changed)
		require.False(t, b.Available())
		require.Equal(t, map[string]int{two: 4}, pickCounts(g, 4), "the picker is another one when the call returns")
		before := len(f.times(one))
		time.Sleep(20 * time.Second)
		require.Greater(t, len(f.times(one)), before, "checks go on")
		f.fail(one, errRefused)
		time.Sleep(20 * time.Second)
		require.False(t, b.healthy.Load(), "and tell")

		setState(t, t.Name(), one, stateMaint)
		synctest.Wait()
		before = len(f.times(one))
		time.Sleep(time.Minute)
		require.Len(t, f.times(one), before, "no checks")
		require.Equal(t, "unchecked", b.health())

		f.latency = time.Second
		setState(t, t.Name(), one, stateReady)
		synctest.Wait()
		require.Len(t, f.times(one), before+1, "the first probe is at once …")
		require.True(t, b.Available(), "until then it is as a new one")
		require.False(t, b.isChecked())
		time.Sleep(time.Second)
		synctest.Wait()
		require.False(t, b.Available(), "… and decides alone")
		f.fail(one, nil)
		time.Sleep(30 * time.Second)
		require.True(t, b.Available())
		require.Equal(t, map[string]int{one: 2, two: 2}, pickCounts(g, 4))

		var seen []string
		for _, l := range logs.FilterMessage("backend was set by hand").All() {
			c := l.ContextMap()
			require.Equal(t, "info", l.Level.String())
			require.Equal(t, one, c["backend"])
			seen = append(seen, fmt.Sprint(c["previous_state"], " ", c["state"]))
		}
		require.Equal(t, []string{"ready drain", "drain maint", "maint ready"}, seen)
		require.Equal(t, []string{"state_changed", "unhealthy", "state_changed", "state_changed", "unhealthy", "healthy"}, h.seen())
		setState(t, "", one, stateReady)
		require.Len(t, logs.FilterMessage("backend was set by hand").All(), 3, "what changes nothing is not told")
		require.Empty(t, h.seen())
		g.stop()
	})
}

func TestWeightByHand(t *testing.T) {
	f := newFakeNet()
	g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two); checksOff(h) })
	g.config[1].weight = 0
	g.start()
	b, other := g.members()[0].Backend, g.members()[1].Backend
	require.Equal(t, map[string]int{one: 4}, pickCounts(g, 4), "weight 0 in the config")
	require.False(t, other.Available())

	setHand(t, "", two, handChange{weight: new(3)})
	require.Equal(t, map[string]int{one: 1, two: 3}, pickCounts(g, 4))
	require.EqualValues(t, 0, other.weight.Load(), "the config's")
	require.EqualValues(t, 3, other.effective.Load())
	setHand(t, "", one, handChange{weight: new(0)})
	require.Equal(t, map[string]int{two: 4}, pickCounts(g, 4))
	require.False(t, b.Available())
	setHand(t, t.Name(), "", handChange{resetWeight: true})
	require.Equal(t, map[string]int{one: 4}, pickCounts(g, 4))
	require.EqualValues(t, 1, b.effective.Load())
	setHand(t, t.Name(), one, handChange{state: new(stateDrain), weight: new(7)})
	require.Zero(t, b.effective.Load())
	require.Len(t, logs.FilterMessage("backend was set by hand").All(), 5)
	setHand(t, t.Name(), "", handChange{state: new(stateReady)})
	require.EqualValues(t, 7, b.effective.Load())

	for _, w := range []int{-1, 257} {
		_, err := registry.setByHand("", one, handChange{state: new(stateMaint), weight: &w})
		require.EqualError(t, err, fmt.Sprintf("weight %d: want a number from 0 to 256", w))
		require.True(t, b.Available(), "all or nothing")
	}
	for _, c := range [][2]string{{"nonesuch", ""}, {"", three}, {t.Name(), three}, {"nonesuch", one}} {
		_, err := registry.setByHand(c[0], c[1], handChange{state: new(stateDrain)})
		require.ErrorIs(t, err, errNoMatch)
	}
}

// An address may be a backend of many pools, and be written in many ways.
func TestHandOverAllPools(t *testing.T) {
	f := newFakeNet()
	var all []*generation
	for _, name := range []string{"b", "a", "c"} {
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Name, h.Backends = name, backendList("Db.example:5432", one)
			checksOff(h)
		})
		g.start()
		all = append(all, g)
	}
	var pools []string
	for _, b := range setState(t, "", "dB.example:5432", stateDrain) {
		pools = append(pools, b.pool.name)
		require.Equal(t, "db.example:5432", b.Address())
	}
	require.Equal(t, []string{"a", "b", "c"}, pools)
	setState(t, "c", "db.example:5432", stateReady)
	for i, want := range []int{0, 0, 2} {
		require.Equal(t, want, pickCounts(all[i], 4)["db.example:5432"])
	}
}

// What was set by hand holds for a backend that went and comes back, in a config
// that knows nothing of it; a config that fails takes nothing of it away.
func TestHandOutlivesConfigs(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		run := func(addresses ...string) (*generation, int) {
			g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(addresses...) })
			g.start()
			return g, logs.FilterMessage("backend joins as it was set by hand").Len()
		}
		first, _ := run(one, two)
		time.Sleep(15 * time.Second)
		setState(t, t.Name(), one, stateMaint)
		setHand(t, t.Name(), two, handChange{weight: new(0)})
		synctest.Wait()
		probes := len(f.times(one))

		second, told := run(one, two, three)
		require.Zero(t, told, "they are here")
		require.Equal(t, map[string]int{three: 3}, pickCounts(second, 3))
		second.stop() // it failed after its start
		require.Empty(t, pickCounts(first, 3))
		third, _ := run(two)
		first.stop()
		require.Empty(t, pickCounts(third, 3))
		forgetDeparted() // one is not even remembered for its series
		_, err := registry.setByHand("", one, handChange{state: new(stateReady)})
		require.ErrorIs(t, err, errNoMatch)
		third.stop()
		require.Empty(t, registry.snapshot())
		forgetDeparted()

		fourth, told := run(one, two, three)
		require.Equal(t, 2, told)
		time.Sleep(time.Minute)
		require.Equal(t, map[string]int{three: 3}, pickCounts(fourth, 3))
		require.Len(t, f.times(one), probes, "no check of what is in maint")
		setHand(t, t.Name(), "", handChange{state: new(stateReady), resetWeight: true})
		require.Equal(t, map[string]int{one: 1, two: 1, three: 1}, pickCounts(fourth, 3))
		registry.mu.Lock()
		require.Empty(t, registry.hands, "nothing is kept that says nothing")
		registry.mu.Unlock()
		fourth.stop()
	})
}

// In maint, connections get their drain timeout, and no more by what a reload, an
// exit or another hand does meanwhile.
func TestMaintDrains(t *testing.T) {
	watchLeftovers(t)
	s, other := echoServer(t), echoServer(t)
	lb := freeAddress(t)
	config := func(drain string, addresses ...string) string {
		return lbConfig(lb, backendsJSON(addresses...)+fmt.Sprintf(`,"drain_timeout":%q}`, drain))
	}
	runCaddy(t, config("1h", s.address))
	conn := hold(t, lb)
	b := setState(t, "", s.address, stateMaint)[0]
	refused(t, lb)
	write(t, conn, "it goes on")
	expect(t, conn, "it goes on")
	reload(t, config("0s", s.address, other.address)) // the config has it still
	write(t, conn, "and on")
	expect(t, conn, "and on")
	setState(t, "", s.address, stateReady)
	setState(t, "", s.address, stateMaint)
	expectReset(t, conn)
	eventually(t, func() bool { return b.stats.closed[reasonDrainTimeout].Load() == 1 }, "for that reason")
	hold(t, lb)
	require.EqualValues(t, 1, backendStatuses(t)[other.address].Active)

	// Back, it is whole again.
	setState(t, "", s.address, stateReady)
	setState(t, "", other.address, stateDrain)
	conn = hold(t, lb)
	require.EqualValues(t, 1, backendStatuses(t)[s.address].Active)
	setState(t, "", s.address, stateDrain)
	write(t, conn, "a drained one keeps what it has")
	expect(t, conn, "a drained one keeps what it has")
	refused(t, lb)
}

// Once drained, a backend gets nothing: also what was on its way goes elsewhere.
func TestConnectMovesOnFromADrainedBackend(t *testing.T) {
	for _, state := range []handState{stateDrain, stateMaint} {
		t.Run(state.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeNet()
				f.latency = time.Second
				g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two); checksOff(h) })
				g.start()
				time.AfterFunc(500*time.Millisecond, func() { setState(t, t.Name(), one, state) })
				l, err := connect(g)
				require.NoError(t, err)
				require.Equal(t, two, l.backend.address)
				require.Equal(t, 1, l.attempts, "no failed attempt")
				require.NoError(t, l.conn.Close())
				l.release()
				require.Zero(t, g.members()[0].Backend.Load())
				g.stop()
			})
		})
	}
}

// Clients wait for a pool that was emptied by hand, and are served at once when
// it has a backend again. That is no outage, and the log knows.
func TestPoolEmptiedByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one, two)
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(time.Hour), TryInterval: caddy.Duration(time.Hour)}
		})
		g.start()
		time.Sleep(15 * time.Second)
		setState(t, t.Name(), one, stateDrain)
		setState(t, t.Name(), two, stateMaint)
		require.Zero(t, g.health().Available)
		began := time.Now()
		time.AfterFunc(time.Minute, func() { setState(t, t.Name(), one, stateReady) })
		l, err := connect(g)
		require.NoError(t, err)
		require.Equal(t, time.Minute, time.Since(began))
		l.release()
		require.Equal(t, 1, g.health().Available)
		require.Equal(t, 1, logs.FilterMessageSnippet("no backend takes connections").Len())
		require.Equal(t, 1, logs.FilterMessage("a backend is available again").Len())
		require.Zero(t, logs.FilterMessageSnippet("no backend is available").Len())

		// What is ready goes down: that is one.
		f.fail(one, errRefused)
		time.Sleep(15 * time.Second)
		require.Equal(t, 1, logs.FilterMessageSnippet("no backend is available").Len())
		g.stop()
	})
}

// A pool that is emptied by hand first and by failures then is told of twice.
func TestOutageAfterAllWereBarred(t *testing.T) {
	var o outage
	began, _, _, _ := o.updateLocked(allBarred, 0)
	require.True(t, began && o.barred)
	began, _, _, _ = o.updateLocked(allBarred, 0)
	require.False(t, began)
	began, _, _, _ = o.updateLocked(noneAvailable, 1)
	require.True(t, began && !o.barred)
	began, _, _, _ = o.updateLocked(allBarred, 2)
	require.False(t, began)
	_, ended, _, missed := o.updateLocked(someAvailable, 3)
	require.True(t, ended)
	require.EqualValues(t, 3, missed, "from the first on")
}
