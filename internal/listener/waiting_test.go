package listener

import (
	"net"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
	"github.com/stretchr/testify/require"
)

// arrival is a connection as a listener of this package accepts it, in the list
// and with what it is said to hold.
func arrival(t testing.TB, w *WaitingList, holds int32) *Conn {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	dialClient(t, ln.Addr().String())
	conn, err := ln.Accept()
	require.NoError(t, err)
	c := &Conn{Conn: socket.Of(conn.(*net.TCPConn)), from: testEntrance()}
	t.Cleanup(func() { _ = c.End() })
	switch holds {
	case holdsPair:
		require.True(t, files.Process.Acquire(files.PerConnection))
	case holdsOverflow:
		require.True(t, files.Process.AcquireOverflow())
	}
	c.holds.Store(holds)
	w.add(c)
	return c
}

// wait makes c a connection that has waited for so long.
func (c *Conn) wait(d time.Duration) {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	c.place.since = time.Now().Add(-d)
}

func onTheirWay() int {
	n, _ := OnTheirWay()
	return n
}

func anyHolder(int32) bool { return true }

func pairHolder(holds int32) bool { return holds == holdsPair }

// The longest of all lists goes first, and none before a grace is over.
func TestLongestWaitingGoesFirst(t *testing.T) {
	watchLeftovers(t)
	one, other := NewWaitingList(time.Hour), NewWaitingList(0)
	t.Cleanup(one.Close)
	t.Cleanup(other.Close)
	a, b, c := arrival(t, one, holdsOverflow), arrival(t, one, holdsPair), arrival(t, one, holdsPair)
	d, e := arrival(t, other, holdsPair), arrival(t, other, holdsOverflow)
	require.Nil(t, longestWaiting(anyHolder), "all have just come")
	a.wait(5 * grace)
	b.wait(3 * grace)
	d.wait(4 * grace)
	require.EqualValues(t, 3, waiting.pairs.Load())
	require.Same(t, d, longestWaiting(pairHolder))
	require.Same(t, a, longestWaiting(anyHolder))
	require.Same(t, b, longestWaiting(anyHolder))
	require.Nil(t, longestWaiting(anyHolder))
	require.EqualValues(t, 1, waiting.pairs.Load())
	require.Equal(t, 2, onTheirWay())
	for _, gone := range []*Conn{a, b, d} {
		require.False(t, gone.Arrive(), "too late")
	}
	require.True(t, c.Arrive())
	require.True(t, c.Arrive(), "again")
	require.True(t, e.Arrive())
	require.Zero(t, onTheirWay())
}

// A timer stays only while a config or a connection needs it.
func TestWaitingListDisarms(t *testing.T) {
	watchLeftovers(t)
	w := NewWaitingList(time.Hour)
	armed := func() bool {
		waiting.mu.Lock()
		defer waiting.mu.Unlock()
		return w.armed
	}
	require.False(t, armed())
	c := arrival(t, w, holdsNothing)
	require.True(t, armed())
	w.Close()
	require.True(t, armed(), "c keeps its time")
	require.NoError(t, c.Close())
	require.False(t, armed())
	require.NoError(t, arrival(t, w, holdsNothing).Close(), "a last one")
	require.False(t, armed())
}

// A client that has reached the handler without a pair of files waits for those
// that have one and are not there: until one gives way, or all are there.
func TestAdmissionWaitsForThoseOnTheirWay(t *testing.T) {
	admitted := func(c *Conn) chan bool {
		done := make(chan bool, 1)
		require.True(t, c.Arrive())
		go func() { done <- c.Admit() }()
		return done
	}
	t.Run("one gives way", func(t *testing.T) {
		watchLeftovers(t)
		w := NewWaitingList(time.Hour)
		t.Cleanup(w.Close)
		quiet := arrival(t, w, holdsPair)
		useAllFiles(t)
		began := time.Now()
		c := arrival(t, w, holdsOverflow)
		require.True(t, <-admitted(c))
		require.GreaterOrEqual(t, time.Since(began), grace/2, "it had its time")
		require.False(t, quiet.Arrive())
		require.EqualValues(t, 1, quiet.from.counts[filesShort].Load())
		require.Zero(t, files.Process.Overflow())
	})
	t.Run("all get there", func(t *testing.T) {
		watchLeftovers(t)
		w := NewWaitingList(time.Hour)
		t.Cleanup(w.Close)
		fast := arrival(t, w, holdsPair)
		useAllFiles(t)
		c := arrival(t, w, holdsOverflow)
		done := admitted(c)
		eventually(t, func() bool { return admitting.Load() == 1 }, "it waits")
		require.True(t, fast.Arrive())
		require.False(t, <-done, "no file is left")
		require.EqualValues(t, 1, files.Process.Overflow())
	})
	t.Run("nobody is on the way", func(t *testing.T) {
		watchLeftovers(t)
		w := NewWaitingList(time.Hour)
		t.Cleanup(w.Close)
		useAllFiles(t)
		c := arrival(t, w, holdsOverflow)
		require.False(t, <-admitted(c))
	})
	t.Run("nobody overtakes it", func(t *testing.T) {
		watchLeftovers(t)
		w := NewWaitingList(time.Hour)
		t.Cleanup(w.Close)
		admitting.Add(1)
		admissions <- struct{}{} // it has its turn, and would get the next pair
		late, has := arrival(t, w, holdsOverflow), arrival(t, w, holdsPair)
		require.True(t, <-admitted(has), "who has a pair takes none")
		done := admitted(late)
		eventually(t, func() bool { return admitting.Load() == 2 || len(done) > 0 }, "it queues")
		require.Empty(t, done)
		admitting.Add(-1)
		<-admissions
		require.True(t, <-done)
	})
	t.Run("while it waits, those that come get no pair", func(t *testing.T) {
		watchLeftovers(t)
		w := NewWaitingList(time.Hour)
		t.Cleanup(w.Close)
		admitting.Add(1)
		defer admitting.Add(-1)
		c := arrival(t, w, holdsNothing)
		require.True(t, c.tryClaim())
		require.EqualValues(t, holdsOverflow, c.holds.Load())
	})
}

// An HTTP server's connection that a listener wrapper leads to tcp_lb needs one
// file more, and leaves the share of those that stay elsewhere.
func TestGuestIsAdmitted(t *testing.T) {
	watchLeftovers(t)
	w := NewWaitingList(time.Hour)
	t.Cleanup(w.Close)
	before := files.Process.Used()
	guest := func() *Conn {
		c := arrival(t, w, holdsNothing)
		require.True(t, c.Arrive())
		require.True(t, c.claimAsGuest(1))
		require.EqualValues(t, 1, files.Process.Guests())
		return c
	}
	c := guest()
	require.Equal(t, before+1, files.Process.Used())
	require.True(t, c.Admit())
	require.Zero(t, files.Process.Guests())
	require.Equal(t, before+2, files.Process.Used())
	require.NoError(t, c.Close())
	require.Equal(t, before, files.Process.Used())

	// The same where a connection has to give way, for the first file and for
	// the second.
	quiet := arrival(t, w, holdsPair)
	quiet.wait(2 * grace)
	rest := files.Process.Limit() - files.Process.Used()
	require.True(t, files.Process.Acquire(rest))
	c = guest()
	require.False(t, quiet.Arrive())
	require.Equal(t, files.Process.Limit()-1, files.Process.Used())
	require.True(t, files.Process.Acquire(1))
	require.False(t, c.tryAdmit())
	quiet = arrival(t, w, holdsNothing)
	require.True(t, quiet.Arrive())
	files.Process.Release(2)
	require.True(t, quiet.tryAdmit())
	w.add(quiet)
	quiet.wait(2 * grace)
	require.True(t, c.tryAdmit())
	require.Equal(t, files.Process.Limit()-1, files.Process.Used(), "two for c, none for the other")
	files.Process.Release(rest - 1)
	require.NoError(t, c.Close())
}
