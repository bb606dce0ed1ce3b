package tcplb

import (
	"cmp"
	"math"
	"net"
	"slices"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(RoundRobin{})
}

// SelectionPolicy decides which backend a connection goes to. Policies are
// guest modules in the namespace layer4.tcp_lb.selection_policies.
type SelectionPolicy interface {
	// NewPicker returns a picker over the available backends, in the order of
	// the config. prev is the picker that it takes over from, nil for the first;
	// another policy's may be passed after a reload. NewPicker is called again
	// whenever a backend's availability or weight changes.
	NewPicker(available []Candidate, prev Picker) Picker
}

// Picker picks backends out of a fixed set. It is used from many goroutines at
// once.
type Picker interface {
	// Pick returns an available backend for the client that is not among tried,
	// or nil if there is none. tried is empty but for a retry.
	Pick(client net.Addr, tried []*Backend) *Backend
}

// Candidate is a backend with its weight in one config.
type Candidate struct {
	Backend *Backend
	Weight  int // 1–256
}

// RoundRobin picks backends in turn, each as often as its weight says and as
// evenly spread as can be: the order of nginx's smooth weighted round robin.
// Every run of sum(weights)/gcd(weights) picks gives each backend its exact
// share while the set of available backends stands still.
type RoundRobin struct{}

// CaddyModule returns the Caddy module information.
func (RoundRobin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.round_robin",
		New: func() caddy.Module { return new(RoundRobin) },
	}
}

// UnmarshalCaddyfile reads the policy's name; it has no options.
func (RoundRobin) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // policy name
	if d.NextArg() {
		return d.Errf("takes no arguments, found %q", d.Val())
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("takes no block, found %q", d.Val())
	}
	return nil
}

// NewPicker implements SelectionPolicy. An unchanged set keeps its position in
// the rotation; a changed one goes on with the backend that was next.
func (RoundRobin) NewPicker(available []Candidate, prev Picker) Picker {
	old, _ := prev.(*rotation)
	if old != nil && slices.Equal(old.candidates, available) {
		old.confirm()
		return old
	}
	weights := make([]int, len(available))
	for i, c := range available {
		weights[i] = c.Weight
	}
	r := &rotation{candidates: slices.Clone(available), order: smoothOrder(weights)}
	if old != nil {
		r.cursor.Store(r.positionAfter(old))
	}
	r.confirm()
	return r
}

// rotation is an immutable schedule with an atomic cursor.
type rotation struct {
	candidates []Candidate
	order      []uint32 // indices into candidates; one period of the rotation
	confirmed  atomic.Uint64

	_      [64]byte // the cursor changes with every pick: keep it off the fields' cache line
	cursor atomic.Uint64
	_      [64]byte
}

// Pick implements Picker in O(1), without a lock or an allocation.
func (r *rotation) Pick(_ net.Addr, tried []*Backend) *Backend {
	if len(r.order) == 0 {
		return nil
	}
	i := (r.cursor.Add(1) - 1) % uint64(len(r.order))
	c := r.order[i]
	if b := r.candidates[c].Backend; len(tried) == 0 && (r.isConfirmed() || b.Available()) {
		return b
	}
	return r.pickFrom(i, tried)
}

// confirm finds all candidates available. Until a verdict changes, in this pool
// or another, they stay so, and a pick need not look at its backend: among
// thousands, that is in no near cache.
func (r *rotation) confirm() {
	now := verdicts.count.Load() + 1 // not 0
	for _, c := range r.candidates {
		if !c.Backend.Available() {
			now = 0
		}
	}
	r.confirmed.Store(now)
}

func (r *rotation) isConfirmed() bool { return r.confirmed.Load() == verdicts.count.Load()+1 }

// pickFrom finds the next untried backend at or after position i. It serves
// retries, and the moments between a verdict and the new schedule.
func (r *rotation) pickFrom(i uint64, tried []*Backend) *Backend {
	usable := func(b *Backend) bool { return b.Available() && !slices.Contains(tried, b) }
	// A short walk keeps the rotation's shares; a heavy backend can fill any
	// stretch of it, so then each candidate gets one look.
	n := uint64(len(r.order))
	for step := range min(n, 64) {
		if b := r.candidates[r.order[(i+step)%n]].Backend; usable(b) {
			return b
		}
	}
	first := int(r.order[i])
	for step := range r.candidates {
		if b := r.candidates[(first+step)%len(r.candidates)].Backend; usable(b) {
			return b
		}
	}
	return nil
}

// positionAfter returns where r goes on from old: at the backend that would
// have been next there, at about the same place in the period.
func (r *rotation) positionAfter(old *rotation) uint64 {
	if len(old.order) == 0 || len(r.order) == 0 {
		return old.cursor.Load()
	}
	index := make(map[*Backend]uint32, len(r.candidates))
	for i, c := range r.candidates {
		index[c.Backend] = uint32(i)
	}
	n, at := uint64(len(old.order)), old.cursor.Load()
	start := at % n * uint64(len(r.order)) / n
	for step := range n {
		next, ok := index[old.candidates[old.order[(at+step)%n]].Backend]
		if !ok {
			continue
		}
		for j := range uint64(len(r.order)) {
			if pos := (start + j) % uint64(len(r.order)); r.order[pos] == next {
				return pos
			}
		}
	}
	return start
}

// smoothOrder returns one period of smooth weighted round robin: sum(weights)/
// gcd(weights) indices into weights. It is the order of nginx
// (src/http/ngx_http_upstream_round_robin.c): at each step every entry gains
// its weight, the first entry with the highest value is taken, and that entry
// loses the sum of all weights.
//
// Entries of equal weight are taken in turn, so that one value stands for them
// all: w·t − total·round. The work is then per distinct weight, of which there
// are at most 256, and a run of picks that no other weight can interrupt is
// written in one go.
func smoothOrder(weights []int) []uint32 {
	if len(weights) == 0 {
		return nil
	}
	groups, total := groupByWeight(weights)
	order := make([]uint32, 0, total)
	for t := int64(1); t <= total; {
		best := 0
		for i := 1; i < len(groups); i++ {
			a, b := &groups[i], &groups[best]
			va, vb := a.value(t), b.value(t)
			if va > vb || va == vb && a.members[a.next] < b.members[b.next] {
				best = i
			}
		}
		g := &groups[best]
		run := uninterrupted(groups, best, t)
		order = append(order, g.members[g.next:g.next+run]...)
		t += int64(run)
		if g.next += run; g.next == len(g.members) {
			g.next = 0
			g.lost += total
		}
	}
	return order
}

// weightGroup is the entries of one weight.
type weightGroup struct {
	weight  int64
	members []uint32 // ascending
	next    int      // the member to be taken next in this round
	lost    int64    // total times the number of finished rounds
}

func (g *weightGroup) value(t int64) int64 { return g.weight*t - g.lost }

// groupByWeight returns the groups, heaviest first, with weights divided by
// their greatest common divisor, and the sum of all those weights.
func groupByWeight(weights []int) (groups []weightGroup, total int64) {
	divisor := 0
	for _, w := range weights {
		divisor = gcd(divisor, w)
	}
	byWeight := make(map[int64]int)
	for i, w := range weights {
		w := int64(w / divisor)
		at, ok := byWeight[w]
		if !ok {
			at = len(groups)
			byWeight[w] = at
			groups = append(groups, weightGroup{weight: w})
		}
		groups[at].members = append(groups[at].members, uint32(i))
		total += w
	}
	slices.SortFunc(groups, func(a, b weightGroup) int { return cmp.Compare(b.weight, a.weight) })
	return groups, total
}

// uninterrupted returns for how many steps from t on, at least one, the best
// group's members are taken: until its round ends, or a heavier group draws
// level. A lighter group, behind or level at t, falls further back.
func uninterrupted(groups []weightGroup, best int, t int64) int {
	g := &groups[best]
	run := int64(len(g.members) - g.next)
	v := g.value(t)
	for i := range best { // the heavier ones
		if run == 1 {
			break
		}
		h := &groups[i]
		behind, gain := v-h.value(t), h.weight-g.weight
		if behind < run*gain {
			run = max(1, (behind+gain-1)/gain)
		}
	}
	return int(min(run, math.MaxInt32))
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// Interface guards
var (
	_ SelectionPolicy       = (*RoundRobin)(nil)
	_ caddyfile.Unmarshaler = (*RoundRobin)(nil)
	_ Picker                = (*rotation)(nil)
)
