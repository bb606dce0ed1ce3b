package tcplb

import (
	"container/heap"
	"fmt"
	"runtime/debug"
	"time"
)

// Clients for whom there is no backend at the moment stand in line, in order of
// arrival: while none is available, and while those that are have all their
// max_connections. Whoever makes room serves those who wait, in their order and
// with one lock held, and wakes only those that it has taken a backend for.
// Nobody who comes later has a chance before that.
//
// A client whose connect has just failed may not have the same backend again. It
// waits among others who have yet to try any, so there are two lists, each in
// order of arrival.
type lines struct {
	fresh, picky line
	// noRoom: none of those who wait, nor one who has yet to try any, could have a
	// backend. Whatever may change that serves the line, with the same lock held.
	noRoom  bool
	arrived uint64      // clients that have stood in line so far
	seen    *generation // the newest one, when all were woken last
	emptied []*Backend  // given back while the lock was held
}

// maxPicky is how many of those whose connects have failed are looked at in one
// go. The others start over by themselves, after the try interval.
const maxPicky = 64

// line is a heap of those who wait, by arrival.
type line []*waiter

func (l line) Len() int { return len(l) }

func (l line) Less(i, j int) bool { return l[i].before(l[j]) }

func (l line) Swap(i, j int) {
	l[i], l[j] = l[j], l[i]
	l[i].at, l[j].at = i, j
}

// Push implements heap.Interface.
func (l *line) Push(w any) {
	w.(*waiter).at = len(*l)
	*l = append(*l, w.(*waiter))
}

// Pop implements heap.Interface.
func (l *line) Pop() any {
	old := *l
	w := old[len(old)-1]
	old[len(old)-1] = nil
	*l = old[:len(old)-1]
	return w
}

func (w *waiter) before(o *waiter) bool {
	if w.began.Equal(o.began) {
		return w.number < o.number
	}
	return w.began.Before(o.began)
}

// outcome is what came of a client's time in line.
type outcome struct {
	by      *generation // took a backend for it; nil = none did
	problem error       // the policy panicked
}

// stand puts w in line, unless it is there, and looks whether it can have a
// backend at once, by g if the pool has no newer config. again says that it may
// have one that it has tried. What came of it is in w.turn, which is w's when it
// is not in line any more.
func (p *pool) stand(w *waiter, g *generation, again bool) (t outcome) {
	q := &p.waiters
	q.mu.Lock() // before the look: once a config was reviewed, nobody offers by the one before
	if newest := p.newest.Load(); newest != nil {
		g = newest
	}
	if w.turn == (outcome{}) {
		isNew := w.in == nil
		if again && len(w.request.tried) > 0 {
			q.quitLocked(w)
			w.request.tried, isNew = w.request.room[:0], true
		}
		q.joinLocked(w)
		// noRoom is of those who have tried nothing: others may have a backup.
		if isNew && (!q.noRoom || w.in == &q.picky) && !q.offerLocked(w, g) && w.in == &q.fresh {
			q.noRoom = !g.hasRoom()
		}
	}
	t, w.turn = w.turn, outcome{}
	emptied := q.takeEmptiedLocked()
	q.mu.Unlock()
	retireAll(emptied)
	return t
}

// joinLocked puts w in line, unless it is there.
func (q *waiters) joinLocked(w *waiter) {
	if w.in != nil {
		return
	}
	if w.number == 0 {
		q.arrived++
		w.number = q.arrived
	}
	if w.in = &q.fresh; len(w.request.tried) > 0 {
		w.in = &q.picky
	}
	heap.Push(w.in, w)
	q.waiting.Add(1)
}

// quitLocked takes w out of line, if it is there.
func (q *waiters) quitLocked(w *waiter) {
	if w.in == nil {
		return
	}
	heap.Remove(w.in, w.at)
	w.in = nil
	q.waiting.Add(-1)
}

// firstLocked returns the one who is next.
func (q *waiters) firstLocked(withPicky bool) *waiter {
	switch {
	case len(q.picky) == 0 || !withPicky:
		if len(q.fresh) == 0 {
			return nil
		}
		return q.fresh[0]
	case len(q.fresh) > 0 && q.fresh[0].before(q.picky[0]):
		return q.fresh[0]
	}
	return q.picky[0]
}

// offerLocked has g's policy choose for w. If a backend was taken, w is out of
// line.
func (q *waiters) offerLocked(w *waiter, g *generation) (done bool) {
	w.request.inLine = q
	defer func() {
		w.request.inLine = nil
		if v := recover(); v != nil {
			w.turn.problem, done = fmt.Errorf("panic in the selection policy: %v\n%s", v, debug.Stack()), true
		}
		if done {
			q.quitLocked(w)
		}
	}()
	if g.pick(w.request) == nil {
		return false
	}
	w.turn.by = g
	return true
}

// serveLocked has g take backends for those who wait, in order, while it can.
// Where only one may have got room, the others need no look.
func (q *waiters) serveLocked(g *generation, only *Backend) {
	var (
		declined []*waiter
		picky    int
		hadRoom  = !q.noRoom
	)
	q.noRoom = false
	for w := q.firstLocked(true); w != nil; w = q.firstLocked(picky < maxPicky) {
		if only != nil && !only.hasRoom() {
			q.noRoom = !hadRoom
			break
		}
		if q.offerLocked(w, g) {
			w.wake()
			continue
		}
		isFresh := w.in == &q.fresh
		if isFresh && !g.hasRoom() {
			q.noRoom = true
			break
		}
		if !isFresh {
			picky++
		}
		q.quitLocked(w)
		declined = append(declined, w)
	}
	for _, w := range declined {
		q.joinLocked(w)
	}
}

// freePlace counts a connection less at b, and serves who waits for its place. It
// reports whether that was b's last.
func (p *pool) freePlace(b *Backend) (last bool) {
	q := &p.waiters
	q.mu.Lock()
	last = b.countDown()
	if g := p.newest.Load(); g != nil {
		q.serveLocked(g, b)
	}
	emptied := q.takeEmptiedLocked()
	q.mu.Unlock()
	retireAll(emptied)
	return last
}

// review serves those who wait after something has changed. It wakes those who
// could start over with a backend that they have tried, and everyone where another
// config holds, or none does any more.
func (p *pool) review() {
	q := &p.waiters
	q.mu.Lock()
	g := p.newest.Load()
	q.noRoom = false
	if g != nil {
		q.serveLocked(g, nil)
	}
	if g == nil || g != q.seen {
		q.seen = g
		for e := q.list.Front(); e != nil; e = e.Next() {
			e.Value.(*waiter).wake()
		}
	}
	for _, w := range q.picky {
		w.wake()
	}
	emptied := q.takeEmptiedLocked()
	q.mu.Unlock()
	retireAll(emptied)
}

// takeEmptiedLocked returns what a policy took and gave back for those who wait.
func (q *waiters) takeEmptiedLocked() (list []*Backend) {
	list, q.emptied = q.emptied, nil
	return list
}

func retireAll(list []*Backend) {
	for _, b := range list {
		if !b.used() {
			registry.retire(b)
		}
	}
}

// hasRoom reports whether b can be taken.
func (b *Backend) hasRoom() bool {
	limit := b.limit.Load()
	return b.Available() && (limit == 0 || b.load.Load() < limit)
}

// hasRoom reports whether there is a backend that a new client could have.
func (g *generation) hasRoom() bool { _, room := g.room(); return room }

// room returns whether a backend is available, and whether one that would be asked
// for can be taken.
func (g *generation) room() (available, room bool) {
	var backup bool
	for _, m := range g.members() {
		if !m.Backend.Available() {
			continue
		}
		switch {
		case m.backup:
			backup = true
			room = room || m.Backend.hasRoom()
		case m.Backend.hasRoom():
			return true, true
		default:
			available = true
		}
	}
	return available || backup, !available && room
}

// waitBuckets are upper bounds in seconds for the time in line.
var waitBuckets = []float64{.001, .01, .1, 1, 10, 60}

// noteWait counts how long a client stood in line in all.
func (p *pool) noteWait(d time.Duration) {
	if d > 0 && p.times.wait != nil {
		p.times.wait.observe(d)
	}
}
