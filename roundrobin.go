package tcplb

import (
	"cmp"
	"math"
	"slices"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(RoundRobin{})
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
func (RoundRobin) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return onlyName(d) }

// NewPicker implements SelectionPolicy. An unchanged set keeps its position in
// the rotation; a changed one goes on with the backend that was next.
func (RoundRobin) NewPicker(available []Candidate, prev Picker) Picker {
	old, _ := prev.(*rotation)
	if old != nil && slices.Equal(old.candidates, available) {
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
	return r
}

// rotation is an immutable schedule with an atomic cursor.
type rotation struct {
	candidates []Candidate
	order      []uint32 // indices into candidates; one period of the rotation

	_      [64]byte // the cursor changes with every pick: keep it off the fields' cache line
	cursor atomic.Uint64
	_      [64]byte
}

// Pick implements Picker, without a lock or an allocation. It is O(1) where few
// backends have to be passed over. A backend that is passed over loses its turn,
// so that the others keep their shares of the rest.
func (r *rotation) Pick(q *Request) *Backend {
	n := uint64(len(r.order))
	for range min(n, 64) {
		i := (r.cursor.Add(1) - 1) % n
		if b := r.candidates[r.order[i]].Backend; q.Take(b) {
			return b
		}
	}
	// A heavy backend can fill any stretch of the order, so then each candidate
	// gets one look.
	first := int(r.cursor.Load() % uint64(max(1, len(r.candidates))))
	for step := range r.candidates {
		if b := r.candidates[(first+step)%len(r.candidates)].Backend; q.Take(b) {
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
