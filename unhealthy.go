package tcplb

import (
	"slices"
	"time"

	"go.uber.org/zap"
)

// setClosingLocked has b's connections cut once it has been down for as long as g
// says, its pool's newest generation; named is whether g has it. What was said
// before is called off. The registry's mutex must be held.
func (b *Backend) setClosingLocked(g *generation, named bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !named || g.closeAfter == nil || b.healthy.Load() || b.untold {
		if b.closing != nil {
			b.closing.Stop()
		}
		b.closing, b.closeAt, b.closed = nil, time.Time{}, false
		return
	}
	at := time.Unix(0, b.stats.turnedAt.Load()).Add(*g.closeAfter)
	if b.closing != nil {
		if at.Equal(b.closeAt) {
			return
		}
		b.closing.Stop()
	}
	b.closeAt, b.closed = at, false
	// Ends by itself, or finds that it was called off; nobody waits for it.
	var timer *time.Timer
	timer = time.AfterFunc(time.Until(at), func() { b.closeDown(&timer) })
	b.closing = timer
}

// closeDown cuts what is open while the backend is down. The clock is no witness of
// which timer fired: it may have been set back.
func (b *Backend) closeDown(timer **time.Timer) {
	b.mu.Lock()
	if b.closing != *timer {
		b.mu.Unlock()
		return // called off just as the timer fired
	}
	b.closed = true
	open := b.openLocked()
	p := b.pool
	b.mu.Unlock()
	for _, s := range open {
		s.end(reasonBackendDown)
	}
	if len(open) > 0 {
		p.logger().Warn("backend is down, cut its connections",
			zap.String("lb", p.name), zap.String("backend", b.address), zap.Int("connections", len(open)))
	}
}

// openLocked returns the open sessions; b's mutex must be held.
func (b *Backend) openLocked() []*session {
	return slices.AppendSeq(make([]*session, 0, b.sessions.count), b.sessions.all())
}

// doubtLocked makes a backend that joins down until a check has passed, if g, its
// pool's newest generation, wants that. The registry's mutex must be held.
func (b *Backend) doubtLocked(g *generation) {
	if b.fresh && g.checks.initiallyDown {
		b.untold = true
		b.setHealthy(false)
	}
	b.fresh = false
}
