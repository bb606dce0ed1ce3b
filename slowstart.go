package tcplb

import (
	"slices"
	"time"
)

// slowSteps is how many shares of its weight a backend gets one by one when it
// comes back.
const slowSteps = 10

// slowStart is that of a backend which came back: from a tenth of its weight on,
// each ninth of the time brings a tenth more. It goes on as it began, whatever
// configs follow. nil is that there is none.
type slowStart struct {
	began time.Time
	lasts time.Duration
}

// tenths returns how much of the weight holds, 1–10.
func (s *slowStart) tenths(now time.Time) int {
	if s == nil {
		return slowSteps
	}
	passed := now.Sub(s.began)
	if passed >= s.lasts {
		return slowSteps
	}
	return 1 + int((slowSteps-1)*max(passed, 0)/s.lasts)
}

// next returns when that grows; zero if it is all.
func (s *slowStart) next(now time.Time) time.Time {
	n := s.tenths(now)
	if n == slowSteps {
		return time.Time{}
	}
	return s.began.Add((s.lasts*time.Duration(n) + slowSteps - 2) / (slowSteps - 1))
}

// effectiveTenths returns ten times the weight that holds, slow start included.
func (b *Backend) effectiveTenths(now time.Time) int64 {
	tenths := slowSteps
	if b.slowly.Load() {
		tenths = b.slow.Load().tenths(now)
	}
	return b.effective.Load() * int64(tenths)
}

// effectiveWeight is the weight that holds at this moment.
func (b *Backend) effectiveWeight() float64 {
	return float64(b.effectiveTenths(time.Now())) / slowSteps
}

// slowStarts has a pool's pickers made anew while backends start slowly. One timer
// serves them all, and runs only while there are any. It is guarded by the
// registry's mutex.
type slowStarts struct {
	timer    *time.Timer
	due      time.Time // when that fires; zero = it does not run
	earliest time.Time // for the next step
	stepping bool      // a step is under way, and sets the timer when it ends
}

// startSlowlyLocked is called when new connections begin to go to b again, or at
// all. The registry's mutex must be held.
func (p *pool) startSlowlyLocked(b *Backend) {
	g := p.newest.Load()
	if g == nil || g.slowStart == 0 {
		b.slow.Store(nil)
		return
	}
	s := &slowStart{began: time.Now(), lasts: g.slowStart}
	b.slow.Store(s)
	p.stepAtLocked(s.next(s.began))
}

// stepAtLocked has the next step be at that time at the latest, but for the pause
// between steps. The zero time asks for none.
func (p *pool) stepAtLocked(at time.Time) {
	s := &p.slow
	if at.IsZero() || s.stepping || len(p.generations) == 0 {
		return
	}
	if at.Before(s.earliest) {
		at = s.earliest
	}
	if !s.due.IsZero() && !at.Before(s.due) {
		return
	}
	s.stopLocked()
	s.due = at
	// Owned by the pool; ends by itself, or with the last generation.
	s.timer = time.AfterFunc(time.Until(at), func() { registry.stepSlowStarts(p) })
}

func (s *slowStarts) stopLocked() {
	if s.timer != nil {
		s.timer.Stop()
	}
	s.timer, s.due = nil, time.Time{}
}

// awaitStepLocked has the next step be when the first of p's backends is due, of
// what the pickers do not have that were made from since on.
func (p *pool) awaitStepLocked(since time.Time) {
	if !slices.ContainsFunc(p.generations, func(g *generation) bool { return g.slowStart > 0 }) {
		return
	}
	for _, b := range p.backends {
		if b.Available() {
			p.stepAtLocked(b.slow.Load().next(since))
		}
	}
}

// stepSlowStarts gives p's backends the weights of this moment. Steps that fall
// close together are made in one: a step may be late by a tenth of what it is
// long, and the pickers take a tenth of a processor at most.
func (r *poolRegistry) stepSlowStarts(p *pool) {
	s := &p.slow
	r.mu.Lock()
	if s.stepping {
		r.mu.Unlock()
		return
	}
	s.stopLocked()
	s.stepping = true
	outdated := slices.Clone(p.generations)
	r.mu.Unlock()

	began := time.Now()
	for _, g := range outdated {
		g.rebuildNow()
	}
	pause := (slowSteps - 1) * time.Since(began)

	r.mu.Lock()
	defer r.mu.Unlock()
	s.stepping = false
	if g := p.newest.Load(); g != nil {
		pause = max(pause, g.slowStart/(slowSteps*(slowSteps-1)))
	}
	s.earliest = time.Now().Add(pause)
	p.awaitStepLocked(began) // what fell due meanwhile is not in them
}

// What the rotation of candidates in slow start may be long, and what the work may
// be to make it: one step for each place and each weight that differs.
const (
	maxSlowUnits = 1 << 19
	maxSlowWork  = 1 << 25
)

// weighSlowStarts gives the candidates, of whole weights, what their slow starts
// leave them at the time. A tenth of a small weight is none, so that all are
// multiplied, by less where they are many and of many weights.
func weighSlowStarts(list []Candidate, now time.Time) {
	tenths := make([]int, len(list))
	divisor, least := 0, slowSteps
	for i, c := range list {
		tenths[i] = c.Backend.slow.Load().tenths(now)
		least = min(least, tenths[i])
		divisor = gcd(divisor, c.Weight)
	}
	if !slices.ContainsFunc(tenths, func(n int) bool { return n > least }) {
		return // all alike
	}
	for _, factor := range []int{slowSteps, 5, 2, 1} {
		var seen [slowSteps*maxWeight + 1]bool
		units, kinds := 0, 0
		for i := range list {
			w := slowWeight(list[i].Weight/divisor*factor, tenths[i])
			units += w
			if !seen[w] {
				seen[w] = true
				kinds++
			}
		}
		if factor > 1 && (units > maxSlowUnits || units*kinds > maxSlowWork) {
			continue
		}
		for i := range list {
			c := &list[i]
			c.Settled = c.Weight / divisor * factor
			c.Weight = slowWeight(c.Settled, tenths[i])
		}
		return
	}
}

func slowWeight(settled, tenths int) int { return max(1, (settled*tenths+slowSteps/2)/slowSteps) }
