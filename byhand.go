package tcplb

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

// handState is what an operator has a backend do, apart from its health.
type handState uint8

const (
	stateReady handState = iota // as its checks say
	stateDrain                  // no new connections; open ones and checks go on
	stateMaint                  // as if it had left the config
	numStates
)

var stateNames = [numStates]string{stateReady: "ready", stateDrain: "drain", stateMaint: "maint"}

func (s handState) String() string { return stateNames[s] }

// parseHandState is the inverse of String.
func parseHandState(name string) (handState, error) {
	if i := slices.Index(stateNames[:], name); i >= 0 {
		return handState(i), nil
	}
	return 0, fmt.Errorf("state %q: want one of %s", name, strings.Join(stateNames[:], ", "))
}

// hand is what has been set by hand for a backend. It is the operator's: it is
// kept over reloads and while no config names the backend, and gone with the
// process. The zero value is that nothing has.
type hand struct {
	state    handState
	weight   int
	weighted bool      // weight holds instead of the config's
	since    time.Time // of a state other than ready
}

func (h hand) weightOr(configured int) int {
	if h.weighted {
		return h.weight
	}
	return configured
}

// handChange is what an operator changes; nil and false leave a thing as it is.
type handChange struct {
	state       *handState
	weight      *int // 0–256
	resetWeight bool // to the config's
}

func (c handChange) applyTo(h hand) hand {
	if c.state != nil {
		h.state = *c.state
	}
	if c.weight != nil {
		h.weight, h.weighted = *c.weight, true
	}
	if c.resetWeight {
		h.weight, h.weighted = 0, false
	}
	return h
}

// errNoMatch is that no backend has the name of pool and the address.
var errNoMatch = errors.New("no such backend")

// setByHand changes the state or the weight of all backends of the pool lb, of
// any pool if that is empty, that have the address, any address if that is
// empty. These are backends that a running config names or that are drained.
// It returns them, by pool and address; all are changed, or none is.
func (r *poolRegistry) setByHand(lb, address string, c handChange) ([]*Backend, error) {
	if c.weight != nil {
		if err := checkRange("weight", *c.weight, 0, maxWeight); err != nil {
			return nil, err
		}
	}
	if t, err := parseTarget(address); err == nil {
		address = t.String()
	}
	r.mu.Lock()
	var (
		matched []*Backend
		changes []func()
	)
	for _, name := range slices.Sorted(maps.Keys(r.pools)) {
		p := r.pools[name]
		if lb != "" && lb != name {
			continue
		}
		backends := p.matchLocked(address)
		if len(backends) == 0 {
			continue
		}
		matched = append(matched, backends...)
		if t, changed := r.setEachLocked(p, backends, c); changed {
			g := p.newest.Load()
			changes = append(changes, func() { t.finish(p, g) })
		}
	}
	r.mu.Unlock()
	for _, finish := range changes {
		finish()
	}
	if len(matched) == 0 {
		return nil, errNoMatch
	}
	return matched, nil
}

// matchLocked returns the backends of the address, all if that is empty, sorted.
func (p *pool) matchLocked(address string) []*Backend {
	if address == "" {
		return p.sortedLocked()
	}
	if b := p.backends[address]; b != nil {
		return []*Backend{b}
	}
	return nil
}

// setEachLocked applies the change to backends of one pool, and reports whether
// that changed anything.
func (r *poolRegistry) setEachLocked(p *pool, backends []*Backend, c handChange) (t turnover, changed bool) {
	until := p.drainUntilLocked()
	var lines logLines
	for _, b := range backends {
		was := b.byHand()
		is := c.applyTo(was)
		if is == was {
			continue
		}
		changed = true
		if is.since = was.since; is.state != was.state {
			is.since = time.Now()
		}
		if is.state == stateReady {
			is.since = time.Time{}
		}
		r.setHandLocked(b, is)
		open := 0
		switch {
		case is.state == was.state:
		case is.state == stateMaint:
			open = b.park(until)
		case was.state == stateMaint:
			b.unpark()
		}
		lines.setByHand(b, was, is, open)
		b.emitLocked("state_changed", map[string]any{
			"lb": p.name, "backend": b.address,
			"state": is.state.String(), "previous_state": was.state.String(),
			"weight": is.weightOr(b.given), "previous_weight": was.weightOr(b.given),
		})
	}
	if changed {
		t.slowly = true
		r.settleLocked(p, &t)
		// The weights themselves may have changed, too.
		t.outdated = slices.Clone(p.generations)
		t.lines = lines
	}
	return t, changed
}

// drainUntilLocked is when connections are cut whose drain begins now.
func (p *pool) drainUntilLocked() time.Time {
	if g := p.newest.Load(); g != nil {
		return time.Now().Add(g.drainTimeout)
	}
	return p.drainLimit()
}

func (l *logLines) setByHand(b *Backend, was, is hand, drained int) {
	fields := []zap.Field{
		zap.String("lb", b.pool.name), zap.String("backend", b.address),
		zap.Stringer("state", is.state), zap.Stringer("previous_state", was.state),
		zap.Int("weight", is.weightOr(b.given)), zap.Int("previous_weight", was.weightOr(b.given)),
	}
	if drained > 0 {
		fields = append(fields, zap.Int("connections", drained))
	}
	l.add("backend was set by hand", fields...)
}

func (r *poolRegistry) setHandLocked(b *Backend, h hand) {
	key := seriesKey{b.pool.name, b.address}
	b.hand.Store(&h)
	if h == (hand{}) {
		delete(r.hands, key)
		return
	}
	r.hands[key] = h
}

// byHand returns what has been set for b by hand.
func (b *Backend) byHand() hand {
	if h := b.hand.Load(); h != nil {
		return *h
	}
	return hand{}
}

// park gives b's open connections until then. It returns how many there are.
func (b *Backend) park(until time.Time) (open int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.startDrainingLocked(until)
}

// unpark makes b as a backend that joins: what its checks said is long ago.
func (b *Backend) unpark() {
	b.mu.Lock()
	if b.users > 0 {
		b.stopDrainingLocked()
	}
	b.mu.Unlock()
	b.forgetChecks()
}

// forgetChecks makes b one that has yet to be checked.
func (b *Backend) forgetChecks() {
	if b.setHealthy(true) && !b.untold {
		b.stats.turnedUp.Add(1) // so that the two kinds of turns go on to balance
	}
	b.fresh, b.untold = true, false
	b.lastCheck.Store(0)
	b.lastError.Store(nil)
}
