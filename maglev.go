package tcplb

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// The table's sizes, primes both. A hundred places for each unit of weight keep
// the shares within one per cent.
const (
	maglevSize      = 65537
	maglevLargeSize = 655373
	maglevUnits     = 655 // of weight, up to which the small one serves
)

// maglev is a table from places to backends. What is said of it in IPHash is a
// contract with other instances.
type maglev struct {
	candidates []Candidate // by name
	table      []uint32    // of indices into candidates
}

func newMaglev(available []Candidate) *maglev {
	t := &maglev{candidates: slices.Clone(available)}
	slices.SortFunc(t.candidates, func(a, b Candidate) int { return strings.Compare(a.Backend.address, b.Backend.address) })
	return t
}

func (t *maglev) sameAs(o *maglev) bool { return slices.Equal(t.candidates, o.candidates) }

// permutation is the order in which a backend prefers the places.
type permutation struct{ next, skip uint32 }

func newPermutation(name string, size uint64) permutation {
	var second xxhash.Digest
	second.ResetWithSeed(1)
	_, _ = second.WriteString(name)
	return permutation{
		next: uint32(xxhash.Sum64String(name) % size),
		skip: uint32(second.Sum64()%(size-1) + 1),
	}
}

// free is a place that is nobody's yet.
const free = math.MaxUint32

// fill gives out the places, one for each turn.
func (t *maglev) fill() {
	size := uint32(t.size())
	t.table = make([]uint32, size)
	for i := range t.table {
		t.table[i] = free
	}
	orders := make([]permutation, len(t.candidates))
	for i, c := range t.candidates {
		orders[i] = newPermutation(c.Backend.address, uint64(size))
	}
	turns := newTurns(t.candidates)
	for given := uint32(0); given < size; {
		for _, i := range turns.next() {
			p := &orders[i]
			for t.table[p.next] != free {
				if p.next += p.skip; p.next >= size {
					p.next -= size
				}
			}
			t.table[p.next] = uint32(i)
			if given++; given == size {
				break
			}
		}
	}
}

// turns tells who takes a turn, round by round. Candidates of one weight take
// theirs in the same rounds.
type turns struct {
	groups []turnGroup
	most   uint64 // the largest weight
	round  uint64
	due    []int
}

type turnGroup struct {
	weight  uint64
	goal    uint64 // of weight times rounds, for the next turn
	members []int  // ascending
}

func newTurns(candidates []Candidate) *turns {
	t := new(turns)
	byWeight := make(map[int]int)
	for i, c := range candidates {
		at, ok := byWeight[c.Weight]
		if !ok {
			at = len(t.groups)
			byWeight[c.Weight] = at
			t.groups = append(t.groups, turnGroup{weight: uint64(c.Weight)})
			t.most = max(t.most, uint64(c.Weight))
		}
		t.groups[at].members = append(t.groups[at].members, i)
	}
	return t
}

// next returns the candidates of the next round, ascending.
func (t *turns) next() []int {
	t.round++
	t.due = t.due[:0]
	groups := 0
	for i := range t.groups {
		g := &t.groups[i]
		if t.round*g.weight < g.goal {
			continue
		}
		g.goal += t.most
		t.due = append(t.due, g.members...)
		groups++
	}
	if groups > 1 {
		slices.Sort(t.due)
	}
	return t.due
}

func (t *maglev) size() int {
	units, divisor := 0, 0
	for _, c := range t.candidates {
		w := cmp.Or(c.Settled, c.Weight) // of another size, it would send all clients elsewhere
		units += w
		divisor = gcd(divisor, w)
	}
	switch {
	case units == 0:
		return 0
	case units/divisor <= maglevUnits:
		return maglevSize
	}
	return maglevLargeSize
}
