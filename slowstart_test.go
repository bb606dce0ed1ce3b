package tcplb

import (
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

const four = "10.0.0.4:80"

// ninth is a step of the slow starts of these tests.
const ninth = 10 * time.Second

// slowly is a handler of the backends, without checks unless they are wanted.
func slowly(list []BackendConfig, checks bool) func(*Handler) {
	return func(h *Handler) {
		h.Backends = list
		h.LoadBalancing = &LoadBalancing{SlowStart: caddy.Duration(9 * ninth)}
		if !checks {
			checksOff(h)
		}
	}
}

// comeBack has the backend taken out by hand, and back at this moment.
func comeBack(t *testing.T, address string) *Backend {
	t.Helper()
	setState(t, t.Name(), address, stateDrain)
	return setState(t, t.Name(), address, stateReady)[0]
}

// stepping reports whether the pool waits for a step.
func stepping(p *pool) bool {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	return p.slow.timer != nil || p.slow.stepping
}

// requireTenths wants the backend to have that much of its weight, whoever asks,
// where all weights are 1 and the policy is round_robin.
func requireTenths(t *testing.T, g *generation, b *Backend, tenths int) {
	t.Helper()
	synctest.Wait()
	require.Equal(t, float64(tenths)/10, b.effectiveWeight())
	want, n := make(map[string]int), 0
	for _, m := range g.members() {
		if m.Backend.Available() {
			want[m.Backend.address] = slowSteps
			n += slowSteps
		}
	}
	want[b.address] = tenths
	require.Equal(t, want, pickCounts(g, n-slowSteps+tenths))
}

func TestSlowStartGrows(t *testing.T) {
	began := time.Now()
	for _, lasts := range []time.Duration{time.Millisecond, time.Second, 7*time.Second + 1, maxDuration} {
		s := &slowStart{began: began, lasts: lasts}
		at, n := began, 1
		for ; ; n++ {
			require.Equal(t, n, s.tenths(at), "%s: at the step", lasts)
			line := .1 + .9*float64(at.Sub(began))/float64(lasts)
			require.InDelta(t, line, float64(n)/10, 1e-5, "%s: on the line from a tenth to all", lasts)
			next := s.next(at)
			if next.IsZero() {
				break
			}
			require.Equal(t, n, s.tenths(next.Add(-1)), "%s: just before the next", lasts)
			require.Equal(t, next, s.next(next.Add(-1)))
			at = next
		}
		require.Equal(t, slowSteps, n)
		require.Equal(t, lasts, at.Sub(began))
		require.Equal(t, 1, s.tenths(began.Add(-time.Hour)))
	}
	var none *slowStart
	require.Equal(t, slowSteps, none.tenths(began))
	require.Zero(t, none.next(began))
}

// Shares follow the slow start of a backend that checks found down and up again,
// by each policy that knows weights.
func TestSlowStartSharesFollow(t *testing.T) {
	for name, policy := range allPolicies() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeNet()
				list := []BackendConfig{{Address: one, Weight: new(2)}, {Address: two, Weight: new(3)}, {Address: three}}
				g, _ := testGeneration(t, f, slowly(list, true))
				g.policy = policy
				g.start()
				defer g.stop()
				b := g.members()[0].Backend
				f.fail(one, errRefused)
				time.Sleep(30 * time.Second)
				require.False(t, b.Available())
				f.fail(one, nil)
				for !b.Available() {
					time.Sleep(time.Millisecond)
				}
				synctest.Wait()
				time.Sleep(time.Second)
				const n = 20_000
				for tenths := 1; tenths <= slowSteps; tenths++ {
					require.Equal(t, float64(2*tenths)/10, b.effectiveWeight())
					require.Equal(t, tenths < slowSteps, stepping(g.pool), "the timer runs as long")
					share := 2 * float64(tenths) / (2*float64(tenths) + 40)
					got := float64(pickCounts(g, n)[one]) / n
					if name == "first" {
						require.Equal(t, 1., got)
					} else {
						require.InDelta(t, share, got, 7*math.Sqrt(share*(1-share)/n), "with %d tenths", tenths)
					}
					time.Sleep(ninth)
					synctest.Wait()
				}
			})
		})
	}
}

// Round robin keeps its order while shares grow: nobody is picked twice in a row,
// before, at and after each step.
func TestSlowStartKeepsTheOrderSmooth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), slowly(backendList(one, two, three, four), false))
		g.start()
		defer g.stop()
		comeBack(t, one)
		var last *Backend
		for range 9 * 4 {
			for range 37 {
				b := choice(g)
				require.NotSame(t, last, b)
				last = b
			}
			time.Sleep(ninth / 4)
			synctest.Wait()
		}
		require.False(t, stepping(g.pool))
	})
}

// Neither a start nor a reload is a return.
func TestNoSlowStartOfAPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, _ := testGeneration(t, newFakeNet(), slowly(backendList(one, two), true))
		s, o := newToldSource(), newToldSource()
		has(first, s)
		has(first, o)
		first.start()
		update, other := <-s.update, <-o.update
		update(foundAt(three))
		time.Sleep(time.Second)
		other(foundAt(four))
		require.Equal(t, map[string]int{one: 2, two: 2, three: 2, four: 2}, pickCounts(first, 8))
		second, _ := testGeneration(t, newFakeNet(), slowly(backendList(one, two, three, four), true))
		second.start()
		first.stop()
		require.Equal(t, map[string]int{one: 2, two: 2, three: 2, four: 2}, pickCounts(second, 8))
		require.False(t, stepping(second.pool))
		second.stop()
	})
}

// Whatever kept new connections off, it is slow when they come again.
func TestSlowStartOfWhoIsReadyAgain(t *testing.T) {
	for name, away := range map[string]handChange{
		"drain":    {state: new(stateDrain)},
		"maint":    {state: new(stateMaint)},
		"weight 0": {weight: new(0)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, _ := testGeneration(t, newFakeNet(), slowly(backendList(one, two), true))
				g.start()
				defer g.stop()
				time.Sleep(ninth)
				b := setHand(t, t.Name(), one, away)[0]
				require.Zero(t, b.effectiveWeight())
				time.Sleep(ninth)
				setHand(t, t.Name(), one, handChange{state: new(stateReady), resetWeight: true})
				requireTenths(t, g, b, 1)
				time.Sleep(4*ninth + ninth/2)
				requireTenths(t, g, b, 5)
				setHand(t, t.Name(), one, handChange{weight: new(1)})
				requireTenths(t, g, b, 5)
				setHand(t, t.Name(), one, away)
				require.Zero(t, b.effectiveWeight())
				setHand(t, t.Name(), one, handChange{state: new(stateReady), resetWeight: true})
				requireTenths(t, g, b, 1)
				time.Sleep(9 * ninth)
				requireTenths(t, g, b, 10)
				require.False(t, stepping(g.pool))
			})
		})
	}
}

// One that goes down again has its next slow start from the beginning, and the whole
// weight as long as it is down.
func TestSlowStartStartsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, slowly(backendList(one, two), true))
		g.start()
		defer g.stop()
		b := g.members()[0].Backend
		turn := func(up bool) {
			f.fail(one, map[bool]error{false: errRefused}[up])
			for b.Available() != up {
				time.Sleep(time.Millisecond)
			}
		}
		turn(false)
		turn(true)
		requireTenths(t, g, b, 1)
		time.Sleep(6*ninth + time.Second)
		requireTenths(t, g, b, 7)
		turn(false)
		require.EqualValues(t, 1, b.effectiveWeight())
		require.Nil(t, b.slow.Load())
		require.Equal(t, map[string]int{two: 5}, pickCounts(g, 5))
		turn(true)
		requireTenths(t, g, b, 1)
		time.Sleep(ninth + time.Second)
		requireTenths(t, g, b, 2)
	})
}

// So is one whose time out for failing clients is over.
func TestSlowStartAfterATimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
			slowly(backendList(one, two), false)(h)
			h.HealthChecks.Passive = &PassiveHealthChecks{FailDuration: caddy.Duration(ninth)}
		})
		g.start()
		defer g.stop()
		b := g.members()[0].Backend
		b.failed("refused")
		require.False(t, b.Available())
		time.Sleep(ninth)
		requireTenths(t, g, b, 1)
		time.Sleep(ninth + time.Second)
		requireTenths(t, g, b, 2)
	})
}

// With health_initially_unhealthy, the first check that passes is no return, but
// for a backend that joins a pool at work.
func TestSlowStartAfterTheFirstCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		run := func(addresses ...string) *generation {
			g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
				slowly(backendList(addresses...), true)(h)
				h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{InitiallyUnhealthy: true}}
			})
			g.start()
			return g
		}
		first := run(one, two)
		time.Sleep(time.Second)
		require.Equal(t, map[string]int{one: 2, two: 2}, pickCounts(first, 4))
		require.EqualValues(t, 1, first.members()[0].Backend.effectiveWeight())
		second := run(one, two, three)
		first.stop()
		time.Sleep(time.Second)
		requireTenths(t, second, second.members()[2].Backend, 1)
		setState(t, t.Name(), one, stateMaint)
		setState(t, t.Name(), one, stateReady)
		time.Sleep(9*ninth - 2*time.Second)
		synctest.Wait()
		require.Equal(t, .9, second.members()[0].Backend.effectiveWeight())
		second.stop()
	})
}

// A slow start goes on over reloads as it began, also over one that fails and over
// another time; a config without ends it.
func TestSlowStartGoesOnOverReloads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		run := func(lasts time.Duration) *generation {
			g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
				slowly(backendList(one, two), false)(h)
				h.LoadBalancing.SlowStart = caddy.Duration(lasts)
			})
			g.start()
			return g
		}
		first := run(9 * ninth)
		b := comeBack(t, one)
		time.Sleep(3*ninth + ninth/2)
		requireTenths(t, first, b, 4)
		failing := run(0)
		require.EqualValues(t, 1, b.effectiveWeight(), "there is none")
		requireTenths(t, failing, b, 10)
		failing.stop()
		requireTenths(t, first, b, 4)
		second := run(90 * ninth)
		requireTenths(t, second, b, 4)
		requireTenths(t, first, b, 4)
		time.Sleep(ninth)
		requireTenths(t, second, b, 5)
		requireTenths(t, first, b, 5)
		first.stop()
		time.Sleep(ninth)
		requireTenths(t, second, b, 6)
		third := run(0)
		second.stop()
		requireTenths(t, third, b, 10)
		time.Sleep(ninth)
		require.False(t, stepping(third.pool))
		again := run(9 * ninth)
		requireTenths(t, again, b, 7)
		time.Sleep(ninth)
		requireTenths(t, again, b, 8)
		again.stop()
		comeBack(t, one)
		fourth := run(9 * ninth)
		third.stop()
		requireTenths(t, fourth, b, 10)
		fourth.stop()
	})
}

// A backend that joins a pool at work is slow, by a reload or by a source, and one
// that is away for a while comes back slowly. So is one that a config had set to 0.
func TestSlowStartOfJoiners(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		first, _ := testGeneration(t, f, slowly(backendList(one), true))
		first.start()
		time.Sleep(ninth)
		second, _ := testGeneration(t, f, slowly(backendList(one, two), true))
		s := newToldSource()
		has(second, s)
		second.start()
		first.stop()
		b := second.members()[1].Backend
		requireTenths(t, second, b, 1)
		time.Sleep(9 * ninth)
		requireTenths(t, second, b, 10)

		update := <-s.update
		update(foundAt(three))
		b = second.members()[2].Backend
		requireTenths(t, second, b, 1)
		time.Sleep(9 * ninth)
		update(nil)
		time.Sleep(ninth)
		update(foundAt(three))
		requireTenths(t, second, second.members()[2].Backend, 1)
		time.Sleep(9 * ninth)

		third, _ := testGeneration(t, f, slowly([]BackendConfig{{Address: one}, {Address: two, Weight: new(0)}}, true))
		third.start()
		second.stop()
		failing, _ := testGeneration(t, f, slowly(backendList(one, two), true))
		failing.start()
		failing.stop()
		require.Equal(t, map[string]int{one: 3}, pickCounts(third, 3))
		fourth, _ := testGeneration(t, f, slowly(backendList(one, two), true))
		fourth.start()
		third.stop()
		requireTenths(t, fourth, fourth.members()[1].Backend, 1)

		failing, _ = testGeneration(t, f, slowly([]BackendConfig{{Address: one, Weight: new(0)}, {Address: two}}, true))
		failing.start()
		failing.stop()
		requireTenths(t, fourth, fourth.members()[1].Backend, 1)
		require.Nil(t, fourth.members()[0].Backend.slow.Load(), "a config that failed took nothing from it")
		fourth.stop()
		forgetDeparted()

		// Those that a pool begins with are not slow, nor is what left another one.
		last, _ := testGeneration(t, f, slowly(backendList(one, two, three), true))
		last.start()
		require.Equal(t, map[string]int{one: 2, two: 2, three: 2}, pickCounts(last, 6))
		comeBack(t, one)
		next, _ := testGeneration(t, f, slowly(backendList(one, two), true))
		s = newToldSource()
		has(next, s)
		last.stop()
		require.Empty(t, registry.snapshot())
		next.start()
		require.Equal(t, map[string]int{one: 3, two: 3}, pickCounts(next, 6), "nor what was slow in a pool that ended")

		// Nobody else is there to be slower than.
		update = <-s.update
		update(foundAt())
		setState(t, t.Name(), "", stateDrain)
		update(foundAt(three))
		require.Nil(t, next.members()[2].Backend.slow.Load())
		next.stop()
	})
}

// Who is alone, or with others as new, is not held back, and nobody is refused.
func TestSlowStartOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), slowly(backendList(one, two), false))
		g.start()
		defer g.stop()
		setState(t, t.Name(), "", stateDrain)
		setState(t, t.Name(), one, stateReady)
		require.Equal(t, map[string]int{one: 7}, pickCounts(g, 7))
		setState(t, t.Name(), two, stateReady)
		require.Equal(t, map[string]int{one: 3, two: 3}, pickCounts(g, 6))
		time.Sleep(ninth + time.Second)
		require.Equal(t, map[string]int{one: 3, two: 3}, pickCounts(g, 6))
		require.Equal(t, .2, g.members()[0].Backend.effectiveWeight())
		require.Equal(t, .4, registry.snapshot()[0].summary().EffectiveWeight)
		require.Equal(t, .2, metric(t, "backend_effective_weight", labels("backend", one)))
		require.Equal(t, .2, backendStatuses(t)[one].EffectiveWeight)
		require.EqualValues(t, 1, backendStatuses(t)[one].Weight)
	})
}

// An end stops the timer, and so does a pool that goes on without who was slow.
func TestSlowStartEnds(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), slowly(backendList(one, two), false))
		g.start()
		require.False(t, stepping(g.pool))
		comeBack(t, one)
		require.True(t, stepping(g.pool))
		setState(t, t.Name(), one, stateDrain)
		time.Sleep(2 * ninth)
		synctest.Wait()
		require.False(t, stepping(g.pool), "nobody needs it")
		comeBack(t, one)
		p := g.pool
		b := p.backends[one]
		require.Equal(t, wasTaken, b.take()) // the pool is drained
		g.stop()
		require.False(t, stepping(p))
		registry.stepSlowStarts(p) // it fired just then
		require.False(t, stepping(p))
		b.release()
		require.Empty(t, registry.snapshot())
	})
}

// countingPolicy counts the pickers that it makes, each of which takes a while.
type countingPolicy struct {
	made  *atomic.Int64
	takes time.Duration
}

func (c countingPolicy) NewPicker(available []Candidate, prev Picker) Picker {
	c.made.Add(1)
	time.Sleep(c.takes)
	return RoundRobin{}.NewPicker(available, prev)
}

// Many that come back at different times share their steps, which leave time for
// other things where a picker takes long.
func TestSlowStartOfManyIsBounded(t *testing.T) {
	for _, takes := range []time.Duration{0, 2 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			var list []BackendConfig
			for i := range 1000 {
				list = append(list, BackendConfig{Address: fmt.Sprintf("10.1.%d.%d:80", i/250, i%250)})
			}
			g, _ := testGeneration(t, newFakeNet(), slowly(list, false))
			var made atomic.Int64
			g.policy = countingPolicy{&made, takes}
			g.start()
			defer g.stop()
			setState(t, t.Name(), "", stateDrain)
			registry.mu.Lock()
			now := time.Now()
			for i, m := range g.members()[1:] {
				m.Backend.hand.Store(&hand{})
				m.Backend.barred.Store(false)
				m.Backend.slow.Store(&slowStart{began: now.Add(-time.Duration(i) * ninth / 1000), lasts: 9 * ninth})
			}
			g.pool.awaitStepLocked(now)
			registry.mu.Unlock()
			before := made.Load()
			time.Sleep(11 * ninth)
			synctest.Wait()
			require.False(t, stepping(g.pool))
			steps := made.Load() - before
			require.GreaterOrEqual(t, steps, int64(5))
			if takes == 0 {
				require.LessOrEqual(t, steps, int64(slowSteps*slowSteps))
			} else {
				require.LessOrEqual(t, steps, int64(110*time.Second/(slowSteps*takes))+1)
			}
		})
	}
}
