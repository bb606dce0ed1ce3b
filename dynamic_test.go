package tcplb

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

// toldSource finds what a test tells it.
type toldSource struct {
	update  chan func([]discovery.Found) // of each run
	running atomic.Int32
}

func newToldSource() *toldSource {
	return &toldSource{update: make(chan func([]discovery.Found), 10)}
}

func (s *toldSource) Run(ctx context.Context, update func([]discovery.Found)) {
	s.running.Add(1)
	defer s.running.Add(-1)
	s.update <- update
	<-ctx.Done()
}

// has gives the generation a source, before it starts.
func has(g *generation, s discovery.Source) *dynamicSource {
	d := &dynamicSource{Source: s, config: `{"source":"test"}`, name: "test", done: make(chan struct{})}
	g.sources = append(g.sources, d)
	return d
}

func foundAt(addresses ...string) (list []discovery.Found) {
	for _, a := range addresses {
		list = append(list, discovery.Found{Address: a})
	}
	return list
}

// addressesOf are those of the generation's members, in order.
func addressesOf(g *generation) (list []string) {
	for _, m := range g.members() {
		list = append(list, m.Backend.address)
	}
	return list
}

// What a source finds joins as a new backend does, and what it finds no more
// leaves as one that left the config.
func TestFoundBackendsComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.latency = 100 * time.Millisecond
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		s := newToldSource()
		has(g, s)
		g.start()
		update := <-s.update
		require.Equal(t, []string{one}, addressesOf(g))

		update([]discovery.Found{{Address: two, Weight: 3}, {Address: three, Backup: true}})
		require.Equal(t, []string{one, two, three}, addressesOf(g))
		require.True(t, g.members()[2].backup)
		require.Equal(t, "test", g.members()[1].source)
		require.Equal(t, map[string]int{one: 1, two: 3}, pickCounts(g, 4), "and not the backup")
		synctest.Wait()
		require.Len(t, f.times(two), 1, "the first probe is at once")
		time.Sleep(time.Second)
		l, err := connect(g)
		require.NoError(t, err)
		for l.backend.address != two {
			l.release()
			l, err = connect(g)
			require.NoError(t, err)
		}
		b := l.backend
		update([]discovery.Found{{Address: three, Backup: true}, {Address: two, Weight: 3}})
		require.Equal(t, 1, logs.FilterMessage("backends changed").Len(), "another order is no change")

		update([]discovery.Found{{Address: three, Weight: 2}})
		require.Equal(t, []string{one, three}, addressesOf(g))
		require.Equal(t, map[string]int{one: 1, three: 2}, pickCounts(g, 3))
		require.False(t, b.used())
		require.Len(t, g.pool.backends, 3, "it has a connection")
		require.False(t, b.Available())
		synctest.Wait()
		probes := len(f.times(two))
		time.Sleep(time.Minute)
		require.Len(t, f.times(two), probes, "no checks")
		line := logs.FilterMessage("backends changed").All()[1].ContextMap()
		require.Equal(t, map[string]any{"lb": t.Name(), "source": "test", "backends": int64(2), "joined": int64(0), "left": int64(1), "changed": int64(1)}, line)
		l.release()
		require.Len(t, g.pool.backends, 2, "nor is anything kept of it")

		update(nil)
		require.Equal(t, []string{one}, addressesOf(g), "a source that says so has none")
		g.stop()
		require.Zero(t, s.running.Load(), "waited for")
		update(foundAt(two))
		require.Empty(t, registry.snapshot(), "it comes too late")
	})
}

// What the config names holds, and then what the first source says.
func TestFoundTwice(t *testing.T) {
	f := newFakeNet()
	g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, "db.example:80"); checksOff(h) })
	g.config[0].weight = 5
	s, o := newToldSource(), newToldSource()
	has(g, s)
	has(g, o)
	g.refuse = func(t target) error {
		if t.port == 81 {
			return fmt.Errorf("port %d", t.port)
		}
		return nil
	}
	g.start()
	first, second := <-s.update, <-o.update
	if g.sources[0].Source != s {
		first, second = second, first
	}
	second([]discovery.Found{{Address: one, Weight: 9}, {Address: two, Weight: 300}, {Address: two, Weight: 1}, {Address: three, Weight: -1}})
	weights := func() (list []int) {
		for _, m := range g.members() {
			list = append(list, m.weight)
		}
		return list
	}
	require.Equal(t, []string{one, "db.example:80", two, three}, addressesOf(g))
	require.Equal(t, []int{5, 1, 256, 1}, weights())
	first([]discovery.Found{{Address: three, Weight: 4}, {Address: one}})
	require.Equal(t, []string{one, "db.example:80", three, two}, addressesOf(g))
	require.Equal(t, []int{5, 1, 4, 256}, weights())
	first(nil)
	require.Equal(t, []int{5, 1, 256, 1}, weights(), "it is the other's again")

	// What can't be a backend is left out and told; where nothing else was found,
	// nothing changes.
	second(foundAt("10.0.0.9:81", "nonsense", "10.0.0.9:82"))
	require.Equal(t, []string{one, "db.example:80", "10.0.0.9:82"}, addressesOf(g))
	for range 2 {
		second(foundAt("10.0.0.9:81"))
	}
	require.Equal(t, []string{one, "db.example:80", "10.0.0.9:82"}, addressesOf(g))
	lines := logs.FilterMessage("a source found backends that can't be used").All()
	require.Len(t, lines, 2)
	require.Contains(t, lines[0].ContextMap()["error"], `backend "10.0.0.9:81": port 81; backend "nonsense": want host:port`)
}

// A reload goes on with what was found, and a source of the config before changes
// nothing but that.
func TestFoundBackendsSurviveReloads(t *testing.T) {
	noPoolsYet(t)
	f := newFakeNet()
	run := func(s discovery.Source, change func(*dynamicSource)) *generation {
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
		g.config = nil
		d := has(g, s)
		change(d)
		g.start()
		return g
	}
	same := func(*dynamicSource) {}
	a, b := newToldSource(), newToldSource()
	first := run(a, same)
	require.Empty(t, pickCounts(first, 1))
	fromA := <-a.update
	fromA(foundAt(one, two))
	held := first.members()[0].Backend
	require.Equal(t, wasTaken, held.take())

	second := run(b, same)
	fromB := <-b.update
	require.Equal(t, []string{one, two}, addressesOf(second), "before it has found anything")
	require.Len(t, pickCounts(second, 2), 2)
	fromA(foundAt(three))
	require.Equal(t, []string{one, two}, addressesOf(second))
	require.Equal(t, []string{three}, addressesOf(first))
	fromB(foundAt(one))
	second.stop() // its config failed
	require.Equal(t, []string{three}, addressesOf(first))
	require.Equal(t, map[string]int{three: 1}, pickCounts(first, 1))
	fromB(foundAt(two))
	require.Equal(t, []string{three}, addressesOf(first))
	require.Len(t, first.pool.backends, 2, "one is held")

	// Looked for in another way, but still the same; then something else.
	third := run(newToldSource(), func(d *dynamicSource) {
		d.config, d.reporter = `{"source":"test","refresh":"1s"}`, reporting{}
		first.sources[0].reporter = reporting{}
	})
	first.stop()
	require.Equal(t, []string{three}, addressesOf(third))
	fourth := run(newToldSource(), func(d *dynamicSource) { d.config, d.name, d.reporter = `{}`, "other", reporting{} })
	third.stop()
	require.Empty(t, addressesOf(fourth), "another's backends are none of it")
	require.Equal(t, untoldOfOthers, fourth.availability(), "no outage: it has yet to tell")
	held.release()
	fourth.stop()
	require.Empty(t, registry.snapshot())
}

type reporting struct{ discovery.Reporter }

// A source may be anybody's module.
func TestSourcesMisbehave(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
		runs := 0
		has(g, sourceFunc(func(ctx context.Context, update func([]discovery.Found)) {
			switch runs++; runs {
			case 1:
				update(foundAt(two))
				panic("no more")
			case 2:
				return
			}
			update(foundAt(three))
			<-ctx.Done()
			update(foundAt(two))
		}))
		goOn := make(chan struct{})
		stuck := has(g, sourceFunc(func(_ context.Context, update func([]discovery.Found)) {
			<-goOn
			update(foundAt("10.0.0.9:80"))
		}))
		g.start()
		synctest.Wait()
		require.Equal(t, []string{one, two}, addressesOf(g), "what was found before stays")
		time.Sleep(2*sourcePause + time.Second)
		require.Equal(t, []string{one, three}, addressesOf(g))
		require.Equal(t, 1, logs.FilterMessage("panic in a source of backends").Len())
		require.Equal(t, 2, logs.FilterMessageSnippet("ended by itself").Len())
		began := time.Now()
		g.hurrySources()
		time.Sleep(time.Second)
		require.Equal(t, []string{one, three}, addressesOf(g), "a source that is ended is not listened to")
		g.stop()
		require.Equal(t, sourcePatience+time.Second, time.Since(began), "one that does not end holds nothing up")
		require.Equal(t, 1, logs.FilterMessageSnippet("does not end").Len())
		close(goOn)
		<-stuck.done
		require.Empty(t, registry.snapshot())
	})
}

type sourceFunc func(context.Context, func([]discovery.Found))

func (f sourceFunc) Run(ctx context.Context, update func([]discovery.Found)) { f(ctx, update) }

// Many changes at once are one: one picker, and one line.
func TestManyChangesAtOnce(t *testing.T) {
	f := newFakeNet()
	g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
	g.config = nil
	counted := &countedPolicy{SelectionPolicy: g.policy}
	g.policy = counted
	s := newToldSource()
	has(g, s)
	g.start()
	update := <-s.update
	address := func(i int) string { return fmt.Sprintf("10.%d.%d.%d:80", i/40000, i/200%200, i%200) }
	var all []discovery.Found
	for i := range 10_000 {
		all = append(all, discovery.Found{Address: address(i)})
	}
	update(all)
	require.Len(t, g.members(), 10_000)
	before := counted.pickers.Load()
	for i := range 1000 {
		all[i].Address = address(20_000 + i)
	}
	update(all)
	require.Len(t, g.pool.backends, 10_000)
	require.LessOrEqual(t, counted.pickers.Load()-before, int64(2))
	line := logs.FilterMessage("backends changed").All()[1].ContextMap()
	require.EqualValues(t, 1000, line["joined"])
	require.EqualValues(t, 1000, line["left"])
	g.stop()
	forgetDeparted()
}

type countedPolicy struct {
	SelectionPolicy
	pickers atomic.Int64
}

func (p *countedPolicy) NewPicker(available []Candidate, prev Picker) Picker {
	p.pickers.Add(1)
	return p.SelectionPolicy.NewPicker(available, prev)
}

// Sources of configs that come, fail and go, hands and clients, all at random and
// at once: each generation has in the end what its source told it last, and
// nothing is left of any.
func TestChangesAtRandom(t *testing.T) {
	f := newFakeNet()
	t.Cleanup(forgetHands)
	addresses := []string{one, two, three, "10.0.0.4:80", "10.0.0.5:80"}
	some := func(rnd *rand.Rand) (list []discovery.Found) {
		for _, a := range addresses[1:] {
			if rnd.IntN(2) == 0 {
				list = append(list, discovery.Found{Address: a, Weight: rnd.IntN(4)})
			}
		}
		return list
	}
	run := func(seed int) *generation {
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		rnd := rand.New(rand.NewPCG(uint64(seed), 1))
		has(g, sourceFunc(func(ctx context.Context, update func([]discovery.Found)) {
			for ctx.Err() == nil {
				update(some(rnd))
			}
		}))
		return g
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	running := run(0)
	running.start()
	p := running.pool
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(1, 2))
		for !isClosed(stop) {
			state := handState(rnd.IntN(int(numStates)))
			_, _ = registry.setByHand("", addresses[1+rnd.IntN(4)], handChange{state: &state})
		}
	})
	for range 4 {
		wg.Go(func() {
			for !isClosed(stop) {
				g := registry.newest(p.name)
				if l, err := connect(g); err == nil {
					_ = l.conn.Close()
					l.release()
				}
			}
		})
	}
	for i := range 100 {
		next := run(1 + i)
		next.start()
		if i%3 == 0 {
			next.stop() // it failed
			continue
		}
		running.stop()
		running = next
	}
	close(stop)
	wg.Wait()
	running.hurrySources()
	running.awaitSources()
	registry.mu.Lock()
	users := make(map[string]int)
	for _, m := range running.wantedLocked() {
		users[m.target.String()] = 1
	}
	for address, b := range p.backends {
		require.Equal(t, users[address], b.users, address)
		require.Zero(t, b.Load(), address)
		delete(users, address)
	}
	require.Empty(t, users)
	registry.mu.Unlock()
	require.ElementsMatch(t, addressesOf(running), keys(asAny(p.backends)))
	running.stop()
	require.Empty(t, registry.snapshot())
}

func asAny(m map[string]*Backend) map[string]any {
	all := make(map[string]any)
	for k, v := range m {
		all[k] = v
	}
	return all
}
