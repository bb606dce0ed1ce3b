package secure

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func one() int { return 1 }

// Whoever came first is next, also where he has had a place before.
func TestLineServesByArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLine(one)
		var order []int
		first := l.Join()
		require.NoError(t, first.Take(t.Context()))
		turns := []*Turn{l.Join(), l.Join(), l.Join()}
		for _, i := range []int{2, 0, 1} {
			go func() {
				require.NoError(t, turns[i].Take(t.Context()))
				order = append(order, i)
				turns[i].Give()
			}()
			synctest.Wait()
		}
		require.Empty(t, order)
		time.Sleep(time.Second)
		first.Give()
		synctest.Wait()
		require.Equal(t, []int{0, 1, 2}, order)
		require.Equal(t, time.Second, turns[1].Waited())
		require.Zero(t, first.Waited())
		first.Give() // which it has not
		require.Zero(t, l.taken)
	})
}

func TestTurnEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLine(one)
		first, leaves := l.Join(), l.Join()
		require.NoError(t, first.Take(t.Context()))
		why := errors.New("enough")
		for _, alsoGiven := range []bool{false, true} {
			ctx, cancel := context.WithCancelCause(t.Context())
			var err error
			go func() { err = leaves.Take(ctx) }()
			synctest.Wait()
			cancel(why)
			if alsoGiven {
				first.Give()
			}
			synctest.Wait()
			if err == nil { // it had its place before it saw the end
				leaves.Give()
			} else {
				require.ErrorIs(t, err, why)
			}
			require.Empty(t, l.waiting)
		}
		require.Zero(t, l.taken)
	})
}

func TestLineGrowsWithItsPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		most := 1
		l := NewLine(func() int { return most })
		require.NoError(t, l.Join().Take(t.Context()))
		served := false
		go func() {
			require.NoError(t, l.Join().Take(t.Context()))
			served = true
		}()
		synctest.Wait()
		require.False(t, served)
		most = 2
		l.Join()
		synctest.Wait()
		require.True(t, served)
	})
}

// However many handshakes are made, so many compute.
func TestHandshakesComputeInTurns(t *testing.T) {
	const places, many = 2, 40
	l := NewLine(func() int { return places })
	var computing, most, done atomic.Int64
	config := &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error {
		for n := computing.Add(1); ; {
			if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		time.Sleep(time.Millisecond) // which gives others the chance
		computing.Add(-1)
		return nil
	}}
	own := &tls.Config{Certificates: []tls.Certificate{certificate(t)}}
	var wg sync.WaitGroup
	for range many {
		near, far := tcpPair(t)
		wg.Go(func() { _ = tls.Server(far, own).Handshake() })
		wg.Go(func() {
			if _, err := Client(t.Context(), near, config, time.Now().Add(hangTimeout), l.Join()); err == nil {
				done.Add(1)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, many, done.Load())
	require.LessOrEqual(t, most.Load(), int64(places))
	require.Zero(t, l.taken)
}

// Who waits for its peer holds up nobody.
func TestHandshakeWithASilentPeer(t *testing.T) {
	l := NewLine(one)
	near, far := tcpPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		_, err := Client(ctx, near, &tls.Config{InsecureSkipVerify: true}, time.Time{}, l.Join())
		ended <- err
	}()
	_, err := far.Read(make([]byte, 1))
	require.NoError(t, err, "the hello")
	other := l.Join()
	require.NoError(t, other.Take(t.Context()))
	other.Give()
	cancel()
	require.ErrorIs(t, <-ended, context.Canceled)
	require.Zero(t, l.taken)
}

// What a handshake waits for its place is no time of the peer's.
func TestWaitingPutsTheDeadlineOff(t *testing.T) {
	l := NewLine(one)
	near, far := tcpPair(t)
	go func() {
		_ = tls.Server(far, &tls.Config{Certificates: []tls.Certificate{certificate(t)}}).Handshake()
	}()
	first, turn := l.Join(), l.Join()
	require.NoError(t, first.Take(t.Context()))
	time.AfterFunc(10*time.Millisecond, first.Give)
	socket, deadline := &deadlines{TCPConn: near}, time.Now().Add(hangTimeout)
	_, err := Client(t.Context(), socket, &tls.Config{InsecureSkipVerify: true}, deadline, turn)
	require.NoError(t, err)
	require.Positive(t, turn.Waited())
	require.Len(t, socket.set, 3)
	require.Equal(t, []time.Time{deadline, deadline.Add(turn.Waited()), {}}, socket.set)
}

// deadlines keeps those that are set.
type deadlines struct {
	*net.TCPConn
	set []time.Time
}

func (d *deadlines) SetDeadline(t time.Time) error {
	d.set = append(d.set, t)
	return d.TCPConn.SetDeadline(t)
}

func TestPanicGivesThePlaceBack(t *testing.T) {
	l := NewLine(one)
	near, far := tcpPair(t)
	go func() {
		_ = tls.Server(far, &tls.Config{Certificates: []tls.Certificate{certificate(t)}}).Handshake()
		_, _ = io.Copy(io.Discard, far)
	}()
	config := &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { panic("no") }}
	require.Panics(t, func() { _, _ = Client(t.Context(), near, config, time.Time{}, l.Join()) })
	require.Zero(t, l.taken)
}
