package tcplb

import (
	"context"
	"fmt"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// connect is what a client's goroutine does, without a client to look at.
func connect(g *generation) (link, error) {
	g.pool.active.Add(1)
	defer g.pool.leave()
	s := search{pool: g.pool, request: Request{client: &net.TCPAddr{}}, began: time.Now()}
	_, err := s.find(g)
	return s.link, err
}

// Without a config, the drain timeout is the end of a search, also between two
// connects, when it holds no backend.
func TestSearchEndsWithTheDrainTimeout(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		var all []string
		for i := range 6 {
			all = append(all, fmt.Sprintf("10.0.0.%d:80", i+1))
		}
		f.hang(all...)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(all...)
			h.LoadBalancing = &LoadBalancing{Retries: new(5)}
			h.DrainTimeout = new(caddy.Duration(4 * time.Second))
			checksOff(h)
		})
		g.start()
		began := time.Now()
		time.AfterFunc(time.Second, g.stop)
		l, err := connect(g)
		require.ErrorIs(t, err, errAbandoned)
		require.Equal(t, 5*time.Second, time.Since(began))
		require.Equal(t, 2, l.attempts)
		require.Empty(t, registry.snapshot(), "and that of its pool")
	})
}

// A client whose connect is under way when its backend leaves the config gets
// one that is in it.
func TestConnectMovesOnFromARemovedBackend(t *testing.T) {
	for _, drain := range []time.Duration{0, time.Hour} {
		t.Run(drain.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeNet()
				f.latency = 60 * time.Millisecond
				run := func(address string) *generation {
					g, _ := testGeneration(t, f, func(h *Handler) {
						h.Backends = backendList(address)
						h.DrainTimeout = new(caddy.Duration(drain))
						checksOff(h)
					})
					return g
				}
				before, after := run(one), run(two)
				before.start()
				time.AfterFunc(30*time.Millisecond, func() {
					after.start()
					before.stop()
				})
				l, err := connect(before)
				require.NoError(t, err)
				require.Equal(t, two, l.backend.address)
				require.Equal(t, 1, l.attempts)
				l.release()
				after.stop()
			})
		})
	}
}

// A listener that ends as another takes its place may reset the first probe,
// which must not decide by that.
func TestFirstProbeThatIsResetIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.fail(one, syscall.ECONNRESET)
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		defer g.stop()
		b := g.members()[0].Backend
		synctest.Wait()
		require.Equal(t, "unchecked", b.health())
		f.fail(one, nil)
		time.Sleep(wantedSpacing)
		synctest.Wait()
		require.Equal(t, "up", b.health())
		require.Zero(t, b.stats.turnedDown.Load())

		f.fail(two, syscall.ECONNRESET)
		other, _ := testGeneration(t, f, func(h *Handler) { h.Name = "other"; h.Backends = backendList(two) })
		other.start()
		defer other.stop()
		time.Sleep(wantedSpacing)
		synctest.Wait()
		require.Equal(t, "down", other.members()[0].Backend.health(), "the second decides")
	})
}

// An outage ends when a check has found a backend up, not with a config of
// others of which nothing is known.
func TestOutageGoesOnOverAReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.latency = time.Millisecond
		down(f, one, two)
		first, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		first.start()
		time.Sleep(time.Second)
		require.Equal(t, 1, logs.FilterMessageSnippet("no backend is available").Len())
		second, more := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(two) })
		again := func() int { return more.FilterMessageSnippet("available again").Len() }
		second.start()
		first.stop()
		time.Sleep(time.Second)
		require.Zero(t, again())
		f.fail(two, nil)
		time.Sleep(time.Minute)
		require.Equal(t, 1, again())
		second.stop()
	})
}

// A backend that closes at once and says nothing is told apart from one that
// took its time, as who only receives, or rests, does.
func TestBackendClosedEarly(t *testing.T) {
	for after, want := range map[time.Duration]reason{
		0:              reasonBackendClosedEarly,
		earlyClose / 2: reasonBackendClosedEarly,
		2 * earlyClose: reasonBackendClosed,
	} {
		synctest.Test(t, func(t *testing.T) {
			g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
			g.dial = func(context.Context, target, time.Duration) (net.Conn, error) {
				c, server := net.Pipe()
				time.AfterFunc(after, func() { _ = server.Close() })
				return c, nil
			}
			g.start()
			far, near := net.Pipe()
			g.serve(layer4Connection(near))
			_ = far.Close()
			require.EqualValues(t, 1, g.members()[0].Backend.stats.closed[want].Load(), "closed after %s", after)
			g.stop()
		})
	}
}
