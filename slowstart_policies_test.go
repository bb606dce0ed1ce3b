package tcplb

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// What the rotation has of slow starts stays within bounds, and weights as near to
// what they should be as it goes.
func TestSlowStartWeights(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	now := time.Now()
	for _, c := range []struct {
		backends, heaviest int
		off                float64 // by how many tenths a weight of the mean is at most
	}{{2, 1, 0}, {20, 256, 0}, {655, 1, 0}, {1000, 100, .1}, {10_000, 1, 0}, {10_000, 7, 0}, {10_000, 256, .1}, {120_000, 1, 1}} {
		t.Run(fmt.Sprint(c.backends, " up to ", c.heaviest), func(t *testing.T) {
			list := testCandidates(make1s(c.backends)...)
			sum := 0
			for i := range list {
				list[i].Weight = 1 + r.IntN(c.heaviest)
				sum += list[i].Weight
				list[i].Backend.slow.Store(&slowStart{began: now.Add(-time.Duration(r.IntN(1000)) * time.Millisecond), lasts: time.Second})
			}
			list[0].Backend.slow.Store(nil)
			whole := append([]Candidate(nil), list...)
			weighSlowStarts(list, now)
			units, kinds, mean := 0, make(map[int]bool), float64(sum)/float64(c.backends)
			for i, is := range list {
				require.Positive(t, is.Weight)
				require.LessOrEqual(t, is.Weight, slowSteps*maxWeight)
				require.Equal(t, whole[i].Weight*list[0].Settled, is.Settled*whole[0].Weight, "settled they are as before")
				units += is.Weight
				kinds[is.Weight] = true
				tenths := float64(is.Backend.slow.Load().tenths(now))
				wanted := float64(is.Settled) * tenths / 10
				if c.off == 0 {
					require.Equal(t, wanted, float64(is.Weight))
				} else if float64(whole[i].Weight) >= mean {
					require.InEpsilon(t, wanted, float64(is.Weight), c.off)
				}
			}
			if units > sum { // else it is no more than without
				require.LessOrEqual(t, units, maxSlowUnits)
				require.LessOrEqual(t, units*len(kinds), maxSlowWork)
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		list := testCandidates(3, 6)
		weighSlowStarts(list, now)
		require.Equal(t, []int{3, 6, 0, 0}, []int{list[0].Weight, list[1].Weight, list[0].Settled, list[1].Settled})
		weighSlowStarts(nil, now)
	})
}

// The table of ip_hash keeps its size in a slow start, and with it the others'
// clients.
func TestSlowStartMovesFewOfOthersClients(t *testing.T) {
	for _, n := range []int{5, 100, 655} {
		list := testCandidates(make1s(n)...)
		settled := IPHash{}.NewPicker(list, nil).(*maglev)
		before := settled
		s := &slowStart{began: time.Now(), lasts: time.Minute}
		list[0].Backend.slow.Store(s)
		for at := s.began; !at.IsZero(); at = s.next(at) {
			now := append([]Candidate(nil), list...)
			weighSlowStarts(now, at)
			after := IPHash{}.NewPicker(now, before).(*maglev)
			require.Len(t, after.table, len(settled.table))
			moved, own := 0, 0
			for i := range uint64(len(after.table)) {
				was, is := before.at(i), after.at(i)
				if is == list[0].Backend {
					own++
				} else if was != is && was != list[0].Backend {
					moved++
				}
			}
			require.Less(t, float64(moved)/float64(len(after.table)), .02, "%d backends", n)
			share := float64(s.tenths(at)) / float64(s.tenths(at)+10*(n-1))
			require.InDelta(t, share, float64(own)/float64(len(after.table)), .1*share+2./maglevSize)
			before = after
		}
		require.Equal(t, settled.table, before.table, "in the end all is as before")
	}
}

// The turns of level backends go on where weights change, also by the unit of all.
func TestLeastConnTurnsOutliveOtherWeights(t *testing.T) {
	list := testCandidates(1, 1, 1)
	p := LeastConn{}.NewPicker(list, nil)
	var last *Backend
	for round := range 30 {
		b := pickFor(p, "")
		endOne(p, b)
		require.NotSame(t, last, b, "round %d", round)
		last = b
		factor := 1 + 9*(round%2)
		for i := range list {
			list[i].Weight = factor
		}
		p = LeastConn{}.NewPicker(list, p)
		l := p.(*byLoad)
		k := l.heap[l.entries[l.index[b]].at]
		require.InDelta(t, 1/float64(factor), k.turn-l.now, 1e-9, "one pick ahead, as it was")
	}
}

// Picks, hands, checks and reloads, all at once while steps go on: whatever comes
// first, the books balance and shares are whole in the end.
func TestSlowStartUnderLoad(t *testing.T) {
	for _, policy := range []string{"round_robin", "least_conn", "random_choose", "ip_hash"} {
		t.Run(policy, func(t *testing.T) {
			watchLeftovers(t)
			t.Cleanup(forgetHands)
			f := newFakeNet()
			run := func() *generation {
				g, _ := testGeneration(t, f, func(h *Handler) {
					h.Backends = backendList(one, two, three)
					h.LoadBalancing = &LoadBalancing{SlowStart: caddy.Duration(9 * time.Millisecond), SelectionPolicyRaw: []byte(`{"policy":"` + policy + `"}`)}
					h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Interval: caddy.Duration(time.Millisecond), Passes: 1, Fails: 1}}
				})
				g.start()
				return g
			}
			var newest atomic.Pointer[generation]
			newest.Store(run())
			stop := make(chan struct{})
			var wg sync.WaitGroup
			picker := func(change func(r *rand.Rand)) {
				seed := rand.Uint64()
				wg.Go(func() {
					r := rand.New(rand.NewPCG(seed, 1))
					for !isClosed(stop) {
						change(r)
						time.Sleep(time.Duration(r.IntN(1000)) * time.Microsecond)
					}
				})
			}
			for range 3 {
				picker(func(*rand.Rand) {
					if b := choice(newest.Load()); b == nil {
						panic("three is always there")
					}
				})
			}
			picker(func(r *rand.Rand) {
				_, _ = registry.setByHand(t.Name(), []string{one, two}[r.IntN(2)], handChange{state: new([]handState{stateReady, stateDrain, stateMaint}[r.IntN(3)])})
			})
			picker(func(r *rand.Rand) {
				f.fail(two, []error{nil, errors.New("down")}[r.IntN(2)])
				_ = newest.Load().members()[0].Backend.effectiveWeight()
			})
			for range 40 {
				old := newest.Load()
				newest.Store(run())
				old.stop()
				time.Sleep(2 * time.Millisecond)
			}
			close(stop)
			wg.Wait()
			f.fail(two, nil)
			_, err := registry.setByHand(t.Name(), "", handChange{state: new(stateReady)})
			require.NoError(t, err)
			g := newest.Load()
			eventually(t, func() bool {
				whole := 0.
				for _, m := range g.members() {
					if m.Backend.Available() && m.Backend.isChecked() {
						whole += m.Backend.effectiveWeight()
					}
				}
				return whole == 3
			}, "all to be whole")
			eventually(t, func() bool { return !stepping(g.pool) }, "the end of the steps")
			for _, m := range g.members() {
				require.Zero(t, m.Backend.Load())
			}
			g.stop()
		})
	}
}
