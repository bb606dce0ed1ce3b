package listener

import (
	"sync"
	"sync/atomic"
	"time"
)

// grace is how long a connection may be on its way to a handler before it gives
// way to others where files are short.
const grace = time.Second

// waiting are the connections that have yet to reach a tcp_lb handler, of
// listeners all of whose connections should.
var waiting = struct {
	mu    sync.Mutex
	lists map[*WaitingList]struct{} // that are not empty
	pairs atomic.Int64              // connections in them that hold a pair of files
}{lists: make(map[*WaitingList]struct{})}

// WaitingList has those of one config, in order of arrival. All have the same
// time, so that one timer serves for all: the first is the next to run out of it.
type WaitingList struct {
	limit time.Duration // 0 = none

	// Guarded by waiting.mu.
	first, last *Conn
	timer       *time.Timer
	armed       bool // the timer is running
	closed      bool // the config has ended
}

// NewWaitingList returns an empty one, with the time that connections get.
func NewWaitingList(limit time.Duration) *WaitingList { return &WaitingList{limit: limit} }

// place is a connection's in a list; guarded by waiting.mu.
type place struct {
	list       *WaitingList // nil: it is in none
	since      time.Time
	cut        bool // it was taken off, to be ended
	prev, next *Conn
}

// add puts c at the end of the list.
func (w *WaitingList) add(c *Conn) {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	c.place = place{list: w, since: time.Now(), prev: w.last}
	if c.holds.Load() == holdsPair {
		waiting.pairs.Add(1)
	}
	if w.last != nil {
		w.last.place.next = c
	} else {
		w.first = c
		waiting.lists[w] = struct{}{}
	}
	w.last = c
	if w.limit > 0 && !w.armed {
		w.armLocked(w.limit)
	}
}

func (w *WaitingList) armLocked(d time.Duration) {
	w.armed = true
	if w.timer == nil {
		w.timer = time.AfterFunc(d, w.expire)
		return
	}
	w.timer.Reset(d)
}

// removeLocked takes c off. What it holds is the same since it was added.
func (w *WaitingList) removeLocked(c *Conn) {
	prev, next := c.place.prev, c.place.next
	if prev != nil {
		prev.place.next = next
	} else {
		w.first = next
	}
	if next != nil {
		next.place.prev = prev
	} else {
		w.last = prev
	}
	c.place.list, c.place.prev, c.place.next = nil, nil, nil
	if c.holds.Load() == holdsPair {
		waiting.pairs.Add(-1)
	}
	if w.first == nil {
		delete(waiting.lists, w)
		w.disarmIfDoneLocked()
	}
}

// Close says that the config has ended. Connections that are on their way keep
// their time.
func (w *WaitingList) Close() {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	w.closed = true
	w.disarmIfDoneLocked()
}

// disarmIfDoneLocked stops the timer if nothing is to come. Else it stays, since
// a list that is empty now and then would set it again and again.
func (w *WaitingList) disarmIfDoneLocked() {
	if w.closed && w.first == nil && w.armed {
		w.timer.Stop()
		w.armed = false
	}
}

// expire ends the connections whose time is over.
func (w *WaitingList) expire() {
	waiting.mu.Lock()
	var over []*Conn
	now := time.Now()
	for w.first != nil && now.Sub(w.first.place.since) >= w.limit {
		c := w.first
		w.removeLocked(c)
		c.place.cut = true
		over = append(over, c)
	}
	w.armed = false
	if w.first != nil {
		w.armLocked(w.limit - now.Sub(w.first.place.since))
	}
	waiting.mu.Unlock()
	for _, c := range over {
		c.cutOff(handshakeTimeout)
	}
}

// Arrive takes c off its list, if it is in one: it has reached a handler. It
// reports false if c was cut off just before.
func (c *Conn) Arrive() bool {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	if w := c.place.list; w != nil {
		w.removeLocked(c)
	}
	return !c.place.cut
}

// longestWaiting takes off the connection that has waited longest of those that
// hold what is wanted, in whichever list; nil if that is less than a grace.
func longestWaiting(wanted func(holds int32) bool) *Conn {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	var longest *Conn
	for w := range waiting.lists {
		c := w.first
		for c != nil && !wanted(c.holds.Load()) {
			c = c.place.next
		}
		if c != nil && (longest == nil || c.place.since.Before(longest.place.since)) {
			longest = c
		}
	}
	if longest == nil || time.Since(longest.place.since) < grace {
		return nil
	}
	longest.place.list.removeLocked(longest)
	longest.place.cut = true
	return longest
}

// waited is how long c has been, or was, in a list.
func (c *Conn) waited() time.Duration {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	if c.place.since.IsZero() {
		return 0
	}
	return time.Since(c.place.since)
}

// OnTheirWay returns how many connections have yet to reach a handler, of
// listeners all of whose connections should, and how many of those hold a pair
// of files.
func OnTheirWay() (all, withPair int) {
	waiting.mu.Lock()
	defer waiting.mu.Unlock()
	for w := range waiting.lists {
		for c := w.first; c != nil; c = c.place.next {
			all++
		}
	}
	return all, int(waiting.pairs.Load())
}
