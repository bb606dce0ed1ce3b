package tcplb

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/stretchr/testify/require"
)

// stuckHandler handles events, once it is let go.
type stuckHandler struct {
	called chan string
	goOn   chan struct{}
}

func newStuckHandler() *stuckHandler {
	return &stuckHandler{called: make(chan string, 100), goOn: make(chan struct{})}
}

func (h *stuckHandler) Handle(_ context.Context, e caddy.Event) error {
	h.called <- e.Name()
	<-h.goOn
	return nil
}

// seen returns the events that it was called with, since it was last asked.
func (h *stuckHandler) seen() (names []string) {
	synctest.Wait()
	for len(h.called) > 0 {
		names = append(names, <-h.called)
	}
	return names
}

// handleEvents has h called for the generation's events. It returns what ends
// the generation's config.
func handleEvents(t *testing.T, g *generation, h caddyevents.Handler) context.CancelFunc {
	t.Helper()
	ctx, cancel := caddy.NewContext(g.ctx)
	app := new(caddyevents.App)
	require.NoError(t, app.Provision(ctx))
	require.NoError(t, app.On("healthy", h))
	require.NoError(t, app.On("unhealthy", h))
	require.NoError(t, app.On("state_changed", h))
	require.NoError(t, app.Start())
	g.ctx, g.events = ctx, app
	return func() { cancel() }
}

// turn takes the backend down, or brings it up.
func turn(t *testing.T, f *fakeNet, b *Backend, err error) {
	t.Helper()
	f.fail(b.address, err)
	for range 2 {
		b.checkSoon()
		b.probeWanted()
		time.Sleep(wantedSpacing)
		synctest.Wait()
	}
	require.Equal(t, err == nil, b.Available())
}

// An event handler that blocks holds up neither the checks of its backend nor
// the end of its config, and what waits for it is bounded.
func TestEventHandlerBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		h := newStuckHandler()
		end := handleEvents(t, g, h)
		g.start()
		time.Sleep(15 * time.Second)
		b, other := g.members()[0].Backend, g.members()[1].Backend
		turn(t, f, b, errRefused)
		require.Equal(t, []string{"unhealthy"}, h.seen())
		for range maxEvents {
			turn(t, f, b, nil)
			turn(t, f, b, errRefused)
		}
		require.Empty(t, h.seen(), "one at a time")
		require.Len(t, b.events.waiting, maxEvents)
		require.EqualValues(t, 1+2*maxEvents, b.stats.turnedUp.Load()+b.stats.turnedDown.Load(), "checks go on")
		require.Equal(t, maxEvents, logs.FilterMessageSnippet("dropped the oldest events").Len())

		turn(t, f, other, errRefused)
		require.Equal(t, []string{"unhealthy"}, h.seen(), "another backend's events don't wait")
		close(h.goOn)
		var want []string
		for range maxEvents / 2 {
			want = append(want, "healthy", "unhealthy")
		}
		require.Equal(t, want, h.seen(), "in order, up to the last")
		turn(t, f, b, nil)
		require.Equal(t, []string{"healthy"}, h.seen())

		h.goOn = make(chan struct{})
		turn(t, f, b, errRefused)
		turn(t, f, b, nil)
		require.Equal(t, []string{"unhealthy"}, h.seen())
		g.stop() // waits for nothing
		end()
		close(h.goOn)
		require.Empty(t, h.seen(), "no event of a config that has ended")
		require.Nil(t, b.events.emitting)
	})
}

// The next config's handlers get what the last one's are too slow for.
func TestNextConfigTakesEventsOver(t *testing.T) {
	for name, blocks := range map[string]bool{"handler goes on": false, "handler blocks": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testEventsTakenOver(t, blocks) })
		})
	}
}

func testEventsTakenOver(t *testing.T, blocks bool) {
	f := newFakeNet()
	config := func(h *Handler) { h.Backends = backendList(one) }
	old, _ := testGeneration(t, f, config)
	slow := newStuckHandler()
	end := handleEvents(t, old, slow)
	old.start()
	time.Sleep(15 * time.Second)
	b := old.members()[0].Backend
	turn(t, f, b, errRefused)
	turn(t, f, b, nil)
	require.Equal(t, []string{"unhealthy"}, slow.seen())

	next, _ := testGeneration(t, f, config)
	h := newStuckHandler()
	close(h.goOn)
	handleEvents(t, next, h)
	next.start()
	old.stop()
	end()
	if blocks {
		turn(t, f, b, errRefused)
		require.Equal(t, []string{"healthy", "unhealthy"}, h.seen(), "it is not waited for")
		close(slow.goOn)
	} else {
		close(slow.goOn)
		require.Equal(t, []string{"healthy"}, h.seen())
		turn(t, f, b, errRefused)
		require.Equal(t, []string{"unhealthy"}, h.seen())
	}
	require.Empty(t, slow.seen())
	require.Nil(t, b.events.emitting)
	next.stop()
}

// hookError calls its hook when it is first looked at, which the checker does
// when a probe has failed.
type hookError struct {
	once *sync.Once
	hook func()
}

func (e hookError) Error() string { return "refused" }

func (e hookError) Is(error) bool {
	e.once.Do(e.hook)
	return false
}

// A probe that fails just as the checks are turned off changes nothing any more:
// no further one could bring the backend up again.
func TestProbeEndsAsChecksAreTurnedOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		old, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		next, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			checksOff(h)
		})
		off := func() {
			next.start()
			old.stop()
		}
		f.fail(one, hookError{once: new(sync.Once), hook: off})
		old.start()
		synctest.Wait()
		require.Same(t, next, next.pool.newest.Load(), "it happened")
		require.True(t, next.members()[0].Backend.Available())
		require.NotNil(t, choice(next))
		require.Zero(t, next.members()[0].Backend.stats.turnedDown.Load())
		require.Zero(t, logs.FilterMessage("backend is down").Len())
		next.stop()
	})
}

// The same as the backend's last config goes and a late connection brings the
// backend back, in another pool of the name; the race detector watches.
func TestProbeEndsAsItsBackendChangesPools(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
	adopted := make(chan *Backend, 1)
	away := func() {
		b := g.members()[0].Backend
		g.stop()
		before := runtime.NumGoroutine()
		go func() { adopted <- registry.adopt(b) }()
		// Most likely it has by then, and nothing of it synchronised with this.
		for i := 0; i < 1_000_000 && runtime.NumGoroutine() > before; i++ {
			runtime.Gosched()
		}
	}
	f.fail(one, hookError{once: new(sync.Once), hook: away})
	g.start()
	b := <-adopted
	<-b.checker.done
	require.True(t, b.Available())
	require.Same(t, registry.pools[g.name], b.pool)
	registry.retire(b)
	require.NotContains(t, registry.pools, g.name)
}
