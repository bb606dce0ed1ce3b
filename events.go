package tcplb

import (
	"slices"
	"sync"
)

// eventQueue are a backend's events that wait for their handlers, oldest first.
// Nobody waits for a handler but the goroutine that calls it: one that blocks
// holds up neither checks nor reloads, nor the handlers of the next config.
type eventQueue struct {
	mu      sync.Mutex
	waiting []event
	dropped int // and not told yet
	// emitting is the generation whose handlers the goroutine that empties the
	// queue calls; nil = there is none. A goroutine that finds another one here
	// was relieved while a handler took its time.
	emitting *generation
}

type event struct {
	name string
	data map[string]any
}

// maxEvents is how many events of a backend wait at most.
const maxEvents = 16

// emitLocked queues an event for the handlers of the newest config. The
// registry's mutex must be held.
func (b *Backend) emitLocked(name string, data map[string]any) {
	g := b.pool.newest.Load()
	if g == nil || g.events == nil {
		return
	}
	q := &b.events
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.waiting) == maxEvents {
		q.waiting = slices.Delete(q.waiting, 0, 1)
		q.dropped++
	}
	q.waiting = append(q.waiting, event{name, data})
	if q.emitting != g {
		q.emitting = g
		// Owned by the queue; ends when that is empty, the config has ended or
		// it was relieved. Nobody waits for it.
		go b.emitEvents(g)
	}
}

// emitEvents empties the queue: for g, and once that has ended for the config
// that runs then, if any.
func (b *Backend) emitEvents(g *generation) {
	q := &b.events
	for {
		if g.ctx.Err() != nil {
			to := registry.newest(g.name)
			if to == g || to != nil && to.events == nil {
				to = nil
			}
			if !q.handOver(g, to) || to == nil {
				return
			}
			g = to
			continue
		}
		e, ok := q.next(g)
		if !ok {
			return
		}
		g.events.Emit(g.ctx, e.name, e.data)
	}
}

// handOver makes the queue another generation's; nil drops what waits. It
// reports false if it is not from's any more.
func (q *eventQueue) handOver(from, to *generation) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.emitting != from {
		return false
	}
	q.emitting = to
	if to == nil {
		q.waiting = nil
	}
	return true
}

// next takes the next event off the queue for g's handlers. It reports false if
// there is none, or the queue is not g's any more.
func (q *eventQueue) next(g *generation) (event, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.emitting != g {
		return event{}, false
	}
	if len(q.waiting) == 0 {
		q.emitting = nil
		return event{}, false
	}
	e := q.waiting[0]
	q.waiting = slices.Delete(q.waiting, 0, 1)
	return e, true
}

// takeDropped returns how many events were dropped since it was last called.
func (q *eventQueue) takeDropped() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.dropped
	q.dropped = 0
	return n
}
