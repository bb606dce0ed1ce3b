package tcplb

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// However many clients wait, a backend is probed ten times a second at most,
// and when it is back they have it within a quarter of one.
func TestClientsHaveADownBackendProbed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		for len(f.times(one)) < 2 {
			time.Sleep(100 * time.Millisecond)
		} // the next is in ten seconds
		b := g.members()[0].Backend
		wait := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end) && !b.Available(); time.Sleep(time.Millisecond) {
				for range 5 {
					if l, err := connect(g); err == nil {
						l.release()
						return
					}
				}
			}
		}
		probes := len(f.times(one))
		g.wantProbes()
		time.Sleep(time.Second)
		require.Len(t, f.times(one), probes, "not while it is up")

		f.fail(one, errRefused)
		for b.Available() {
			_, err := connect(g)
			require.Error(t, err)
			synctest.Wait()
		}
		time.Sleep(time.Minute)
		for range 3 {
			probes = len(f.times(one))
			wait(3 * time.Second)
			times := f.times(one)[probes:]
			require.GreaterOrEqual(t, len(times), 29)
			for i := 1; i < len(times); i++ {
				require.GreaterOrEqual(t, times[i].Sub(times[i-1]), wantedSpacing)
			}
			time.Sleep(time.Minute)
		}
		f.fail(one, nil)
		back := time.Now()
		wait(time.Second)
		require.True(t, b.Available())
		require.LessOrEqual(t, time.Since(back), time.Second/4)
		require.False(t, f.overlapped())
		g.stop()
	})
}

// One client that is turned away is enough for all the passes that it takes.
func TestOneClientBringsABackendBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, errRefused)
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		time.Sleep(65 * time.Second)
		f.fail(one, nil)
		_, err := connect(g)
		require.ErrorIs(t, err, errNoBackend)
		time.Sleep(wantedSpacing + time.Millisecond)
		require.True(t, g.members()[0].Backend.Available())
		g.stop()
	})
}

// Many connects that fail although the checks pass don't become as many probes,
// and a death is found in milliseconds all the same.
func TestFailingConnectsAreNoFloodOfProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		time.Sleep(15 * time.Second)
		b := g.members()[0].Backend
		before := len(f.times(one))
		fail := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end) && b.Available(); time.Sleep(time.Millisecond) {
				for range 10 {
					b.checkSoon()
					synctest.Wait()
				}
			}
		}
		fail(time.Second)
		require.LessOrEqual(t, len(f.times(one))-before, int(time.Second/suspectSpacing)+3, "and a regular one")
		require.Greater(t, len(f.times(one)), before+10)

		f.fail(one, errRefused)
		died := time.Now()
		fail(time.Second)
		require.False(t, b.Available())
		require.LessOrEqual(t, time.Since(died), suspectSpacing+time.Millisecond)

		before = len(f.times(one))
		for range 1000 { // connects that began before
			b.checkSoon()
			synctest.Wait()
		}
		require.Len(t, f.times(one), before, "that it is down is known")
		g.stop()
	})
}

// A pool of many backends, all down, has them probed in turn and at a bounded
// rate, however many clients ask at once.
func TestDemandIsBoundedForAPool(t *testing.T) {
	const backends, clients, rounds = 250, 100, 20
	g := &generation{pool: new(pool)}
	roster := make([]enrolled, backends)
	signals := make([]chan struct{}, backends)
	for i := range backends {
		b := newBackend(g.pool, fmt.Sprint(i), target{})
		b.setHealthy(false)
		signals[i] = make(chan struct{}, 1)
		b.checking.Store(&checker{wanted: signals[i]})
		roster[i] = enrolled{Backend: b}
	}
	g.roster.Store(&roster)
	asked := func() (n int) {
		for _, c := range signals {
			n += len(c)
		}
		return n
	}
	began := time.Now()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range rounds {
				g.wantProbes()
			}
		})
	}
	wg.Wait()
	require.GreaterOrEqual(t, asked(), demandBurst)
	require.LessOrEqual(t, asked(), demandBurst+int(time.Since(began)/(time.Second/demandRate)))
	eventually(t, func() bool { g.wantProbes(); return asked() == backends }, "each has its turn")
}

func TestDemandAllowance(t *testing.T) {
	var d demand
	now := time.Now()
	require.Equal(t, demandBurst, d.allowance(now))
	require.Zero(t, d.allowance(now))
	require.Zero(t, d.allowance(now.Add(time.Second/demandRate-1)))
	total := 0
	for range 10 * demandRate {
		now = now.Add(time.Second / demandRate)
		total += d.allowance(now)
	}
	require.Equal(t, 10*demandRate, total)
	require.Equal(t, demandBurst, d.allowance(now.Add(time.Hour)), "none is saved up")
}

// everyTenth of a second a client asks the balancer, until enough were served
// in a row. It returns how many were not.
func everyTenth(t *testing.T, lb string, enough int) (failed int) {
	t.Helper()
	tick := time.NewTicker(time.Second / 10)
	defer tick.Stop()
	deadline := time.Now().Add(hangTimeout)
	for served := 0; served < enough; <-tick.C {
		require.True(t, time.Now().Before(deadline), "served again")
		if name, err := ask(lb); err == nil && name != "" {
			served++
		} else {
			served = 0
			failed++
		}
	}
	return failed
}

// Backends that are away for a moment are back a moment after, with all options
// at their defaults. A client comes every tenth of a second, so that ten are those of one.
func TestBackendIsAwayForASecond(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d of %d", n, n), func(t *testing.T) {
			watchLeftovers(t)
			var servers []*server
			var addresses []string
			for range n {
				servers = append(servers, namedServer(t, "here"))
				addresses = append(addresses, servers[len(servers)-1].address)
			}
			lb := startLB(t, "", addresses...)
			checked(t)
			for range 3 { // it flaps
				require.Zero(t, everyTenth(t, lb, 3))
				for _, s := range servers {
					s.kill()
				}
				eventually(t, func() bool {
					_, _ = ask(lb)
					return metric(t, "backend_healthy", nil) == 0
				}, "found by clients")
				for _, s := range servers {
					s.start()
				}
				require.Less(t, everyTenth(t, lb, 5), 10, "and all later ones are served")
			}
			eventually(t, func() bool { return metric(t, "backend_healthy", nil) == float64(n) }, "all are back")
		})
	}
}

// The same with a time to try: no client notices.
func TestClientsWaitWhileABackendIsAway(t *testing.T) {
	watchLeftovers(t)
	s := namedServer(t, "here")
	lb := startLB(t, `"load_balancing":{"try_duration":"8s"}`, s.address) // less than the interval
	checked(t)
	s.kill()
	const clients = 10
	names := make(chan string, clients)
	for range clients {
		go func() {
			name, _ := ask(lb)
			names <- name
		}()
	}
	eventually(t, func() bool { return metric(t, "backend_healthy", nil) == 0 }, "found by clients")
	s.start()
	for range clients {
		require.Equal(t, "here", <-names)
	}
}
