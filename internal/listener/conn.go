package listener

import (
	"net"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
)

// Conn is a client's connection from a listener of this package. It
// has its files in the budget from the moment it is accepted until it is
// closed, also where it never gets as far as the handler.
type Conn struct {
	*socket.Conn
	from  *Entrance
	holds atomic.Int32
	guest atomic.Int32 // its files of the share for guests
	taken atomic.Bool
	place place
}

// What a Conn holds of the file budget.
const (
	holdsNothing  = iota
	holdsOverflow // its own file; it will be refused unless there is room by then
	holdsOne      // its own file, of one that may never come to a handler
	holdsPair     // its own and the backend's
)

// How long accepting and admitting pause, at first and at most.
const (
	minPause = time.Millisecond
	maxPause = 100 * time.Millisecond
)

// Connections take turns, in order of their call, to wait for files: those that
// were accepted, and those that have reached a handler, which come first.
var (
	claims     = make(chan struct{}, 1)
	admissions = make(chan struct{}, 1)
	admitting  atomic.Int64 // wait for an admission, or have their turn
)

// claim takes a pair of files or, over the limit, one of those for connections
// to be refused. Where there is neither, connections that have waited for a
// grace give way; until there are any it waits, unless it is stopped.
func (c *Conn) claim(stop <-chan struct{}, waits func()) {
	if len(claims) == 0 && c.tryClaim() {
		return
	}
	select {
	case claims <- struct{}{}:
	case <-stop:
		return
	}
	defer func() { <-claims }()
	if c.tryClaim() {
		return
	}
	waits()
	for wait := minPause; !isClosed(stop); wait = min(2*wait, maxPause) {
		pause(wait, stop)
		if c.tryClaim() {
			return
		}
	}
}

func (c *Conn) tryClaim() bool {
	handed := admitting.Load() > 0 // pairs go to those
	switch {
	case !handed && files.Process.AcquireGently(files.PerConnection):
		c.holds.Store(holdsPair)
	case files.Process.AcquireOverflow():
		c.holds.Store(holdsOverflow)
	default:
		held := evictLongest(func(holds int32) bool { return holds == holdsOverflow || holds == holdsPair && !handed })
		c.holds.Store(held)
		return held != holdsNothing
	}
	return true
}

// claimAsGuest takes n files for a connection that may stay for good without
// coming to a tcp_lb handler. Guests may have half of all files together, and
// don't wait. It reports false if there are none left.
func (c *Conn) claimAsGuest(n int64) bool {
	if !files.Process.AcquireForGuest(n) {
		return false
	}
	if !files.Process.AcquireGently(n) {
		if evictLongest(func(holds int32) bool { return holds == holdsPair }) != holdsPair {
			files.Process.ReleaseOfGuest(n)
			return false
		}
		files.Process.Release(files.PerConnection - n)
	}
	c.guest.Store(int32(n))
	c.holds.Store(holdsPair)
	if n == 1 {
		c.holds.Store(holdsOne)
	}
	return true
}

// evictLongest ends the connection that has waited longest of those that hold
// what is wanted, if that is for a grace, and returns what it held.
func evictLongest(wanted func(holds int32) bool) int32 {
	c := longestWaiting(wanted)
	if c == nil {
		return holdsNothing
	}
	c.from.turnAway(c, filesShort)
	c.reset()
	return c.holds.Swap(holdsNothing) // unless its handler was faster to give it back
}

// Admit reports whether the connection, which has reached a handler, has its
// pair of files or gets it now. It waits while those that hold the rest have
// yet to come: they will, or give way.
func (c *Conn) Admit() bool {
	if (c.holds.Load() == holdsPair || admitting.Load() == 0) && c.tryAdmit() {
		return true
	}
	admitting.Add(1)
	defer admitting.Add(-1)
	timeout := time.NewTimer(2 * grace) // of those that hold files one may have come just now
	defer timeout.Stop()
	select {
	case admissions <- struct{}{}:
	case <-timeout.C:
		return false
	}
	defer func() { <-admissions }()
	for wait := minPause; ; wait = min(2*wait, maxPause) {
		if c.tryAdmit() {
			return true
		}
		if waiting.pairs.Load() == 0 {
			return c.tryAdmit() // one may have ended, instead of having come
		}
		select {
		case <-time.After(wait):
		case <-timeout.C:
			return false
		}
	}
}

func (c *Conn) tryAdmit() bool {
	held := c.holds.Load()
	if held != holdsPair {
		missing := int64(files.PerConnection)
		if held == holdsOne {
			missing--
		}
		if !files.Process.AcquireGently(missing) {
			if evictLongest(func(holds int32) bool { return holds == holdsPair }) != holdsPair {
				return false
			}
			files.Process.Release(files.PerConnection - missing)
		}
		if c.holds.Swap(holdsPair) == holdsOverflow {
			files.Process.ReleaseOverflow()
		}
	}
	files.Process.ReleaseOfGuest(int64(c.guest.Swap(0)))
	return true
}

// NetConn returns the socket inside, as Go's; nil if that can't be had any more.
func (c *Conn) NetConn() net.Conn {
	conn, err := c.Real()
	if err != nil {
		return nil
	}
	return conn
}

// TakeOver leaves it to the session to end the connection. Until the handler
// returns, caddy-l4 holds a goroutine with a grown stack, a buffer, two maps and
// more, nearly as much as all else that a connection takes. So the handler
// returns at once, and the Close that caddy-l4 then calls does nothing.
func (c *Conn) TakeOver() { c.taken.Store(true) }

// GiveAway is TakeOver for one whose descriptor was detached and whose handler
// has admitted it: the caller has its pair of files to release, and needs nothing
// of c any more.
func (c *Conn) GiveAway() {
	c.holds.Store(holdsNothing)
	c.TakeOver()
}

// Close closes the connection, unless it was taken over.
func (c *Conn) Close() error {
	if c.taken.Load() {
		return nil
	}
	return c.End()
}

// End closes the connection. The one to the backend must be closed by then.
func (c *Conn) End() error {
	c.Arrive() // or it never will
	err := c.Conn.Close()
	c.giveBack()
	return err
}

// cutOff ends a connection that was taken off its list.
func (c *Conn) cutOff(why turnedAway) {
	c.from.turnAway(c, why) // so that it is counted when the client gets to know
	c.reset()
	c.giveBack()
}

func (c *Conn) reset() {
	_ = c.SetLinger(0)
	_ = c.Conn.Close()
}

// giveBack gives back what c holds.
func (c *Conn) giveBack() {
	switch c.holds.Swap(holdsNothing) {
	case holdsPair:
		files.Process.Release(files.PerConnection)
	case holdsOne:
		files.Process.Release(1)
	case holdsOverflow:
		files.Process.ReleaseOverflow()
	}
	files.Process.ReleaseOfGuest(int64(c.guest.Swap(0)))
}

// pause waits for d, or until stop is closed.
func pause(d time.Duration, stop <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-stop:
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
