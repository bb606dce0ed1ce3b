package tcplb

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// watchAfter is how long a connect may take before it is worth a look whether
// the client is still there.
const watchAfter = 50 * time.Millisecond

// patience is the context of one connect for a client: it ends when the client
// leaves, or with a drain timeout. What that takes begins when somebody asks for
// its end, which a connect that takes no time does not.
type patience struct {
	search *search
	began  time.Time

	once      sync.Once // for the rest, but armed and connected
	armed     atomic.Bool
	inner     context.Context
	cancel    context.CancelCauseFunc
	timer     *time.Timer
	connected atomic.Bool
	watched   chan struct{} // closed at the end of watch
}

func newPatience(s *search, began time.Time) *patience { return &patience{search: s, began: began} }

func (p *patience) arm() {
	p.inner, p.cancel = context.WithCancelCause(context.Background())
	p.watched = make(chan struct{})
	p.timer = time.AfterFunc(time.Until(p.began.Add(watchAfter)), p.watch)
	p.armed.Store(true)
}

// watch cancels a connect that is not to go on. It is end's, which ends it and
// waits for it.
func (p *patience) watch() {
	defer close(p.watched)
	s := p.search
	s.pool.waiters.enter(&s.waiter)
	for !p.connected.Load() {
		if s.pool.abandoned() {
			p.cancel(errAbandoned)
			return
		}
		if s.left = s.waiter.wait(s.pool.drainLimit()); s.left != reasonNone {
			p.cancel(errClientLeft)
			return
		}
	}
}

// end is called when the connect is over, however.
func (p *patience) end() {
	if !p.armed.Load() {
		return
	}
	if !p.timer.Stop() {
		p.connected.Store(true)
		p.search.pool.waiters.wake(&p.search.waiter)
		<-p.watched
	}
}

// cause returns why it has ended; nil if it has not.
func (p *patience) cause() error {
	if !p.armed.Load() {
		return nil
	}
	return context.Cause(p.inner)
}

// Done implements context.Context.
func (p *patience) Done() <-chan struct{} {
	p.once.Do(p.arm)
	return p.inner.Done()
}

// Err implements context.Context.
func (p *patience) Err() error {
	if !p.armed.Load() {
		return nil
	}
	return p.inner.Err()
}

// Deadline implements context.Context.
func (*patience) Deadline() (deadline time.Time, ok bool) { return time.Time{}, false }

// Value implements context.Context. A context that is made from this one finds
// the one inside by it, and needs no goroutine.
func (p *patience) Value(key any) any {
	if !p.armed.Load() {
		return nil
	}
	return p.inner.Value(key)
}

// Interface guard
var _ context.Context = (*patience)(nil)
