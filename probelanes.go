package tcplb

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
)

// probeLanes bound the files that probes have open. A probe of a host that
// does not answer has one until its timeout, and many of those must not hold up
// the others. So a probe begins in the prompt lane, where it may stay for
// promptTime. Then it goes on in the slow lane if there is room, and is broken
// off if not, to wait there for its turn: when that has come, it starts over.
// One whose backend was slow the last time begins in the slow lane.
//
// The slow lane borrows its files from those of connections, while they are not
// short of them. Then, it has up to half of those set apart for probes.
type probeLanes struct {
	files                  *files.Budget
	mostSlow, mostBorrowed int

	mu        sync.Mutex
	free      int // of the files set apart
	slow      int // of those, the slow lane's
	borrowed  map[*probePlace]struct{}
	waiting   [numQueues]list.List // of *probePlace
	slowTurns int                  // given to the two queues of the slow lane
}

const (
	promptTime   = 100 * time.Millisecond
	mostBorrowed = 256
)

// queue is where a probe waits for its place.
type queue int

const (
	promptQueue queue = iota
	urgentQueue       // of the slow lane: the backend is up, or somebody waits for it
	slowQueue         // of the slow lane: the rest
	numQueues
)

// lane is whose file a probe has.
type lane int

const (
	noLane lane = iota // none: it waits, has ended, or gave the file to a client
	promptLane
	slowLane
	borrowedLane
)

// lanes are the process's.
var lanes = newProbeLanes(files.Process)

// errBrokenOff is a probe's that ended without a result.
var errBrokenOff = errors.New("no place in the slow lane")

func newProbeLanes(f *files.Budget) *probeLanes {
	l := &probeLanes{
		files:        f,
		mostSlow:     max(1, f.Probes()/2),
		mostBorrowed: int(min(mostBorrowed, f.Limit()/8)),
		free:         f.Probes(),
		borrowed:     make(map[*probePlace]struct{}),
	}
	f.OnShortage(l.giveWay)
	return l
}

// probePlace is what a probe waits for and then has.
type probePlace struct {
	lanes *probeLanes
	ctx   context.Context
	abort context.CancelFunc
	given chan struct{} // closed when it has a file

	// Guarded by the lanes' mutex; queue only as long as turn is set.
	queue  queue
	turn   *list.Element // in the queue; nil once it has left that
	in     lane
	broken bool // off, by abort
}

// enter waits for a place, which run gives back; nil if ctx ended first. A
// receive from urgent moves one of the slow queue to the urgent one.
func (l *probeLanes) enter(ctx context.Context, q queue, urgent <-chan struct{}) *probePlace {
	p := &probePlace{lanes: l, given: make(chan struct{}), queue: q}
	p.ctx, p.abort = context.WithCancel(ctx)
	l.mu.Lock()
	p.turn = l.waiting[q].PushBack(p)
	l.giveLocked()
	l.mu.Unlock()
	for !isClosed(p.given) {
		select {
		case <-p.given:
		case <-urgent:
			p.hurry()
		case <-ctx.Done():
			p.leave()
			return nil
		}
	}
	return p
}

// run makes the probe, and leaves. The error is errBrokenOff where the probe
// had to end without a result.
func (p *probePlace) run(probe func(context.Context) error) error {
	if p.queue == promptQueue {
		timer := time.AfterFunc(promptTime, p.moveOver)
		defer timer.Stop()
	}
	err := probe(p.ctx)
	if broken := p.leave(); broken && err != nil {
		return errBrokenOff
	}
	return err
}

// hurry moves a probe that waits in the slow queue to the urgent one.
func (p *probePlace) hurry() {
	l := p.lanes
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.turn != nil && p.queue == slowQueue {
		l.waiting[p.queue].Remove(p.turn)
		p.queue = urgentQueue
		p.turn = l.waiting[p.queue].PushBack(p)
	}
}

// moveOver takes a probe out of the prompt lane, whose time is over.
func (p *probePlace) moveOver() {
	l := p.lanes
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.in != promptLane {
		return
	}
	l.giveLocked() // those who wait come first
	l.free++       // for p itself
	if l.admitSlowLocked(p) {
		l.giveLocked()
		return
	}
	l.free--
	p.broken = true // its file is free when the probe has ended
	p.abort()
}

// leave gives up the place, or the turn for one. It reports whether the probe
// was broken off.
func (p *probePlace) leave() (broken bool) {
	p.abort()
	l := p.lanes
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.turn != nil {
		l.waiting[p.queue].Remove(p.turn)
		p.turn = nil
	}
	switch p.in {
	case promptLane:
		l.free++
	case slowLane:
		l.free++
		l.slow--
	case borrowedLane:
		delete(l.borrowed, p)
		l.files.Release(1)
	}
	p.in = noLane
	l.giveLocked()
	return p.broken
}

// giveLocked gives places to those who wait, as far as there are any.
func (l *probeLanes) giveLocked() {
	for first := l.waiting[promptQueue].Front(); first != nil && l.free > 0; first = l.waiting[promptQueue].Front() {
		l.free--
		p := first.Value.(*probePlace)
		p.in = promptLane
		l.giveTurnLocked(p)
	}
	for first := l.firstSlowLocked(); first != nil; first = l.firstSlowLocked() {
		p := first.Value.(*probePlace)
		if !l.admitSlowLocked(p) {
			return
		}
		l.slowTurns++
		l.giveTurnLocked(p)
	}
}

func (l *probeLanes) giveTurnLocked(p *probePlace) {
	l.waiting[p.queue].Remove(p.turn)
	p.turn = nil
	close(p.given)
}

// firstSlowLocked returns whose turn it is in the slow lane: an urgent probe's,
// but for one turn of four.
func (l *probeLanes) firstSlowLocked() *list.Element {
	urgent, slow := l.waiting[urgentQueue].Front(), l.waiting[slowQueue].Front()
	if urgent == nil || slow != nil && l.slowTurns%4 == 3 {
		return slow
	}
	return urgent
}

// admitSlowLocked puts p in the slow lane if there is room.
func (l *probeLanes) admitSlowLocked(p *probePlace) bool {
	switch {
	case len(l.borrowed) < l.mostBorrowed && l.files.AcquireBelow(1, l.files.Limit()/4*3):
		l.borrowed[p] = struct{}{}
		p.in = borrowedLane
	case l.free > 0 && l.slow < l.mostSlow:
		l.free--
		l.slow++
		p.in = slowLane
	default:
		return false
	}
	return true
}

// giveWay breaks off up to n probes that borrowed their files, and gives the
// files back at once: closing them takes a moment, for which there is the
// reserve. So no probe keeps a client out. It reports false if there are none.
func (l *probeLanes) giveWay(n int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	n = min(n, int64(len(l.borrowed)))
	left := n
	for p := range l.borrowed {
		if left == 0 {
			break
		}
		left--
		delete(l.borrowed, p)
		p.in, p.broken = noLane, true
		p.abort()
	}
	l.files.Release(n)
	return n > 0
}
