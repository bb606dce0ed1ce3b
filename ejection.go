package tcplb

import (
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

// passiveSettings say when failures of clients' connections take a backend out.
type passiveSettings struct {
	failDuration time.Duration // 0 = never; they count for so long, and it is out for so long
	maxFails     int
}

// failures are the times of a backend's last ones, as many as it takes to eject
// it at most.
type failures struct {
	mu   sync.Mutex
	last []time.Time // oldest first
}

// add counts one more, and reports whether that makes too many. Then the count
// starts over.
func (f *failures) add(now time.Time, s passiveSettings) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = slices.DeleteFunc(f.last, func(at time.Time) bool { return now.Sub(at) >= s.failDuration })
	if len(f.last)+1 < s.maxFails {
		f.last = append(f.last, now)
		return false
	}
	f.last = nil
	return true
}

// failed counts a failure of a client's connection, which the backend is to blame
// for. Who calls has b in use.
func (b *Backend) failed(why string) {
	g := b.pool.newest.Load()
	if g == nil || g.passive.failDuration == 0 || b.ejected.Load() != 0 {
		return
	}
	if b.failures.add(time.Now(), g.passive) {
		registry.eject(b, why)
	}
}

// isWatched reports whether failures of clients' connections count, or did.
func (b *Backend) isWatched() bool {
	return b.watched.Load() || b.stats.ejections.Load() > 0
}

// eject takes b out for a while, unless no other backend is available.
func (r *poolRegistry) eject(b *Backend, why string) {
	r.mu.Lock()
	p := b.pool
	g := p.newest.Load()
	if g == nil || g.passive.failDuration == 0 || !b.Available() || !g.has(b) {
		r.mu.Unlock()
		return
	}
	fields := []zap.Field{zap.String("lb", p.name), zap.String("backend", b.address),
		zap.Int("failures", g.passive.maxFails), zap.String("error", why)}
	if !slices.ContainsFunc(g.members(), func(m enrolled) bool { return m.Backend != b && m.Backend.Available() }) {
		var t turnover
		if p.readmitAsAllFailLocked(g, &t.lines) {
			t.outdated = slices.Clone(p.generations)
		}
		r.mu.Unlock()
		if t.outdated != nil {
			t.finish(p, g)
		}
		p.staying.Add(func(times uint64) {
			p.logger().Warn("backend fails clients, and stays as no other is available", append(fields, zap.Uint64("times", times))...)
		})
		return
	}
	d := g.passive.failDuration
	b.ejected.Store(time.Now().Add(d).UnixNano())
	b.stats.ejections.Add(1)
	// Ends by itself, or by readmitLocked; nobody waits for it.
	var timer *time.Timer
	timer = time.AfterFunc(d, func() { r.readmit(b, &timer) })
	b.ejection = timer
	b.emitLocked("ejected", map[string]any{"lb": p.name, "backend": b.address, "error": why})
	outdated := slices.Clone(p.generations)
	r.mu.Unlock()
	for _, each := range outdated {
		each.rebuildNow()
	}
	g.logger.Warn("backend fails clients, it is taken out for a while", append(fields, zap.Duration("time", d))...)
	p.changed()
}

// has reports whether b is among g's members.
func (g *generation) has(b *Backend) bool {
	return slices.ContainsFunc(g.members(), func(m enrolled) bool { return m.Backend == b })
}

// readmit ends b's time out, when that is over. The clock is no witness of that: it
// may have been set back meanwhile.
func (r *poolRegistry) readmit(b *Backend, timer **time.Timer) {
	r.mu.Lock()
	if b.ejection != *timer {
		r.mu.Unlock()
		return // it ended before, just as the timer fired
	}
	t := turnover{outdated: slices.Clone(b.pool.generations)}
	b.readmitLocked(&t.lines, "backend takes connections again, its time out is over")
	p := b.pool
	g := p.newest.Load()
	r.mu.Unlock()
	t.finish(p, g)
}

// readmitLocked ends b's time out, if it has one, which it reports.
func (b *Backend) readmitLocked(lines *logLines, message string) bool {
	if b.ejected.Swap(0) == 0 {
		return false
	}
	b.ejection.Stop()
	b.ejection = nil
	b.pool.startSlowlyLocked(b)
	b.emitLocked("readmitted", map[string]any{"lb": b.pool.name, "backend": b.address})
	lines.add(message, zap.String("lb", b.pool.name), zap.String("backend", b.address))
	return true
}

// readmitLastLocked has backends of p back before their time if no other is left:
// one that fails now and then is better than none.
func (p *pool) readmitLastLocked(lines *logLines) (any bool) {
	g := p.newest.Load()
	if g == nil || slices.ContainsFunc(g.members(), func(m enrolled) bool { return m.Backend.Available() }) {
		return false
	}
	for _, m := range g.members() {
		if b := m.Backend; b.ejected.Load() != 0 && b.healthy.Load() && !b.barred.Load() {
			any = b.readmitLocked(lines, "backend takes connections again, as no other is available") || any
		}
	}
	return any
}

// leastEjection is how long a backend is out at least, where the last one that is
// available fails, too.
const leastEjection = time.Second

// readmitAsAllFailLocked has backends back whose time out serves nobody: the last
// one that is available fails as they did, and they may be well by now.
func (p *pool) readmitAsAllFailLocked(g *generation, lines *logLines) (any bool) {
	for _, m := range g.members() {
		until := m.Backend.ejected.Load()
		if until != 0 && m.Backend.healthy.Load() && !m.Backend.barred.Load() && time.Until(time.Unix(0, until)) <= g.passive.failDuration-leastEjection {
			any = m.Backend.readmitLocked(lines, "backend takes connections again, as the last other one fails, too") || any
		}
	}
	return any
}
