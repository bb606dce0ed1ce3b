package relay

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// relayed is a relay between two socket pairs: what the test holds are the far
// ends.
type relayed struct {
	client, backend *net.TCPConn
	relay           Relay
	pair            *Pair // nil: it is on a loop
	received, sent  atomic.Uint64
	why             chan Reason
}

// kind is a way to relay, between bare sockets or wrapped ones.
type kind struct {
	name string
	wrap func(net.Conn) net.Conn // nil: bare
	// looped makes a relay on a loop, and takes the sockets over; nil: it is a Pair.
	looped func(t testing.TB, client, backend net.Conn, o Options) Relay

	lifetime time.Duration // of its relays
}

// kinds are those that behave alike. Where there are loops, there is one more.
var kinds = []kind{{name: "bare"}, {name: "wrapped", wrap: hide}}

// eachKind runs the test for all of them.
func eachKind(t *testing.T, test func(t *testing.T, k kind)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { test(t, k) })
	}
}

func startRelay(t testing.TB, idle time.Duration, wrap func(net.Conn) net.Conn) *relayed {
	t.Helper()
	return kind{wrap: wrap}.start(t, idle)
}

func (k kind) start(t testing.TB, idle time.Duration) *relayed {
	t.Helper()
	r := &relayed{why: make(chan Reason, 1)}
	var nearClient, nearBackend net.Conn
	r.client, nearClient = tcpPair(t)
	r.backend, nearBackend = tcpPair(t)
	k.between(t, r, nearClient, nearBackend, idle)
	done := make(chan struct{})
	r.relay.Start(func() {
		if r.pair != nil {
			_ = nearClient.Close()
			_ = nearBackend.Close()
		}
		r.why <- r.relay.Reason()
		close(done)
	})
	t.Cleanup(func() {
		_ = r.client.Close()
		_ = r.backend.Close()
		select {
		case <-done:
		case <-time.After(hangTimeout):
			t.Error("the relay hangs")
		}
	})
	return r
}

// between makes the relay, but doesn't start it.
func (k kind) between(t testing.TB, r *relayed, nearClient, nearBackend net.Conn, idle time.Duration) {
	t.Helper()
	o := Options{
		IdleTimeout: idle,
		Lifetime:    k.lifetime,
		Up:          &r.received,
		Down:        &r.sent,
		OnPanic:     func(v any, stack []byte) { t.Errorf("panic: %v\n%s", v, stack) },
	}
	if k.looped != nil {
		r.relay = k.looped(t, nearClient, nearBackend, o)
		return
	}
	if k.wrap != nil {
		nearClient = k.wrap(nearClient)
	}
	r.pair = New(nearClient, nearBackend, o)
	r.relay = r.pair
}

func (r *relayed) reason(t testing.TB) Reason {
	t.Helper()
	select {
	case why := <-r.why:
		return why
	case <-time.After(hangTimeout):
		require.FailNow(t, "the relay does not end")
		return None
	}
}

// opaque hides a socket the way a wrapper does: neither CloseWrite nor splice.
type opaque struct{ net.Conn }

func hide(c net.Conn) net.Conn { return opaque{c} }

// variants runs the test over all kinds, and from both sides.
func variants(t *testing.T, test func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool)) {
	eachKind(t, func(t *testing.T, k kind) {
		t.Run("client", func(t *testing.T) {
			r := k.start(t, 0)
			test(t, r, r.client, r.backend, true)
		})
		t.Run("backend", func(t *testing.T) {
			r := k.start(t, 0)
			test(t, r, r.backend, r.client, false)
		})
	})
}

func pickReason(client bool, ifClient, ifBackend Reason) Reason {
	if client {
		return ifClient
	}
	return ifBackend
}

func TestRelayHalfClose(t *testing.T) {
	variants(t, func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool) {
		write(t, a, "question")
		require.NoError(t, a.CloseWrite())
		expect(t, b, "question")
		expectEOF(t, b)
		write(t, b, "a long answer")
		expect(t, a, "a long answer")
		require.NoError(t, b.Close())
		expectEOF(t, a)
		require.Equal(t, pickReason(aIsClient, ClientClosed, BackendClosed), r.reason(t))
	})
}

func TestRelayReset(t *testing.T) {
	variants(t, func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool) {
		write(t, a, "hello")
		expect(t, b, "hello")
		require.NoError(t, a.SetLinger(0))
		require.NoError(t, a.Close())
		expectReset(t, b)
		require.Equal(t, pickReason(aIsClient, ClientReset, BackendReset), r.reason(t))
	})
}

// What was read before a reset arrives before the reset: all of it, although
// the receiver takes its time.
func TestRelayDeliversBeforeReset(t *testing.T) {
	variants(t, func(t *testing.T, r *relayed, a, b *net.TCPConn, _ bool) {
		const size = 300 << 10
		sent := make([]byte, size)
		fill(sent)
		_, err := a.Write(sent)
		require.NoError(t, err)
		eventually(t, func() bool { return r.received.Load()+r.sent.Load() == size }, "the relay takes it all")
		require.NoError(t, a.SetLinger(0))
		require.NoError(t, a.Close())
		got, err := io.ReadAll(b)
		require.ErrorIs(t, err, syscall.ECONNRESET, "not an end of file")
		require.True(t, bytes.Equal(sent, got), "%d of %d bytes", len(got), size)
	})
}

// A reset that first shows in a write must not look like an end of file to the
// other direction.
func TestRelayResetSeenByWriter(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		for range 30 {
			r := k.start(t, 0)
			a, b := r.client, r.backend
			// The relay is stuck in a write to a, which does not read.
			require.NoError(t, b.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
			_, err := b.Write(make([]byte, 64<<20))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.NoError(t, a.SetLinger(0))
			require.NoError(t, a.Close())
			expectReset(t, b)
			require.Equal(t, ClientReset, r.reason(t))
		}
	})
}

func TestRelayLongStreamsBothWays(t *testing.T) {
	const size = 20 << 20
	data := make([]byte, size)
	fill(data)
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		results := make(chan error, 4)
		for _, c := range []*net.TCPConn{r.client, r.backend} {
			go func() {
				_, err := c.Write(data)
				results <- errors.Join(err, c.CloseWrite())
			}()
			go func() {
				got, err := io.ReadAll(c)
				if err == nil && !bytes.Equal(got, data) {
					err = errors.New("other bytes")
				}
				results <- err
			}()
		}
		for range cap(results) {
			require.NoError(t, <-results)
		}
		require.True(t, r.reason(t).Orderly())
		require.EqualValues(t, size, r.received.Load())
		require.EqualValues(t, size, r.sent.Load())
		up, down := r.relay.Moved()
		require.EqualValues(t, size, up)
		require.EqualValues(t, size, down)
	})
}

// Small and large writes in turn go in and out of bulk mode.
func TestRelayMixedSizes(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		rnd := rand.New(rand.NewPCG(3, 4))
		for range 300 {
			n := 1 + rnd.IntN(100)
			if rnd.IntN(3) == 0 {
				n = 1 + rnd.IntN(1<<20)
			}
			sent := make([]byte, n)
			fill(sent)
			errs := make(chan error, 1)
			go func() {
				_, err := r.client.Write(sent)
				errs <- err
			}()
			got := make([]byte, n)
			_, err := io.ReadFull(r.backend, got)
			require.NoError(t, err)
			require.NoError(t, <-errs)
			require.True(t, bytes.Equal(sent, got))
		}
		require.NoError(t, r.client.Close())
		require.NoError(t, r.backend.Close())
		require.True(t, r.reason(t).Orderly())
		up, _ := r.relay.Moved()
		require.Equal(t, r.received.Load(), up)
	})
}

// A reader that never reads stops the writer, and takes no more than the
// sockets and one buffer or pipe hold.
func TestRelayBackpressure(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		_ = r.client.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := r.client.Write(make([]byte, 256<<20))
		require.Error(t, err, "the writer is stopped")
		require.Less(t, n, 64<<20)
		write(t, r.backend, "the other way is free")
		expect(t, r.client, "the other way is free")
	})
}

// Whoever else has one of the sockets may close it, too: nothing is left open.
func TestRelayOfWhatAnotherCloses(t *testing.T) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{"bare": nil, "wrapped": hide} {
		for _, client := range []bool{true, false} {
			t.Run(name+"/"+map[bool]string{true: "client", false: "backend"}[client], func(t *testing.T) {
				r := startRelay(t, 0, wrap)
				closed, other := r.pair.client.base, r.backend
				if !client {
					closed, other = r.pair.backend.base, r.client
				}
				write(t, r.client, "x")
				expect(t, r.backend, "x")
				require.NoError(t, closed.Close())
				expectReset(t, other)
				require.Equal(t, map[bool]Reason{true: ClientError, false: Error}[client], r.reason(t))
				require.ErrorIs(t, r.relay.Err(), net.ErrClosed)
			})
		}
	}
}

// picky is a wrapper that does not like what it is sent.
type picky struct{ net.Conn }

var errPicky = errors.New("no header")

func (c picky) Read(b []byte) (int, error) {
	if _, err := c.Conn.Read(b); err != nil {
		return 0, err
	}
	return 0, errPicky
}

// What a wrapper says goes with the reason, which is its side's; what else ends a
// relay needs no words.
func TestRelayKeepsWhatWentWrong(t *testing.T) {
	for name, c := range map[string]struct {
		client bool
		why    Reason
	}{"client": {true, ClientError}, "backend": {false, Error}} {
		t.Run(name, func(t *testing.T) {
			client, nearClient := tcpPair(t)
			defer client.Close()
			backend, nearBackend := tcpPair(t)
			defer backend.Close()
			var count atomic.Uint64
			ends := [2]net.Conn{nearClient, picky{nearBackend}}
			from := backend
			if c.client {
				ends, from = [2]net.Conn{picky{nearClient}, nearBackend}, client
			}
			r := New(ends[0], ends[1], Options{Up: &count, Down: &count})
			write(t, from, "x")
			require.Equal(t, c.why, r.Run())
			require.Equal(t, errPicky, r.Err())
			r.Cut(drained)
			require.Equal(t, c.why, r.Reason())
			expectReset(t, client)
			expectReset(t, backend)
		})
	}
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		r.relay.Cut(drained)
		require.Equal(t, drained, r.reason(t))
		require.NoError(t, r.relay.Err())
	})
}

func TestRelayCountsLive(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		write(t, r.client, "12345")
		expect(t, r.backend, "12345")
		eventually(t, func() bool { return r.received.Load() == 5 }, "the count of an open connection")
		require.Zero(t, r.sent.Load())
	})
}

func TestRelayIdleTimeout(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 50*time.Millisecond)
		expectReset(t, r.client)
		expectReset(t, r.backend)
		require.Equal(t, IdleTimeout, r.reason(t))
	})
}

func TestIdleTime(t *testing.T) {
	start := time.Now()
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	i := idleTime{since: start}
	require.Equal(t, 5*time.Second, i.look(0, at(5)))
	require.Zero(t, i.look(10, at(8)), "something has moved since the last look")
	require.Zero(t, i.look(11, at(9)))
	require.Equal(t, 3*time.Second, i.look(11, at(12)))
	require.Zero(t, i.look(12, at(13)))
}

// A connection on which something moves now and then is not idle.
func TestRelayIdleTimeoutCountsFromTheLastByte(t *testing.T) {
	r := startRelay(t, time.Hour, nil)
	passes := func(d time.Duration) { // as if so much time had passed
		r.pair.timerMu.Lock()
		r.pair.idle.since = r.pair.idle.since.Add(-d)
		r.pair.timerMu.Unlock()
		r.pair.onTimer()
	}
	write(t, r.client, "x")
	expect(t, r.backend, "x")
	eventually(t, func() bool { return r.received.Load() == 1 }, "the byte is counted")
	passes(50 * time.Minute)
	passes(50 * time.Minute) // of which it has been idle for 50
	write(t, r.backend, "still open")
	expect(t, r.client, "still open")
	eventually(t, func() bool { return r.sent.Load() == 10 }, "and these")
	passes(50 * time.Minute)
	passes(time.Hour)
	require.Equal(t, IdleTimeout, r.reason(t))
}

func TestRelayCut(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		write(t, r.client, "x")
		expect(t, r.backend, "x")
		r.relay.Cut(drained)
		expectReset(t, r.client)
		expectReset(t, r.backend)
		require.Equal(t, drained, r.reason(t))
	})
}

// The backend answers and closes; the client, still sending, gets the answer.
func TestRelayBackendClosesWhileClientSends(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		r := k.start(t, 0)
		write(t, r.client, "request")
		expect(t, r.backend, "request")
		write(t, r.backend, "refused, and here is why")
		require.NoError(t, r.backend.Close())
		expect(t, r.client, "refused, and here is why")
		expectEOF(t, r.client)
		for {
			if _, err := r.client.Write(make([]byte, 1000)); err != nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		require.Equal(t, BackendClosed, r.reason(t))
	})
}

func TestConclude(t *testing.T) {
	for _, c := range []struct {
		name string
		whys []Reason
		want Reason
	}{
		{"first close stays", []Reason{ClientClosed, BackendClosed}, ClientClosed},
		{"a close gives way to a reset", []Reason{ClientClosed, BackendReset}, BackendReset},
		{"a reset stays", []Reason{ClientReset, drained}, ClientReset},
		{"a close does not follow a cut", []Reason{IdleTimeout, BackendClosed}, IdleTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r Pair
			for _, why := range c.whys {
				r.conclude(why)
			}
			require.Equal(t, c.want, r.Reason())
		})
	}
}

type panicking struct{ net.Conn }

func (panicking) Read([]byte) (int, error) { panic("a broken wrapper") }

func TestRelayContainsPanics(t *testing.T) {
	r := startRelay(t, 0, func(c net.Conn) net.Conn {
		return hide(c)
	})
	r.relay.Cut(drained)
	r.reason(t)

	far, near := tcpPair(t)
	defer far.Close()
	farBackend, nearBackend := tcpPair(t)
	defer farBackend.Close()
	var count atomic.Uint64
	var caught any
	broken := New(panicking{near}, nearBackend, Options{Up: &count, Down: &count, OnPanic: func(v any, stack []byte) {
		caught = v
		require.Contains(t, string(stack), "panicking")
	}})
	require.Equal(t, Error, broken.Run())
	require.Equal(t, "a broken wrapper", caught)
	expectReset(t, far)
	expectReset(t, farBackend)
}
