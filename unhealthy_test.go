package tcplb

import (
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// closing has connections cut so long after their backend went down; none is off.
func closing(after ...time.Duration) func(*Handler) {
	return func(h *Handler) {
		h.Backends = backendList(one, two)
		for _, d := range after {
			h.CloseIfUnhealthy = duration64(d)
		}
	}
}

// fakeRelay is one that ends when it is cut.
type fakeRelay struct {
	cut   func(reason)
	ended atomic.Bool
}

func (*fakeRelay) Start(func()) {}

func (r *fakeRelay) Cut(why relay.Reason) {
	if !r.ended.Swap(true) {
		r.cut(reason(why))
	}
}

func (*fakeRelay) Reason() relay.Reason     { return relay.None }
func (*fakeRelay) Moved() (up, down uint64) { return 0, 0 }
func (*fakeRelay) Idle() time.Duration      { return 0 }
func (*fakeRelay) Err() error               { return nil }

// openSession is a session of b with a relay over pipes, and the client's end.
func openSession(t testing.TB, g *generation, b *Backend) (*session, chan reason) {
	t.Helper()
	ended := make(chan reason, 1)
	require.Equal(t, wasTaken, b.take())
	s := &session{pool: g.pool, began: time.Now(), link: link{backend: b}}
	s.relay = &fakeRelay{cut: func(why reason) {
		b.leave(s, why, 0)
		b.release()
		ended <- why
	}}
	if why := b.enter(s); why != reasonNone {
		s.end(why)
	}
	return s, ended
}

func TestConnectionsOfADownBackend(t *testing.T) {
	for name, c := range map[string]struct {
		after []time.Duration
		want  time.Duration // from going down to the cut; 0 = not cut
	}{
		"off":     {nil, 0},
		"at once": {[]time.Duration{0}, time.Nanosecond},
		"later":   {[]time.Duration{5 * time.Second}, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeNet()
				g, logs := testGeneration(t, f, closing(c.after...))
				g.start()
				time.Sleep(15 * time.Second)
				b := g.members()[0].Backend
				s, ended := openSession(t, g, b)
				_, other := openSession(t, g, g.members()[1].Backend)
				f.fail(one, errRefused)
				b.checkSoon()
				synctest.Wait()
				b.checkSoon()
				synctest.Wait()
				if b.healthy.Load() { // its second failure is a moment later
					time.Sleep(suspectSpacing)
					synctest.Wait()
				}
				require.False(t, b.Available())
				switch {
				case c.want == 0:
					time.Sleep(time.Hour)
					synctest.Wait()
					require.Empty(t, ended)
					s.end(reasonKilled)
				case c.want > time.Nanosecond:
					time.Sleep(c.want - time.Second)
					synctest.Wait()
					require.Empty(t, ended, "not yet")
					time.Sleep(time.Second)
					fallthrough
				default:
					synctest.Wait()
					require.Len(t, ended, 1)
					require.Equal(t, reasonBackendDown, <-ended)
					require.Equal(t, 1, logs.FilterMessage("backend is down, cut its connections").Len())
					_, late := openSession(t, g, b)
					require.Equal(t, reasonBackendDown, <-late, "one that was connecting meanwhile is over at once")
				}
				require.Empty(t, other, "the other backend's go on")
				for s := range g.members()[1].Backend.sessions.all() {
					s.end(reasonKilled)
				}
				g.stop()
				synctest.Wait()
			})
		})
	}
}

// One that comes back in time keeps its connections.
func TestBackendIsBackBeforeItsConnectionsAreCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, closing(time.Minute))
		f.fail(one, errRefused)
		g.start()
		synctest.Wait()
		b := g.members()[0].Backend
		require.False(t, b.Available())
		s, ended := openSession(t, g, b) // it was connecting
		f.fail(one, nil)
		time.Sleep(30 * time.Second)
		require.True(t, b.Available())
		time.Sleep(time.Hour)
		require.Empty(t, ended)
		s.end(reasonKilled)
		g.stop()
		synctest.Wait()
	})
}

// A reload may call a cut off, or order one, also of a backend that has been down
// for long.
func TestReloadChangesWhatADownBackendDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, errRefused)
		g, _ := testGeneration(t, f, closing(time.Minute))
		next := func(after ...time.Duration) {
			old := g
			g, _ = testGeneration(t, f, closing(after...))
			g.start()
			old.stop()
			synctest.Wait()
		}
		g.start()
		synctest.Wait()
		b := g.members()[0].Backend
		_, ended := openSession(t, g, b)
		time.Sleep(59 * time.Second)
		next()
		time.Sleep(time.Hour)
		require.Empty(t, ended, "called off")
		next(2 * time.Hour)
		time.Sleep(59*time.Minute - 2*time.Second)
		require.Empty(t, ended)
		time.Sleep(5 * time.Second)
		require.Equal(t, reasonBackendDown, <-ended, "two hours after it went down")
		_, ended = openSession(t, g, b)
		require.Equal(t, reasonBackendDown, <-ended)
		next(3 * time.Hour)
		_, ended = openSession(t, g, b)
		require.Empty(t, ended)
		next(0)
		require.Equal(t, reasonBackendDown, <-ended, "at once, as it is down")
		g.stop()
		synctest.Wait()
	})
}

func TestInitiallyUnhealthy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var passes atomic.Bool
		passes.Store(true)
		tell(t, t.Name(), func(ctx context.Context, _ checks.Target) error {
			pause(time.Second, ctx.Done())
			if !passes.Load() {
				return errors.New("not yet")
			}
			return nil
		})
		f := newFakeNet()
		doubting := func(a *ActiveHealthChecks) { a.InitiallyUnhealthy = true }
		g, logs := testGeneration(t, f, askedBy(t.Name(), doubting, one))
		g.start()
		b := g.members()[0].Backend
		require.False(t, b.Available())
		require.Nil(t, choice(g))
		require.Zero(t, b.stats.turnedDown.Load(), "it has not gone down")
		time.Sleep(time.Second)
		synctest.Wait()
		require.True(t, b.Available())
		require.Same(t, b, choice(g))
		require.Equal(t, 1, logs.FilterMessage("backend is up").Len())
		require.Zero(t, logs.FilterMessage("no backend is available, clients are turned away or wait").Len(), "no outage: nothing is known yet")

		old := g
		passes.Store(false)
		g, logs = testGeneration(t, f, askedBy(t.Name(), doubting, one, two))
		g.start()
		old.stop()
		require.True(t, b.Available(), "a reload leaves those that there are")
		second := g.members()[1].Backend
		require.False(t, second.Available())
		time.Sleep(time.Second)
		synctest.Wait()
		require.False(t, second.Available())
		require.Equal(t, 1, logs.FilterMessage("backend is down").Len(), "its first check tells")
		require.EqualValues(t, 1, second.stats.turnedDown.Load())
		require.Equal(t, "not yet", *second.lastError.Load())

		setState(t, t.Name(), two, stateMaint)
		passes.Store(true)
		setState(t, t.Name(), two, stateReady)
		require.False(t, second.Available(), "back from maintenance it is new")
		time.Sleep(3 * time.Second) // a check that was under way comes first
		synctest.Wait()
		require.True(t, second.Available())
		g.stop()
		synctest.Wait()
	})
}

// passive has failures of connections take backends out; checks are off.
func passive(fails int, d time.Duration, addresses ...string) func(*Handler) {
	return func(h *Handler) {
		h.Backends = backendList(addresses...)
		checksOff(h)
		h.passiveChecks().MaxFails = fails
		h.passiveChecks().FailDuration = caddy.Duration(d)
	}
}

func TestEjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, passive(3, 10*time.Second, one, two))
		g.start()
		b := g.members()[0].Backend
		f.fail(one, errRefused)
		for i := range 2 {
			l, err := connect(g)
			require.NoError(t, err)
			l.release()
			require.True(t, b.Available(), "failure %d", i+1)
			time.Sleep(4 * time.Second)
		}
		time.Sleep(3 * time.Second) // the first counts no more
		b.failed("x")
		require.True(t, b.Available())
		b.failed("x")
		require.False(t, b.Available())
		require.True(t, b.healthy.Load(), "no check has said so")
		require.EqualValues(t, 1, b.stats.ejections.Load())
		require.Equal(t, 1, logs.FilterMessage("backend fails clients, it is taken out for a while").Len())
		for range 4 {
			require.Same(t, g.members()[1].Backend, choice(g))
		}
		time.Sleep(10*time.Second - time.Millisecond)
		require.False(t, b.Available())
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		require.True(t, b.Available())
		require.Equal(t, 1, logs.FilterMessage("backend takes connections again, its time out is over").Len())
		seen := map[*Backend]bool{choice(g): true, choice(g): true}
		require.Len(t, seen, 2)
		g.stop()
		synctest.Wait()
	})
}

func TestTheLastBackendIsNotEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, func(h *Handler) {
			passive(1, time.Minute, one, two)(h)
			h.HealthChecks.Active.Disabled = false
		})
		g.start()
		synctest.Wait()
		first, second := g.members()[0].Backend, g.members()[1].Backend
		first.failed("x")
		require.False(t, first.Available())
		for range 3 {
			second.failed("x")
			require.True(t, second.Available(), "no other is left")
		}
		require.Equal(t, 1, logs.FilterMessage("backend fails clients, and stays as no other is available").Len())

		// But the other is back then, after a second at least.
		require.False(t, first.Available())
		time.Sleep(time.Second)
		second.failed("x")
		require.True(t, first.Available() && second.Available())
		first.failed("x")
		require.False(t, first.Available(), "and may be out again")

		// Nor do checks leave none, while one is out that they find up.
		f.fail(two, errRefused)
		time.Sleep(12 * time.Second)
		require.False(t, second.Available())
		require.True(t, first.Available(), "before its time")
		require.Same(t, first, choice(g))
		require.Equal(t, 1, logs.FilterMessage("backend takes connections again, as no other is available").Len())
		f.fail(two, nil)
		time.Sleep(12 * time.Second)

		// Nor does an operator.
		first.failed("x")
		require.False(t, first.Available())
		setState(t, t.Name(), two, stateDrain)
		require.True(t, first.Available())
		setState(t, t.Name(), two, stateReady)
		g.stop()
		synctest.Wait()
	})
}

func TestEjectionEndsWithItsConfig(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, passive(1, time.Hour, one, two))
		g.start()
		b := g.members()[0].Backend
		b.failed("x")
		require.False(t, b.Available())
		next, _ := testGeneration(t, f, passive(1, time.Minute, one, two))
		next.start()
		g.stop()
		require.False(t, b.Available(), "a reload keeps it")
		last, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two); checksOff(h) })
		last.start()
		next.stop()
		require.True(t, b.Available())
		b.failed("x")
		require.True(t, b.Available(), "without fail_duration nothing is counted")
		last.stop()
		synctest.Wait()
	})
}

// What the backend does to connections counts, what clients do does not.
func TestWhatCountsAsAFailure(t *testing.T) {
	for name, c := range map[string]struct {
		backend func(*net.TCPConn)
		client  func(testing.TB, *net.TCPConn)
		fails   bool
	}{
		"reset before a byte": {func(c *net.TCPConn) { _ = c.SetLinger(0) }, nil, true},
		"closed at once":      {func(*net.TCPConn) {}, nil, true},
		"reset after a byte": {func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "x")
			_, _ = io.ReadFull(c, make([]byte, 1))
			_ = c.SetLinger(0)
		}, func(t testing.TB, c *net.TCPConn) { expect(t, c, "x"); write(t, c, "x") }, false},
		"closed after a byte":  {func(c *net.TCPConn) { _, _ = io.WriteString(c, "x") }, nil, false},
		"closed by the client": {echoConn, func(_ testing.TB, c *net.TCPConn) { _ = c.Close() }, false},
		"reset by the client":  {echoConn, func(_ testing.TB, c *net.TCPConn) { _ = c.SetLinger(0); _ = c.Close() }, false},
	} {
		t.Run(name, func(t *testing.T) {
			bad, good := startServer(t, c.backend), startServer(t, c.backend)
			lb := freeAddress(t)
			noPoolsYet(t)
			runCaddy(t, lbConfig("tcp_lb/"+lb, `"name":"web",`+backendsJSON(bad.address, good.address)+
				`,"health_checks":{"active":{"disabled":true},"passive":{"fail_duration":"1h"}}}`))
			if conn, err := net.Dial("tcp", lb); err == nil { // else it was reset by then
				if c.client != nil {
					c.client(t, conn.(*net.TCPConn))
				}
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
			g := registry.newest("web")
			eventually(t, func() bool { return g.pool.active.Load() == 0 && bad.acceptedCount()+good.acceptedCount() == 1 }, "the end")
			ejected := 0
			for _, m := range g.members() {
				if !m.Backend.Available() {
					ejected++
				}
			}
			require.Equal(t, c.fails, ejected == 1, "%d", ejected)
		})
	}
}

func echoConn(c *net.TCPConn) { echo(c) }
