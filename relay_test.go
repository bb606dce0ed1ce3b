package tcplb

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
	relay           *relay
	received, sent  atomic.Uint64
	why             chan reason
}

func startRelay(t testing.TB, idle time.Duration, wrap func(net.Conn) net.Conn) *relayed {
	t.Helper()
	r := &relayed{why: make(chan reason, 1)}
	var nearClient, nearBackend net.Conn
	r.client, nearClient = tcpPair(t)
	r.backend, nearBackend = tcpPair(t)
	if wrap != nil {
		nearClient = wrap(nearClient)
	}
	r.relay = newRelay(nearClient, nearBackend, idle)
	r.relay.up.total, r.relay.down.total = &r.received, &r.sent
	r.relay.onPanic = func(v any, stack []byte) { t.Errorf("panic: %v\n%s", v, stack) }
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.why <- r.relay.run()
		_ = nearClient.Close()
		_ = nearBackend.Close()
	}()
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

// tcpPair returns both ends of a loopback connection, the first with a deadline.
func tcpPair(t testing.TB) (far *net.TCPConn, near net.Conn) {
	t.Helper()
	ln := listen(t)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	near, err = ln.Accept()
	require.NoError(t, err)
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c.(*net.TCPConn), near
}

func (r *relayed) reason(t testing.TB) reason {
	t.Helper()
	select {
	case why := <-r.why:
		return why
	case <-time.After(hangTimeout):
		require.FailNow(t, "the relay does not end")
		return reasonNone
	}
}

// opaque hides a socket the way a wrapper does: neither CloseWrite nor splice.
type opaque struct{ net.Conn }

func hide(c net.Conn) net.Conn { return opaque{c} }

// variants runs the test over bare sockets and over wrapped ones, and from both
// sides.
func variants(t *testing.T, test func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool)) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{"bare": nil, "wrapped": hide} {
		t.Run(name+"/client", func(t *testing.T) {
			r := startRelay(t, 0, wrap)
			test(t, r, r.client, r.backend, true)
		})
		t.Run(name+"/backend", func(t *testing.T) {
			r := startRelay(t, 0, wrap)
			test(t, r, r.backend, r.client, false)
		})
	}
}

func pickReason(client bool, ifClient, ifBackend reason) reason {
	if client {
		return ifClient
	}
	return ifBackend
}

func write(t testing.TB, c net.Conn, s string) {
	t.Helper()
	_, err := io.WriteString(c, s)
	require.NoError(t, err)
}

func expect(t testing.TB, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, s, string(b))
}

func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.Equal(t, io.EOF, err)
}

func expectReset(t testing.TB, c net.Conn) {
	t.Helper()
	_, err := io.ReadAll(c)
	require.ErrorIs(t, err, syscall.ECONNRESET)
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
		require.Equal(t, pickReason(aIsClient, reasonClientClosed, reasonBackendClosed), r.reason(t))
	})
}

func TestRelayReset(t *testing.T) {
	variants(t, func(t *testing.T, r *relayed, a, b *net.TCPConn, aIsClient bool) {
		write(t, a, "hello")
		expect(t, b, "hello")
		require.NoError(t, a.SetLinger(0))
		require.NoError(t, a.Close())
		expectReset(t, b)
		require.Equal(t, pickReason(aIsClient, reasonClientReset, reasonBackendReset), r.reason(t))
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
	for range 30 {
		r := startRelay(t, 0, nil)
		a, b := r.client, r.backend
		// The relay is stuck in a write to a, which does not read.
		require.NoError(t, b.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
		_, err := b.Write(make([]byte, 64<<20))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.NoError(t, a.SetLinger(0))
		require.NoError(t, a.Close())
		expectReset(t, b)
		require.Equal(t, reasonClientReset, r.reason(t))
	}
}

func fill(b []byte) {
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
}

func TestRelayLongStreamsBothWays(t *testing.T) {
	const size = 20 << 20
	data := make([]byte, size)
	fill(data)
	for name, wrap := range map[string]func(net.Conn) net.Conn{"bare": nil, "wrapped": hide} {
		t.Run(name, func(t *testing.T) {
			r := startRelay(t, 0, wrap)
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
			require.True(t, r.reason(t).orderly())
			require.EqualValues(t, size, r.received.Load())
			require.EqualValues(t, size, r.sent.Load())
			require.EqualValues(t, size, r.relay.up.moved.Load())
		})
	}
}

// Small and large writes in turn go in and out of bulk mode.
func TestRelayMixedSizes(t *testing.T) {
	r := startRelay(t, 0, nil)
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
	require.True(t, r.reason(t).orderly())
	require.Equal(t, r.received.Load(), r.relay.up.moved.Load())
}

// A reader that never reads stops the writer, and takes no more than the
// sockets and one buffer or pipe hold.
func TestRelayBackpressure(t *testing.T) {
	r := startRelay(t, 0, nil)
	_ = r.client.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := r.client.Write(make([]byte, 256<<20))
	require.Error(t, err, "the writer is stopped")
	require.Less(t, n, 64<<20)
	write(t, r.backend, "the other way is free")
	expect(t, r.client, "the other way is free")
}

// Whoever else has one of the sockets may close it, too: nothing is left open.
func TestRelayOfWhatAnotherCloses(t *testing.T) {
	for name, wrap := range map[string]func(net.Conn) net.Conn{"bare": nil, "wrapped": hide} {
		for _, client := range []bool{true, false} {
			t.Run(name+"/"+pickReason(client, reasonClientClosed, reasonBackendClosed).String(), func(t *testing.T) {
				r := startRelay(t, 0, wrap)
				closed, other := r.relay.client.base, r.backend
				if !client {
					closed, other = r.relay.backend.base, r.client
				}
				write(t, r.client, "x")
				expect(t, r.backend, "x")
				require.NoError(t, closed.Close())
				expectReset(t, other)
				require.Equal(t, reasonError, r.reason(t))
			})
		}
	}
}

func TestRelayCountsLive(t *testing.T) {
	r := startRelay(t, 0, nil)
	write(t, r.client, "12345")
	expect(t, r.backend, "12345")
	eventually(t, func() bool { return r.received.Load() == 5 }, "the count of an open connection")
	require.Zero(t, r.sent.Load())
}

func TestRelayIdleTimeout(t *testing.T) {
	r := startRelay(t, 50*time.Millisecond, nil)
	expectReset(t, r.client)
	expectReset(t, r.backend)
	require.Equal(t, reasonIdleTimeout, r.reason(t))
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
		r.relay.timerMu.Lock()
		r.relay.idle.since = r.relay.idle.since.Add(-d)
		r.relay.timerMu.Unlock()
		r.relay.onTimer()
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
	require.Equal(t, reasonIdleTimeout, r.reason(t))
}

func TestRelayCut(t *testing.T) {
	r := startRelay(t, 0, nil)
	write(t, r.client, "x")
	expect(t, r.backend, "x")
	r.relay.cut(reasonDrainTimeout)
	expectReset(t, r.client)
	expectReset(t, r.backend)
	require.Equal(t, reasonDrainTimeout, r.reason(t))
}

// The backend answers and closes; the client, still sending, gets the answer.
func TestRelayBackendClosesWhileClientSends(t *testing.T) {
	r := startRelay(t, 0, nil)
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
	require.Equal(t, reasonBackendClosed, r.reason(t))
}

func TestConclude(t *testing.T) {
	for _, c := range []struct {
		name string
		whys []reason
		want reason
	}{
		{"first close stays", []reason{reasonClientClosed, reasonBackendClosed}, reasonClientClosed},
		{"a close gives way to a reset", []reason{reasonClientClosed, reasonBackendReset}, reasonBackendReset},
		{"a reset stays", []reason{reasonClientReset, reasonDrainTimeout}, reasonClientReset},
		{"a close does not follow a cut", []reason{reasonIdleTimeout, reasonBackendClosed}, reasonIdleTimeout},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r relay
			for _, why := range c.whys {
				r.conclude(why)
			}
			require.Equal(t, c.want, reason(r.why.Load()))
		})
	}
}

type panicking struct{ net.Conn }

func (panicking) Read([]byte) (int, error) { panic("a broken wrapper") }

func TestRelayContainsPanics(t *testing.T) {
	r := startRelay(t, 0, func(c net.Conn) net.Conn {
		return hide(c)
	})
	r.relay.cut(reasonDrainTimeout)
	r.reason(t)

	far, near := tcpPair(t)
	defer far.Close()
	farBackend, nearBackend := tcpPair(t)
	defer farBackend.Close()
	var count atomic.Uint64
	var caught any
	broken := newRelay(panicking{near}, nearBackend, 0)
	broken.up.total, broken.down.total = &count, &count
	broken.onPanic = func(v any, stack []byte) {
		caught = v
		require.Contains(t, string(stack), "panicking")
	}
	require.Equal(t, reasonError, broken.run())
	require.Equal(t, "a broken wrapper", caught)
	expectReset(t, far)
	expectReset(t, farBackend)
}

func readAllCount(c net.Conn) (int64, error) { return io.Copy(io.Discard, c) }
