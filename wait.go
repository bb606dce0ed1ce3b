package tcplb

import (
	"container/list"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// waiters are the clients of a pool that wait: for a backend, then they stand in
// line, or for a connect that takes long.
type waiters struct {
	mu      sync.Mutex
	list    list.List // of *waiter
	n       atomic.Int64
	waiting atomic.Int64 // for a backend
	lines                // guarded by mu
}

// waiter is one of them, from enter to leave. It waits in the goroutine that it
// has anyway.
type waiter struct {
	client  net.Conn
	silent  bool // see watchHangup
	request *Request
	began   time.Time

	// Its place in line; guarded by the waiters' mutex. The request is in the hands
	// of who has that while it is in line.
	in     *line // nil: it is in none
	at     int
	number uint64 // among those that have the same time; 0 = it has never been in line
	turn   outcome

	// Set by enter.
	watch *hangup // sees the client leave; nil = that can't be told
	place *list.Element
	woken chan struct{} // where there is no watch; capacity 1
	awake atomic.Bool   // where there is one: to be woken, or awake
}

// enter makes w one that can be woken, unless it is.
func (q *waiters) enter(w *waiter) {
	if w.place != nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if w.watch = watchHangup(w.client, w.silent); w.watch == nil {
		w.woken = make(chan struct{}, 1)
	}
	w.place = q.list.PushBack(w)
	q.n.Add(1)
}

// leave takes w out of everything. The client's connection is as it was.
func (q *waiters) leave(w *waiter) {
	if w.place == nil && w.number == 0 {
		return
	}
	q.mu.Lock()
	q.quitLocked(w)
	if w.place != nil {
		q.list.Remove(w.place)
	}
	q.mu.Unlock()
	if w.place == nil {
		return
	}
	q.n.Add(-1)
	w.place = nil
	if w.watch != nil {
		w.watch.setDeadline(time.Time{})
	}
}

// wake wakes w, if it is in the queue.
func (q *waiters) wake(w *waiter) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if w.place != nil {
		w.wake()
	}
}

// wake ends the wait, or the next one if there is none. It does not block.
func (w *waiter) wake() {
	if w.watch == nil {
		signal(w.woken)
		return
	}
	w.awake.Store(true)
	w.watch.setDeadline(time.Unix(1, 0))
}

// wait returns when w is woken, at the time if that is not zero, or when the
// client has left: then it returns how.
func (w *waiter) wait(until time.Time) (left reason) {
	if w.watch != nil {
		w.watch.setDeadline(until)
		if !w.awake.Load() {
			w.watch.wait()
		}
		w.awake.Store(false)
		return w.watch.look()
	}
	var timeUp <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		timeUp = t.C
	}
	select {
	case <-w.woken:
	case <-timeUp:
	}
	return reasonNone
}

// innermost returns the connection inside of all wrappers.
func innermost(conn net.Conn) net.Conn {
	for inner := conn; inner != nil; inner = relay.Unwrap(inner) {
		conn = inner
	}
	return conn
}

// pause waits for d, and reports false if stop was closed before.
func pause(d time.Duration, stop <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
		return false
	}
}
