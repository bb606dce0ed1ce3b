package tcplb

import (
	"container/list"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// waiters are the clients of a pool that wait: for a backend to be available, or
// for a connect that takes long. All are woken when something changes for them,
// in order of arrival.
type waiters struct {
	mu   sync.Mutex
	list list.List // of *waiter
	n    atomic.Int64
}

// waiter is one of them, from enter to leave. It waits in the goroutine that it
// has anyway.
type waiter struct {
	client net.Conn
	silent bool // see watchHangup

	// Set by enter.
	watch *hangup // sees the client leave; nil = that can't be told
	place *list.Element
	woken chan struct{} // where there is no watch; capacity 1
	awake atomic.Bool   // where there is one: to be woken, or awake
}

// enter puts w at the end of the queue, unless it is in it.
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

// leave takes w out of the queue, if it is in it. The client's connection is as
// it was.
func (q *waiters) leave(w *waiter) {
	if w.place == nil {
		return
	}
	q.mu.Lock()
	q.list.Remove(w.place)
	q.mu.Unlock()
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

func (q *waiters) wakeAll() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for e := q.list.Front(); e != nil; e = e.Next() {
		e.Value.(*waiter).wake()
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
