package tcplb

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/require"
)

// useLanes has the test's probes go through lanes of their own.
func useLanes(t *testing.T, f *files.Budget) *probeLanes {
	t.Helper()
	before := lanes
	lanes = newProbeLanes(f)
	t.Cleanup(func() { lanes = before })
	return lanes
}

// scale is a pool of many backends, and files for their probes.
type scale struct {
	backends int
	budget   *files.Budget
}

// manyBackends is 10,000 of them in a process of 20,000 files.
func manyBackends() scale { return scale{10_000, files.New(files.Divide(20_000))} }

func (s scale) list() (list []BackendConfig, addresses []string) {
	for i := range s.backends {
		address := fmt.Sprintf("10.1.%d.%d:80", i/250, i%250)
		list, addresses = append(list, BackendConfig{Address: address}), append(addresses, address)
	}
	return list, addresses
}

// Of many backends a tenth are hosts that don't answer. The checks of the others
// keep their interval, from the first probe on, and files stay bounded.
func TestBlackHolesHoldUpNobody(t *testing.T) {
	if raceDetector {
		t.Skip("Go's race detector crashes in a bubble of thousands: run this without -race, as .ci/run does")
	}
	for name, full := range map[string]bool{"files to borrow": false, "no files to borrow": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testBlackHoles(t, full) })
		})
	}
}

func testBlackHoles(t *testing.T, full bool) {
	s := manyBackends()
	l := useLanes(t, s.budget)
	if full {
		require.True(t, s.budget.Acquire(s.budget.Limit()))
	}
	before := s.budget.Used()
	list, addresses := s.list()
	f := newFakeNet()
	f.latency = time.Millisecond
	holes := make(map[string]bool)
	for _, a := range addresses[:s.backends/10] {
		f.hang(a)
		holes[a] = true
	}
	g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = list })
	began := time.Now()
	g.start()
	time.Sleep(time.Minute)

	// One of the others dies, and some more hosts are gone.
	dies, gone := addresses[s.backends-1], addresses[s.backends/10:s.backends/10+s.backends/100]
	f.fail(dies, errRefused)
	f.hang(gone...)
	died := time.Now()
	byAddress := make(map[string]*Backend)
	for _, m := range g.members() {
		byAddress[m.Backend.address] = m.Backend
	}
	for byAddress[dies].Available() {
		time.Sleep(10 * time.Millisecond)
	}
	found := time.Since(died)
	time.Sleep(time.Minute)
	for _, a := range gone {
		require.False(t, byAddress[a].Available(), "found, though many others are slow")
		holes[a] = true
	}
	g.stop()
	synctest.Wait()

	var first, gap time.Duration
	rounds := 0
	for _, a := range addresses {
		if holes[a] || a == dies {
			require.False(t, byAddress[a].Available())
			rounds += len(f.times(a))
			continue
		}
		times := f.times(a)
		first = max(first, times[0].Sub(began))
		for i := 1; i < len(times); i++ {
			gap = max(gap, times[i].Sub(times[i-1]))
		}
	}
	t.Logf("%d backends, %d of them silent: first probes within %v, then at most %v apart; a death was found after %v; %d files at most; %.0f s from probe to probe of a silent one",
		s.backends, len(holes), first, gap, found, f.most, 120/(float64(rounds)/float64(len(holes))))
	// Half of the files are the prompt lane's in any case.
	require.LessOrEqual(t, first, time.Second/2+promptTime*time.Duration(2*len(holes)/s.budget.Probes()))
	require.LessOrEqual(t, gap, 10*time.Second+promptTime)
	require.LessOrEqual(t, found, 11*time.Second+2*promptTime)
	require.LessOrEqual(t, f.most, s.budget.Probes()+l.mostBorrowed)
	if full {
		require.LessOrEqual(t, f.most, s.budget.Probes())
	}
	require.Equal(t, before, s.budget.Used(), "what was borrowed is back")
}

// smallLanes has four files set apart for probes, and eight of connections, of
// which one can be borrowed.
func smallLanes() *probeLanes {
	return newProbeLanes(files.New(files.Shares{Connections: 8, Probes: 4}))
}

// placeWaiter waits for a place.
type placeWaiter struct{ got chan *probePlace }

func wait(l *probeLanes, q queue) placeWaiter {
	w := placeWaiter{make(chan *probePlace, 1)}
	go func() { w.got <- l.enter(context.Background(), q, nil) }()
	synctest.Wait()
	return w
}

// has returns the place, if w has it by now.
func (w placeWaiter) has() *probePlace {
	synctest.Wait()
	select {
	case p := <-w.got:
		return p
	default:
		return nil
	}
}

// enterNow enters probes that don't have to wait.
func enterNow(t *testing.T, l *probeLanes, q queue, n int) (in []*probePlace) {
	t.Helper()
	for range n {
		p := wait(l, q).has()
		require.NotNil(t, p, "a place at once")
		in = append(in, p)
	}
	return in
}

func leaveAll(places ...*probePlace) {
	for _, p := range places {
		p.leave()
	}
}

func TestSlowProbesLeavePlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := smallLanes()
		slow := enterNow(t, l, slowQueue, 1)
		require.Equal(t, borrowedLane, slow[0].in)
		require.EqualValues(t, 1, l.files.Used())
		slow = append(slow, enterNow(t, l, slowQueue, 2)...)
		require.Equal(t, slowLane, slow[2].in)
		last := wait(l, slowQueue)
		require.Nil(t, last.has(), "half of the files are left alone")
		prompt := enterNow(t, l, promptQueue, 2)
		next := wait(l, promptQueue)
		require.Nil(t, next.has(), "all are in use")

		prompt[0].leave()
		require.Nil(t, last.has())
		require.NotNil(t, next.has())
		slow[0].leave()
		require.Equal(t, borrowedLane, last.has().in)
		require.EqualValues(t, 1, l.files.Used())
	})
}

func TestNothingIsBorrowedOfWhatRunsShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := smallLanes()
		require.True(t, l.files.Acquire(6), "three quarters")
		leaveAll(enterNow(t, l, slowQueue, 2)...)
		require.EqualValues(t, 6, l.files.Used())
		l.files.Release(1)
		p := enterNow(t, l, slowQueue, 1)
		require.EqualValues(t, 6, l.files.Used())
		leaveAll(p...)
		require.EqualValues(t, 5, l.files.Used())
	})
}

func TestUrgentProbesComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := smallLanes()
		require.True(t, l.files.Acquire(8))
		in := enterNow(t, l, slowQueue, 2)
		order := ""
		turn := make(chan *probePlace)
		queueUp := func(name string, q queue, urgent <-chan struct{}) {
			go func() {
				p := l.enter(context.Background(), q, urgent)
				order += name
				turn <- p
			}()
			synctest.Wait()
		}
		hurry := make(chan struct{})
		for range 5 {
			queueUp("s", slowQueue, nil)
		}
		queueUp("h", slowQueue, hurry)
		for range 6 {
			queueUp("u", urgentQueue, nil)
		}
		hurry <- struct{}{}
		synctest.Wait()
		for range 12 {
			in[0].leave()
			in[0] = <-turn
		}
		require.Equal(t, "usuuusuuhsss", order, "but for one turn of four")
		leaveAll(in...)
		require.Equal(t, 4, l.free)
	})
}

// One that ends while it waits gives up its turn, and one that got a place just
// then gives that up.
func TestWaitingForAPlaceEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := smallLanes()
		in := enterNow(t, l, promptQueue, 4)
		for range 100 {
			ctx, cancel := context.WithCancel(context.Background())
			got := make(chan *probePlace)
			go func() { got <- l.enter(ctx, promptQueue, nil) }()
			synctest.Wait()
			go cancel()
			go in[0].leave()
			if p := <-got; p != nil {
				p.leave()
			}
			synctest.Wait()
			in[0] = enterNow(t, l, promptQueue, 1)[0]
		}
		leaveAll(in...)
		require.Equal(t, 4, l.free)
		require.Zero(t, l.waiting[promptQueue].Len())
	})
}

// Each client that needs them has a borrowed file's place at once.
func TestProbesGiveWayToClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newProbeLanes(files.New(files.Shares{Connections: 24, Probes: 4}))
		useLanes(t, l.files)
		l = lanes
		places := enterNow(t, l, slowQueue, 3)
		ended := make(chan error, 3)
		for _, p := range places {
			go func() {
				ended <- p.run(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
			}()
		}
		synctest.Wait()
		for range 12 {
			require.True(t, l.files.AcquirePair(), "as many clients as without the probes")
		}
		require.False(t, l.files.AcquirePair())
		for range 3 {
			require.Equal(t, errBrokenOff, <-ended, "which is no result")
		}
		require.EqualValues(t, 24, l.files.Used())
	})
}
