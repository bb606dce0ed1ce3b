package tcplb

import (
	"slices"
	"time"

	"go.uber.org/zap"
)

// turnover is what came of a change of members. It is made with the registry's
// mutex held, and told once that is free.
type turnover struct {
	joined, left, reweighed int
	lines                   logLines
	came                    []*Backend    // that no config had
	slowly                  bool          // who is available by it has a slow start
	revived                 []*Backend    // came up with it
	outdated                []*generation // need another picker
}

// enrollLocked makes the members those of g. Who is new to it joins; who is not
// among them any more leaves and, unless another generation names it, has its
// connections drained until then. That members is nil is the end of g, whose list
// stays for connections that it still hands over. The registry's mutex must be held.
func (r *poolRegistry) enrollLocked(p *pool, g *generation, members []member, until time.Time) (t turnover, left []*Backend) {
	before := g.members()
	known := make(map[*Backend]member, len(before))
	for _, m := range before {
		known[m.Backend] = m.member
	}
	roster := make([]enrolled, 0, len(members))
	for _, m := range members {
		b := r.backendLocked(p, m.target)
		roster = append(roster, enrolled{m, b})
		was, ok := known[b]
		delete(known, b)
		switch {
		case !ok:
			t.joined++
			came, open := b.join()
			b.fresh = b.fresh || came
			if came {
				t.came = append(t.came, b)
			}
			t.lines.joined(b, came, open, m)
		case was.weight != m.weight || was.backup != m.backup || was.maxConnections != m.maxConnections:
			t.reweighed++
		}
	}
	if members != nil {
		g.roster.Store(&roster)
	}
	for _, m := range before {
		if _, ok := known[m.Backend]; !ok {
			continue
		}
		t.left++
		left = append(left, m.Backend)
		t.lines.left(m.Backend, m.Backend.unuse(until), m.member, until)
	}
	return t, left
}

// joined tells of what a backend had when it joined; came is whether it was in no
// config.
func (l *logLines) joined(b *Backend, came bool, open int, m member) {
	lb, backend := zap.String("lb", b.pool.name), zap.String("backend", b.address)
	switch {
	case open == 0:
	case m.source == "":
		l.add("backend is back in the config, its connections go on", lb, backend, zap.Int("connections", open))
	default:
		l.add("backend is found again, its connections go on", lb, backend, zap.String("source", m.source), zap.Int("connections", open))
	}
	if h := b.byHand(); came && h != (hand{}) {
		l.add("backend joins as it was set by hand", lb, backend, zap.Stringer("state", h.state), zap.Int("weight", h.weightOr(m.weight)))
	}
}

// left tells of the connections that a backend had when it left.
func (l *logLines) left(b *Backend, open int, m member, until time.Time) {
	if open == 0 {
		return
	}
	message := "backend left the config, draining its connections"
	if m.source != "" {
		message = "backend is not found any more, draining its connections"
	}
	l.add(message, zap.String("lb", b.pool.name), zap.String("backend", b.address),
		zap.Int("connections", open), zap.Time("until", until))
}

// settleLocked makes weights and checkers what the newest generation and the
// operator say. It adds to t what follows from that.
func (r *poolRegistry) settleLocked(p *pool, t *turnover) {
	g := p.newest.Load()
	named := make(map[*Backend]member)
	if g != nil {
		for _, m := range g.members() {
			named[m.Backend] = m.member
		}
	}
	changed := false
	for _, b := range t.came {
		b.slow.Store(nil)
		if t.slowly {
			p.startSlowlyLocked(b)
		}
	}
	for _, b := range p.backends {
		m, ok := named[b]
		wasBarred := b.barred.Load()
		changed = b.setTermsLocked(g, m, ok) || changed
		switch {
		case !b.used(), b.byHand().state == stateMaint:
			b.stopCheckingLocked()
		case ok && g.checks.enabled:
			b.doubtLocked(g)
			b.checkLocked(&assignment{g, m.checkPort(g), m.approach})
		case ok: // no checks: nothing could bring a down backend up again
			b.stopCheckingLocked()
			b.fresh = false
			if b.turnLocked(nil) {
				t.revived = append(t.revived, b)
			}
		}
		b.setClosingLocked(g, ok)
		if ok { // else its series stay what they are
			b.watched.Store(g.passive.failDuration > 0)
			b.aging.Store(g.lifetime.limit > 0)
		}
		if !ok || g.passive.failDuration == 0 || b.byHand().state == stateMaint {
			changed = b.readmitLocked(&t.lines, "backend's time out is called off") || changed
		}
		if t.slowly && wasBarred && !b.barred.Load() {
			p.startSlowlyLocked(b)
		}
	}
	changed = p.readmitLastLocked(&t.lines) || changed
	p.awaitStepLocked(time.Now())
	if changed || len(t.revived) > 0 {
		t.outdated = slices.Clone(p.generations)
	}
}

// setTermsLocked makes b's weight and what bars it those of g, its pool's newest
// generation, or of the last one if there is none; named is whether g has it, as
// m. It reports whether that changes if new connections may go to b.
func (b *Backend) setTermsLocked(g *generation, m member, named bool) (changed bool) {
	h := b.byHand()
	b.slowly.Store(g != nil && g.slowStart > 0)
	if named {
		b.given = m.weight
		b.source.Store(m.sourceText())
		b.limit.Store(int64(m.maxConnections))
		b.backup.Store(m.backup)
		b.approach.Store(m.approach)
		if c := b.channel.Load(); c != nil && (m.approach == nil || m.approach.security != c.of) {
			b.channel.Store(nil) // of a config that is gone
		}
	}
	weight := h.weightOr(b.given)
	b.weight.Store(int64(m.weight))
	b.effective.Store(0)
	if named && h.state == stateReady {
		b.effective.Store(int64(weight))
	}
	barred := h.state != stateReady || weight == 0 || g != nil && !named && !b.used()
	return b.barred.Swap(barred) != barred
}

// sourceText is what found the member; nil if the config names it.
func (m member) sourceText() *string {
	if m.source == "" {
		return nil
	}
	return &m.source
}

// finish makes the pickers what the change needs, and tells of it as g's. The
// registry's mutex is free by then. Nobody who comes after it finds an old picker.
func (t *turnover) finish(p *pool, g *generation) {
	for _, each := range t.outdated {
		each.rebuildNow()
	}
	for _, b := range t.revived {
		b.logTurn(g, nil)
	}
	t.lines.write(p.logger())
	p.changed()
}
