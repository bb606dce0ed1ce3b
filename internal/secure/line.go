package secure

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// Line is where handshakes wait for processors. Few compute at once; of the others
// those that came first are first, wherever in their handshake they are: so those
// under way end before more begin. Nobody has a place while it waits for its peer.
type Line struct {
	atOnce func() int

	mu      sync.Mutex
	most    int // places
	taken   int // most, or more, while anybody waits
	arrived uint64
	waiting turns
}

// NewLine returns a line with so many places as atOnce says, which is asked time
// and again.
func NewLine(atOnce func() int) *Line { return &Line{atOnce: atOnce} }

// Join returns the turn of one more handshake, or of several, one after the other.
func (l *Line) Join() *Turn {
	most := l.atOnce()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.arrived++
	l.most = most
	l.giveLocked()
	return &Turn{line: l, number: l.arrived, at: inNoLine}
}

// Turn is a handshake's, which may have a place time and again. It is one
// goroutine's, but for Give.
type Turn struct {
	line   *Line
	number uint64
	waited time.Duration

	// Guarded by the line's mutex.
	placed bool
	at     int           // among those who wait
	given  chan struct{} // closed when it gets its place
}

const inNoLine = -1

// Take returns when it has a place, which it has to give back, or ctx has ended.
func (t *Turn) Take(ctx context.Context) error {
	l := t.line
	l.mu.Lock()
	if t.placed || l.taken < l.most {
		if !t.placed {
			l.taken++
			t.placed = true
		}
		l.mu.Unlock()
		return nil
	}
	t.given = make(chan struct{})
	heap.Push(&l.waiting, t)
	l.mu.Unlock()

	began := time.Now()
	defer func() { t.waited += time.Since(began) }()
	select {
	case <-t.given:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.at != inNoLine {
		heap.Remove(&l.waiting, t.at)
	}
	l.takeBackLocked(t) // which it may have been given just now
	return context.Cause(ctx)
}

// Give gives the place back, if it has one. Anybody may call it.
func (t *Turn) Give() {
	t.line.mu.Lock()
	defer t.line.mu.Unlock()
	t.line.takeBackLocked(t)
}

func (l *Line) takeBackLocked(t *Turn) {
	if t.placed {
		t.placed = false
		l.taken--
		l.giveLocked()
	}
}

// Waited returns how long it has waited so far; 0 for no turn.
func (t *Turn) Waited() time.Duration {
	if t == nil {
		return 0
	}
	return t.waited
}

// giveLocked gives places to those who wait, as far as there are any.
func (l *Line) giveLocked() {
	for len(l.waiting) > 0 && l.taken < l.most {
		l.taken++
		t := heap.Pop(&l.waiting).(*Turn)
		t.placed = true
		close(t.given)
	}
}

// turns is a heap of those who wait, by arrival.
type turns []*Turn

func (h turns) Len() int { return len(h) }

func (h turns) Less(i, j int) bool { return h[i].number < h[j].number }

func (h turns) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].at, h[j].at = i, j
}

// Push implements heap.Interface.
func (h *turns) Push(t any) {
	t.(*Turn).at = len(*h)
	*h = append(*h, t.(*Turn))
}

// Pop implements heap.Interface.
func (h *turns) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	t.at = inNoLine
	return t
}
