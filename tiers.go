package tcplb

import (
	"runtime/debug"
	"slices"
	"time"

	"go.uber.org/zap"
)

// A pool's backends are in two tiers: the backups are asked only while no ordinary
// backend is available. Each has a picker of its own.
const (
	ordinary = iota
	backups
	numTiers
)

// tiers are the pickers of one moment.
type tiers [numTiers]selection

// selection is a tier's picker, and what it wants to be told.
type selection struct {
	picker   Picker
	observer LoadObserver // nil: nothing
	empty    bool         // there was nothing to pick from
}

func (g *generation) currentTiers() tiers {
	if t := g.pickers.Load(); t != nil {
		return *t
	}
	return tiers{}
}

// pick takes a backend for the connection; nil if none can be had.
func (g *generation) pick(r *Request) *Backend {
	t := g.pickers.Load()
	if t == nil {
		return nil
	}
	b := r.pickBy(t[ordinary].picker)
	if b == nil && !t[backups].empty && (t[ordinary].empty || !g.hasOrdinaryFor(r)) {
		b = r.pickBy(t[backups].picker)
	}
	if b == nil {
		b = r.adoptGone()
	}
	r.gone = nil
	if newest := g.pool.newest.Load(); b != nil && newest != g && newest != nil {
		newest.loadChanged(b)
	}
	return b
}

// hasOrdinaryFor reports whether an ordinary backend is available that was not
// tried. It may be full: that is no reason to take a backup.
func (g *generation) hasOrdinaryFor(r *Request) bool {
	return slices.ContainsFunc(g.members(), func(m enrolled) bool {
		return !m.backup && m.Backend.Available() && !slices.Contains(r.tried, m.Backend)
	})
}

// loadChanged tells the pickers that wanted to know.
func (g *generation) loadChanged(b *Backend) {
	t := g.pickers.Load()
	if t == nil {
		return
	}
	for i := range t {
		if o := t[i].observer; o != nil {
			g.tell(o, b)
		}
	}
}

func (g *generation) tell(o LoadObserver, b *Backend) {
	defer func() {
		if v := recover(); v != nil {
			g.logger.Error("panic in the selection policy, which was told of a backend's load",
				zap.String("lb", g.name), zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
		}
	}()
	o.LoadChanged(b)
}

// buildLocked leaves out backends of weight 0, which get no new connections.
func (g *generation) buildLocked(prev tiers) {
	var available [numTiers][]Candidate
	for _, m := range g.members() {
		tier := ordinary
		if m.backup {
			tier = backups
		}
		if weight := m.Backend.byHand().weightOr(m.weight); weight > 0 && m.Backend.Available() {
			available[tier] = append(available[tier], Candidate{Backend: m.Backend, Weight: weight})
		}
	}
	if g.slowStart > 0 {
		now := time.Now()
		for _, list := range available {
			weighSlowStarts(list, now)
		}
	}
	t := new(tiers)
	for i := range t {
		if i == backups && !g.hasBackups() {
			t[i].empty = true
			break
		}
		p := g.newPicker(available[i], prev[i].picker)
		t[i] = selection{picker: p, empty: len(available[i]) == 0}
		t[i].observer, _ = p.(LoadObserver)
	}
	g.pickers.Store(t)
	for i := range t {
		if o := t[i].observer; o != nil { // it was made from loads that may have changed since
			for _, c := range available[i] {
				g.tell(o, c.Backend)
			}
		}
	}
}

func (g *generation) hasAvailable() bool {
	return slices.ContainsFunc(g.members(), func(m enrolled) bool { return m.Backend.Available() })
}

func (g *generation) hasBackups() bool {
	return slices.ContainsFunc(g.members(), func(m enrolled) bool { return m.backup })
}

// newPicker asks the policy, which may be anybody's module. Where that panics, or
// returns none, round robin serves.
func (g *generation) newPicker(available []Candidate, prev Picker) (p Picker) {
	defer func() {
		v := recover()
		if v != nil {
			g.logger.Error("panic in the selection policy, picking by round robin meanwhile",
				zap.String("lb", g.name), zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
		}
		if v != nil || p == nil {
			p = RoundRobin{}.NewPicker(available, prev)
		}
	}()
	return g.policy.NewPicker(available, prev)
}
