package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// flood writes to c until nobody takes any more, or the connection has ended.
func flood(t testing.TB, c *net.TCPConn) {
	t.Helper()
	for err := error(nil); !errors.Is(err, os.ErrDeadlineExceeded); {
		require.NoError(t, c.SetWriteDeadline(time.Now().Add(300*time.Millisecond)))
		_, err = c.Write(make([]byte, 1<<20))
		require.True(t, err == nil || errors.Is(err, os.ErrDeadlineExceeded), "%v", err)
	}
}

// floodSmall does the same to sockets that hold little.
func floodSmall(t testing.TB, r *relayed, ways []*net.TCPConn) {
	t.Helper()
	ends := []net.Conn{r.client, r.backend}
	if r.pair != nil {
		ends = append(ends, r.pair.client.base, r.pair.backend.base)
	}
	for _, c := range ends {
		require.NoError(t, c.(*net.TCPConn).SetReadBuffer(4<<10))
		require.NoError(t, c.(*net.TCPConn).SetWriteBuffer(4<<10))
	}
	for _, c := range ways {
		flood(t, c)
	}
}

// stalls runs the test for relays of which one side, the other, or both send
// and nobody reads.
func stalls(t *testing.T, idle time.Duration, test func(t *testing.T, r *relayed, ways []*net.TCPConn)) {
	for _, k := range kinds {
		for _, c := range []struct {
			name string
			ways func(r *relayed) []*net.TCPConn
		}{
			{"up", func(r *relayed) []*net.TCPConn { return []*net.TCPConn{r.client} }},
			{"down", func(r *relayed) []*net.TCPConn { return []*net.TCPConn{r.backend} }},
			{"both ways", func(r *relayed) []*net.TCPConn { return []*net.TCPConn{r.client, r.backend} }},
		} {
			t.Run(k.name+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				r := k.start(t, idle)
				test(t, r, c.ways(r))
			})
		}
	}
}

func TestRelayCutsWhatIsStalled(t *testing.T) {
	stalls(t, 0, func(t *testing.T, r *relayed, ways []*net.TCPConn) {
		for _, c := range ways {
			flood(t, c)
		}
		for range 2 { // the second does nothing
			within(t, func() { r.relay.Cut(drained) }, "cut waits")
		}
		expectReset(t, r.client)
		expectReset(t, r.backend)
		require.Equal(t, drained, r.reason(t))
	})
}

// within fails the test if f does not return.
func within(t testing.TB, f func(), what string) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(hangTimeout):
		require.FailNow(t, what)
	}
}

func TestRelayIdleTimeoutEndsWhatIsStalled(t *testing.T) {
	stalls(t, 300*time.Millisecond, func(t *testing.T, r *relayed, ways []*net.TCPConn) {
		wrote := make(chan error, len(ways))
		for _, c := range ways {
			go func() {
				_, err := c.Write(make([]byte, 256<<20))
				wrote <- err
			}()
		}
		require.Equal(t, IdleTimeout, r.reason(t))
		for range ways {
			require.True(t, IsReset(<-wrote))
		}
	})
}

// Many that are stalled end as one does: none waits for the one before.
func TestRelayCutsManyThatAreStalled(t *testing.T) {
	const many = 1000
	var all []*relayed
	for i := range many {
		r := kinds[i%len(kinds)].start(t, 0)
		all = append(all, r)
	}
	var filling sync.WaitGroup
	for i, r := range all {
		filling.Go(func() {
			floodSmall(t, r, [][]*net.TCPConn{{r.client}, {r.backend}, {r.client, r.backend}}[i%3])
		})
	}
	filling.Wait()
	require.False(t, t.Failed())
	within(t, func() {
		for _, r := range all {
			r.relay.Cut(drained)
		}
	}, "cuts wait for each other")
	for _, r := range all {
		require.Equal(t, drained, r.reason(t))
	}
}

func TestRelayCutBeforeItBegins(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := &relayed{}
		client, nearClient := tcpPair(t)
		defer client.Close()
		backend, nearBackend := tcpPair(t)
		defer backend.Close()
		write(t, client, "too late")
		k.between(t, r, nearClient, nearBackend, 0)
		r.relay.Cut(drained)
		ended := make(chan struct{})
		r.relay.Start(func() { close(ended) })
		within(t, func() { <-ended }, "it does not end")
		require.Equal(t, drained, r.relay.Reason())
		expectReset(t, client)
		expectReset(t, backend)
		require.NotPanics(t, func() { r.relay.Cut(Error) }, "nor does a cut after the end do harm")
		require.Equal(t, drained, r.relay.Reason())
	})
}

// sleeper is a wrapper that is asleep, as in a rate limiter, until it is woken.
type sleeper struct {
	net.Conn
	awake chan struct{}
	in    chan string
}

func (s *sleeper) sleep(where string) {
	select {
	case s.in <- where:
	default:
	}
	<-s.awake
}

func (s *sleeper) Read(b []byte) (int, error) {
	s.sleep("read")
	return s.Conn.Read(b)
}

func (s *sleeper) Write(b []byte) (int, error) {
	s.sleep("write")
	return s.Conn.Write(b)
}

// A wrapper that is asleep does not keep the peers from seeing a cut.
func TestRelayCutsAroundASleeper(t *testing.T) {
	for _, asleep := range []string{"read", "write"} {
		t.Run(asleep, func(t *testing.T) {
			s := &sleeper{awake: make(chan struct{}), in: make(chan string, 10)}
			r := startRelay(t, 0, func(c net.Conn) net.Conn {
				s.Conn = c
				return s
			})
			write(t, r.backend, "x")
			seen := map[string]bool{}
			within(t, func() {
				for len(seen) < 2 {
					seen[<-s.in] = true
				}
			}, "asleep both ways")
			within(t, func() { r.relay.Cut(drained) }, "cut waits")
			expectReset(t, r.client)
			expectReset(t, r.backend)
			require.Empty(t, r.why, "it has not ended as long as its wrapper is in use")
			close(s.awake)
			require.Equal(t, drained, r.reason(t))
		})
	}
}

// A reset of one side ends the other although the way there is stalled.
func TestRelayResetWhileTheOtherWayIsStalled(t *testing.T) {
	variants(t, func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool) {
		flood(t, b) // a reads nothing of it
		require.NoError(t, a.SetLinger(0))
		require.NoError(t, a.Close())
		expectReset(t, b)
		require.Equal(t, pickReason(aIsClient, ClientReset, BackendReset), r.reason(t))
	})
}

// A look now and then finds that who sends has reset although nobody reads from
// it, while what it sent before is stuck. Then the receiver has a time.
func TestRelayResetWhileItsOwnWayIsStalled(t *testing.T) {
	requireUnsent(t)
	variants(t, func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool) {
		flood(t, a) // b reads nothing of it
		moved := func() uint64 { return r.received.Load() + r.sent.Load() }
		eventually(t, func() bool {
			before := moved()
			flood(t, a)
			return moved() == before
		}, "a stall")
		look := func() {
			if r.pair != nil { // a loop is told
				r.pair.onTimer()
			}
		}
		look()
		require.Equal(t, None, r.relay.Reason(), "nothing is wrong with a receiver that is slow")
		require.NoError(t, a.SetLinger(0))
		require.NoError(t, a.Close())
		why := pickReason(aIsClient, ClientReset, BackendReset)
		eventually(t, func() bool {
			look()
			return r.relay.Reason() == why
		}, "it is found")
		if r.pair != nil {
			to := &r.pair.backend
			if !aIsClient {
				to = &r.pair.client
			}
			d := r.awaited(t)
			deliveries.mu.Lock()
			got := d.to
			deliveries.mu.Unlock()
			require.Same(t, to, got)
		}
		expectReset(t, b)
		require.Equal(t, why, r.reason(t))
	})
}

// sealed is a wrapper that nothing can look into, and that can't half-close.
type sealed struct{ inner net.Conn }

func (s sealed) Read(b []byte) (int, error)         { return s.inner.Read(b) }
func (s sealed) Write(b []byte) (int, error)        { return s.inner.Write(b) }
func (s sealed) Close() error                       { return s.inner.Close() }
func (s sealed) LocalAddr() net.Addr                { return s.inner.LocalAddr() }
func (s sealed) RemoteAddr() net.Addr               { return s.inner.RemoteAddr() }
func (s sealed) SetDeadline(t time.Time) error      { return s.inner.SetDeadline(t) }
func (s sealed) SetReadDeadline(t time.Time) error  { return s.inner.SetReadDeadline(t) }
func (s sealed) SetWriteDeadline(t time.Time) error { return s.inner.SetWriteDeadline(t) }

// Where no layer can half-close, the other side gets all there is and an end.
func TestRelayEndsWhatItCantHalfClose(t *testing.T) {
	r := startRelay(t, 0, func(c net.Conn) net.Conn { return sealed{c} })
	answer := strings.Repeat("answer", 50_000)
	go func() {
		_, _ = io.WriteString(r.backend, answer)
		_ = r.backend.CloseWrite()
	}()
	expect(t, r.client, answer)
	expectEOF(t, r.client)
	require.Equal(t, BackendClosed, r.reason(t))
	expectEOF(t, r.backend)
	require.EqualValues(t, len(answer), r.sent.Load())
}

// mute is a wrapper whose goodbye fails, as that of TLS where the receiver takes
// nothing for a while.
type mute struct{ net.Conn }

func (mute) CloseWrite() error { return os.ErrDeadlineExceeded }

func TestRelayHalfClosesBelowALayerThatFails(t *testing.T) {
	r := startRelay(t, 0, func(c net.Conn) net.Conn { return mute{c} })
	write(t, r.backend, "all there is")
	require.NoError(t, r.backend.CloseWrite())
	expect(t, r.client, "all there is")
	expectEOF(t, r.client)
	write(t, r.client, "the other way goes on")
	require.NoError(t, r.client.CloseWrite())
	expect(t, r.backend, "the other way goes on")
	expectEOF(t, r.backend)
	require.Equal(t, BackendClosed, r.reason(t))
}

// clumsy is a wrapper that nothing can look into, and whose deadlines block.
type clumsy struct {
	sealed
	free chan struct{}
}

func (c clumsy) SetDeadline(t time.Time) error {
	<-c.free
	return c.sealed.SetDeadline(t)
}

func TestRelayCutsAroundABlockingDeadline(t *testing.T) {
	free := make(chan struct{})
	r := startRelay(t, 0, func(c net.Conn) net.Conn { return clumsy{sealed{c}, free} })
	defer close(free) // before what waits for the relay
	within(t, func() { r.relay.Cut(drained) }, "cut waits")
	expectReset(t, r.backend)
}
