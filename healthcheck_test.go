package tcplb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		name          string
		passes, fails int
		results       string // + passed, - failed
		want          string // the verdict after each: U up, D down
	}{
		{"the first result decides alone, down", 2, 2, "-", "D"},
		{"the first result decides alone, up", 2, 2, "+", "U"},
		{"one failure is none", 2, 2, "+-+-+-", "UUUUUU"},
		{"fails in a row", 2, 2, "+--", "UUD"},
		{"passes in a row", 3, 2, "-+++", "DDDU"},
		{"a failure between starts over", 2, 2, "-+-++", "DDDDU"},
		{"up and down at once", 1, 1, "+-+-", "UDUD"},
		{"after a transition the run is over", 2, 2, "+--+-+", "UUDDDD"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var v verdict
			got := ""
			for _, r := range c.results {
				v = v.next(r == '+', c.passes, c.fails)
				if v.down {
					got += "D"
				} else {
					got += "U"
				}
			}
			require.Equal(t, c.want, got)
		})
	}
}

func TestPause(t *testing.T) {
	checks := checkSettings{interval: 10 * time.Second, fastInterval: time.Second}
	up, down := verdict{settled: true}, verdict{down: true, settled: true}
	for _, c := range []struct {
		name    string
		verdict verdict
		downFor time.Duration
		want    time.Duration
	}{
		{"up", up, 0, 10 * time.Second},
		{"up, after a failure", verdict{run: 1, settled: true}, 0, time.Second},
		{"just down", down, 0, time.Second},
		{"then twice that", down, time.Second, 2 * time.Second},
		{"and twice that", down, 3 * time.Second, 4 * time.Second},
		{"and so on", down, 7 * time.Second, 8 * time.Second},
		{"up to the interval", down, 15 * time.Second, 10 * time.Second},
		{"for as long as it lasts", down, 1000 * time.Hour, 10 * time.Second},
		{"coming back after a long time", verdict{down: true, run: 1, settled: true}, time.Hour, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) { require.Equal(t, c.want, checks.pause(c.verdict, c.downFor)) })
	}
}

// fakeNet answers dials by address and keeps their times.
type fakeNet struct {
	mu      sync.Mutex
	failing map[string]error
	hanging map[string]bool
	dials   map[string][]time.Time
	current map[string]int
	open    int // dials under way
	most    int // the most there were at once
	overlap bool
	latency time.Duration
	serve   func(address string, c net.Conn) // has the other end; nil = closes it
}

func newFakeNet() *fakeNet {
	return &fakeNet{
		failing: make(map[string]error), hanging: make(map[string]bool),
		dials: make(map[string][]time.Time), current: make(map[string]int),
	}
}

func (f *fakeNet) dial(ctx context.Context, t target, timeout time.Duration) (net.Conn, error) {
	address := t.String()
	f.mu.Lock()
	f.dials[address] = append(f.dials[address], time.Now())
	f.current[address]++
	f.overlap = f.overlap || f.current[address] > 1
	f.open++
	f.most = max(f.most, f.open)
	err, hangs, latency := f.failing[address], f.hanging[address], f.latency
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.current[address]--
		f.open--
		f.mu.Unlock()
	}()
	if hangs {
		latency, err = timeout, context.DeadlineExceeded
	}
	select {
	case <-time.After(latency):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	client, server := net.Pipe()
	if f.serve == nil {
		_ = server.Close()
	} else {
		go f.serve(address, server)
	}
	return client, nil
}

func (f *fakeNet) fail(address string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failing[address] = err
}

// hang makes dials of the addresses take until their timeout.
func (f *fakeNet) hang(addresses ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range addresses {
		f.hanging[a] = true
	}
}

func (f *fakeNet) overlapped() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.overlap
}

func (f *fakeNet) times(address string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]time.Time(nil), f.dials[address]...)
}

// testGeneration makes a generation of a pool of its own over a fake network.
func testGeneration(t *testing.T, f *fakeNet, change func(*Handler)) (*generation, *observer.ObservedLogs) {
	t.Helper()
	forgetDeparted()
	h := &Handler{Name: t.Name()}
	change(h)
	require.NoError(t, h.fill())
	require.NoError(t, h.check())
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	g, err := h.newGeneration(ctx)
	require.NoError(t, err)
	core, logs := observer.New(zap.DebugLevel)
	g.setLogger(zap.New(core))
	g.dial = f.dial
	t.Cleanup(g.stop)
	return g, logs
}

const one, two, three = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"

var errRefused = errors.New("refused")

func backendList(addresses ...string) []BackendConfig {
	var list []BackendConfig
	for _, a := range addresses {
		list = append(list, BackendConfig{Address: a})
	}
	return list
}

func TestChecksKeepTheirRhythm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.latency = 300 * time.Millisecond
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		began := time.Now()
		g.start()
		time.Sleep(65 * time.Second)
		g.stop()
		synctest.Wait()

		times := f.times(one)
		require.Equal(t, began, times[0], "the first probe is at once")
		second := times[1].Sub(times[0])
		require.LessOrEqual(t, second, 10*time.Second, "the second is within the interval")
		for i := 2; i < len(times); i++ {
			require.Equal(t, 10*time.Second, times[i].Sub(times[i-1]), "start to start")
		}
		require.GreaterOrEqual(t, len(times), 6)
		require.False(t, f.overlapped())
	})
}

func TestChecksFindDownAndUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		g.start()
		time.Sleep(15 * time.Second)
		b := g.members()[0].Backend
		require.True(t, b.Available())

		f.fail(one, errRefused)
		time.Sleep(10*time.Second + 1*time.Second + time.Millisecond)
		require.False(t, b.Available(), "down after one interval and one fast interval")
		require.Equal(t, "refused", *b.lastError.Load())
		for range 4 {
			require.Same(t, g.members()[1].Backend, choice(g))
		}

		f.fail(one, nil)
		time.Sleep(10*time.Second + 1*time.Second + time.Millisecond)
		require.True(t, b.Available())
		require.Nil(t, b.lastError.Load())
		g.stop()
		synctest.Wait()

		require.EqualValues(t, 1, b.stats.turnedDown.Load())
		require.EqualValues(t, 1, b.stats.turnedUp.Load())
		require.Equal(t, 1, logs.FilterMessage("backend is down").Len(), "only the transition is logged")
		require.Equal(t, 1, logs.FilterMessage("backend is up").Len())
		require.EqualValues(t, b.stats.checksPassed.Load()+b.stats.checksFailed.Load(), len(f.times(one)))
	})
}

func TestDownBackendIsProbedEverMoreRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, errRefused)
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		for range 2 { // it starts over each time
			start := len(f.times(one))
			if start == 0 {
				g.start()
			} else {
				f.fail(one, errRefused)
				g.members()[0].Backend.checkSoon()
				synctest.Wait()
				start++ // the second failure took it down
			}
			time.Sleep(time.Minute)
			times := f.times(one)[start:]
			last := time.Duration(0)
			for i := 1; i < len(times); i++ {
				gap := times[i].Sub(times[i-1])
				most := min(time.Second+times[i-1].Sub(times[0]), 10*time.Second)
				require.LessOrEqual(t, gap, most)
				require.GreaterOrEqual(t, gap, most*3/4, "less a part, so that many don't keep step")
				last = gap
			}
			require.Equal(t, 10*time.Second, last)
			require.Less(t, times[3].Sub(times[0]), 8*time.Second, "four within the first seconds")
			f.fail(one, nil)
			time.Sleep(11*time.Second + time.Millisecond)
			require.True(t, g.members()[0].Backend.Available())
		}
		g.stop()
	})
}

func TestFirstCheckDecidesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.latency = time.Second
		f.fail(one, errRefused)
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		require.True(t, g.members()[0].Backend.Available(), "a backend starts up")
		time.Sleep(time.Second)
		synctest.Wait()
		require.False(t, g.members()[0].Backend.Available())
		g.stop()
	})
}

func TestHangingProbeTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.hanging[one] = true
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one, two)
			h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Interval: caddy.Duration(time.Second)}}
		})
		g.start()
		time.Sleep(9 * time.Second)
		require.False(t, g.members()[0].Backend.Available())
		require.True(t, g.members()[1].Backend.Available(), "one backend's timeout is not another's")
		require.False(t, f.overlapped(), "a probe longer than the interval never overlaps the next")
		require.Len(t, f.times(one), 5, "one each timeout of 2s")
		g.stop()
	})
}

// A probe that fails for want of something here says nothing of the backend.
func TestScarcityIsNoVerdict(t *testing.T) {
	for name, err := range map[string]error{
		"too many open files":             os.NewSyscallError("socket", syscall.EMFILE),
		"cannot assign requested address": os.NewSyscallError("connect", syscall.EADDRNOTAVAIL), // no local port
		"no space left on device":         os.NewSyscallError("epoll_ctl", syscall.ENOSPC),
	} {
		t.Run(name, func(t *testing.T) { testScarcity(t, &net.OpError{Op: "dial", Err: err}, name) })
	}
}

func testScarcity(t *testing.T, scarcity error, message string) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, scarcity)
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		b := g.members()[0].Backend
		time.Sleep(5500 * time.Millisecond)
		require.Len(t, f.times(one), 6, "it is tried again at the fast interval")
		require.True(t, b.Available())
		require.Zero(t, b.stats.checksFailed.Load()+b.stats.checksPassed.Load())
		require.Contains(t, *b.lastError.Load(), message)

		before := len(f.times(one))
		_, err := connect(g)
		require.ErrorIs(t, err, scarcity)
		synctest.Wait()
		require.Len(t, f.times(one), before+1, "nor does such a connect, which causes no probe")
		require.Contains(t, *b.lastError.Load(), message)
		f.fail(one, errRefused)
		time.Sleep(time.Second)
		require.False(t, b.Available(), "the first result that is one decides alone")
		require.Equal(t, 1, logs.FilterMessage("backend is down").Len())
		g.stop()
		synctest.Wait()
	})
}

func TestFailedConnectTriggersProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		g.start()
		time.Sleep(15 * time.Second)
		f.fail(one, errRefused)
		began := time.Now()
		for range 8 { // connections, without a moment's pause
			l, err := connect(g)
			require.NoError(t, err)
			require.Same(t, g.members()[1].Backend, l.backend)
			l.release()
			synctest.Wait()
		}
		require.False(t, g.members()[0].Backend.Available())
		require.Zero(t, time.Since(began), "found by traffic, not by the interval")
		require.EqualValues(t, 2, g.members()[0].Backend.stats.dialErrors(), "two connects found it")
		require.EqualValues(t, 2, g.members()[0].Backend.stats.retries.Load())
		g.stop()
	})
}

// onOneProcessor is for a bubble in which many timers are due at the same moment: Go
// 1.26 has one race context for all of them, and crashes in the race detector where
// two threads run some.
func onOneProcessor(t *testing.T) {
	before := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
}

func TestChecksAreSpread(t *testing.T) {
	onOneProcessor(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		const n = 100
		g, _ := testGeneration(t, f, func(h *Handler) {
			for i := range n {
				h.Backends = append(h.Backends, BackendConfig{Address: fmt.Sprintf("10.1.%d.%d:80", i/250, i%250)})
			}
		})
		g.start()
		time.Sleep(40 * time.Second)
		g.stop()
		perSecond := make(map[int]int)
		for _, b := range g.members() {
			for _, at := range f.times(b.Backend.address)[2:] {
				perSecond[at.Second()]++
			}
		}
		for second, count := range perSecond {
			require.Less(t, count, n/10*4, "second %d: in step, all would come in one", second)
		}
	})
}

// Backends that were away together come back together, and are not in step.
func TestChecksAreSpreadAfterAnOutage(t *testing.T) {
	onOneProcessor(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		const n = 100
		var addresses []string
		for i := range n {
			addresses = append(addresses, fmt.Sprintf("10.1.0.%d:80", i))
		}
		down(f, addresses...)
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(addresses...) })
		g.start()
		time.Sleep(1500 * time.Millisecond)
		for _, a := range addresses {
			f.fail(a, nil)
		}
		time.Sleep(20 * time.Second) // all are up
		from := time.Now()
		time.Sleep(20 * time.Second)
		g.stop()
		perSecond := make(map[int]int)
		for _, a := range addresses {
			for _, at := range f.times(a) {
				if at.After(from) {
					perSecond[int(at.Sub(from).Seconds())%10]++
				}
			}
		}
		// One or two, were they in step. By chance a second has none in one run of thousands.
		require.GreaterOrEqual(t, len(perSecond), 7)
		for second, count := range perSecond {
			require.Less(t, count, 2*n/10*3, "second %d", second)
		}
	})
}

func TestHealthPortLeavesTheAddressAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one, "db.example:5432")
			h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Port: 8081}}
		})
		g.start()
		synctest.Wait()
		require.Len(t, f.times("10.0.0.1:8081"), 1)
		require.Len(t, f.times("db.example:8081"), 1)
		require.Empty(t, f.times(one))
		l, err := connect(g)
		require.NoError(t, err)
		l.release()
		require.Len(t, f.times(one), 1)
		require.Equal(t, one, g.members()[0].Backend.Address())
		g.stop()
	})
}

func TestReloadKeepsVerdictAndChecker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, errRefused)
		config := func(h *Handler) { h.Backends = backendList(one, two) }
		old, _ := testGeneration(t, f, config)
		old.start()
		time.Sleep(3 * time.Second)
		probes := len(f.times(one))
		next, _ := testGeneration(t, f, func(h *Handler) {
			config(h)
			h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Interval: caddy.Duration(4 * time.Second)}}
		})
		next.start()
		old.stop()
		require.Same(t, old.members()[0].Backend, next.members()[0].Backend)
		require.False(t, next.members()[0].Backend.Available(), "the verdict survives")
		require.Same(t, next.members()[1].Backend, choice(next))
		synctest.Wait()
		require.Len(t, f.times(one), probes, "a reload probes nothing by itself")
		time.Sleep(20 * time.Second)
		require.False(t, f.overlapped())
		times := f.times(one)
		require.Equal(t, 4*time.Second, times[len(times)-1].Sub(times[len(times)-2]), "the new interval holds")
		next.stop()
	})
}

func TestChecksOffBringEveryBackendUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, errRefused)
		old, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		old.start()
		synctest.Wait()
		require.False(t, old.members()[0].Backend.Available())
		next, logs := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one, two)
			h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Disabled: true}}
		})
		next.start()
		old.stop()
		require.True(t, next.members()[0].Backend.Available())
		synctest.Wait()
		require.EqualValues(t, 1, next.members()[0].Backend.stats.turnedUp.Load(), "a transition like any other")
		require.Equal(t, 1, logs.FilterMessage("backend is up").Len())
		before := len(f.times(one)) + len(f.times(two))
		time.Sleep(time.Minute)
		require.Equal(t, before, len(f.times(one))+len(f.times(two)), "no probe any more")
		next.stop()
	})
}

func TestFailedLoadLeavesTheRunningConfigAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		running, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		running.start()
		time.Sleep(15 * time.Second)
		weight := 7
		failed, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = []BackendConfig{{Address: one, Weight: &weight}, {Address: three}}
		})
		failed.start()
		failed.stop() // as when another app of its config does not start
		require.EqualValues(t, 1, running.members()[0].Backend.weight.Load())
		require.Same(t, running, running.pool.newest.Load())
		require.Len(t, running.pool.backends, 2)
		synctest.Wait()
		probes := len(f.times(three))
		time.Sleep(time.Minute)
		require.Len(t, f.times(three), probes, "no probe of the failed config is left")
		running.stop()
	})
}

// Checks that all come late, as after a stop of the process, keep their places in
// the interval: none is more than half of one away from where it was.
func TestLateChecksKeepTheirPlaces(t *testing.T) {
	const interval = 10 * time.Second
	c := new(checker)
	c.settings.Store(&assignment{generation: &generation{checks: checkSettings{interval: interval}}})
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	began := time.Now()
	for late, want := range map[time.Duration]time.Duration{
		0: 10 * time.Second, 3 * time.Second: 7 * time.Second, 6 * time.Second: 14 * time.Second, 37 * time.Second: 13 * time.Second,
	} {
		c.began, c.due = began, began.Add(-late)
		c.next(timer, interval)
		require.Equal(t, want, c.due.Sub(began), "%s late", late)
		c.began, c.due = began, began.Add(-late)
		c.next(timer, time.Second)
		require.Equal(t, time.Second, c.due.Sub(began), "a fast one has its pause")
	}
}
