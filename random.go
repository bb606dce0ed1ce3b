package tcplb

import (
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(Random{})
	caddy.RegisterModule(new(RandomChoose))
}

// Random picks each backend with the probability that its weight says.
type Random struct{}

// CaddyModule returns the Caddy module information.
func (Random) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.random",
		New: func() caddy.Module { return new(Random) },
	}
}

// UnmarshalCaddyfile reads the policy's name; it has no options.
func (Random) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return onlyName(d) }

// NewPicker implements SelectionPolicy.
func (Random) NewPicker(available []Candidate, _ Picker) Picker { return newLottery(available) }

// RandomChoose draws some backends at random, by their weights, and picks the
// one of them with the fewest open or connecting connections per weight: the
// power of two choices (Mitzenmacher, IEEE TPDS 12(10), 2001). It spreads nearly as well
// as least_conn, and balancers that don't know of each other don't all choose
// the same backend.
type RandomChoose struct {
	// Choose is how many backends are drawn, 2–100. Default and 0: 2.
	Choose int `json:"choose,omitempty"`
}

const (
	defaultChoose = 2
	maxChoose     = 100
)

// CaddyModule returns the Caddy module information.
func (*RandomChoose) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.random_choose",
		New: func() caddy.Module { return new(RandomChoose) },
	}
}

// Provision fills in the default.
func (c *RandomChoose) Provision(caddy.Context) error {
	setDefault(&c.Choose, defaultChoose)
	return nil
}

// Validate refuses a number out of range.
func (c *RandomChoose) Validate() error { return checkRange("choose", c.Choose, 2, maxChoose) }

// UnmarshalCaddyfile reads
//
//	random_choose [<2-100>]
func (c *RandomChoose) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // policy name
	if d.NextArg() {
		n, err := strconv.Atoi(d.Val())
		if err == nil {
			err = checkRange("random_choose", n, 2, maxChoose)
		} else {
			err = fmt.Errorf("random_choose %s: want a number from 2 to %d", d.Val(), maxChoose)
		}
		if err != nil {
			return d.WrapErr(err)
		}
		c.Choose = n
	}
	if d.NextArg() {
		return d.Errf("random_choose %d: one value is enough, found %q", c.Choose, d.Val())
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("takes no block, found %q", d.Val())
	}
	return nil
}

// NewPicker implements SelectionPolicy.
func (c *RandomChoose) NewPicker(available []Candidate, _ Picker) Picker {
	return &bestOfSome{lottery: newLottery(available), choose: c.Choose}
}

// lottery draws candidates by their weights in O(1): the alias method (Walker,
// 1977; built as by Vose, 1991), in whole numbers.
type lottery struct {
	candidates []Candidate
	tickets    []ticket
}

// ticket stands for one n-th of all: a part of it, out of 2^64, is the
// candidate's of the same index, and the rest another's.
type ticket struct {
	own   uint64
	other uint32
}

func newLottery(available []Candidate) *lottery {
	n := uint64(len(available))
	l := &lottery{candidates: slices.Clone(available), tickets: make([]ticket, n)}
	var total uint64
	for _, c := range available {
		total += uint64(c.Weight)
	}
	// left is what each has yet to be given, in units of which a ticket has total.
	left := make([]uint64, n)
	var small, large []uint32
	for i, c := range available {
		left[i] = uint64(c.Weight) * n
		if left[i] < total {
			small = append(small, uint32(i))
		} else {
			large = append(large, uint32(i))
		}
	}
	for len(small) > 0 { // then there is a large one, as the sums are equal
		s, g := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		own, _ := bits.Div64(left[s], 0, total)
		l.tickets[s] = ticket{own: own, other: g}
		left[g] -= total - left[s]
		if left[g] < total {
			large = large[:len(large)-1]
			small = append(small, g)
		}
	}
	for _, g := range large {
		l.tickets[g] = ticket{own: math.MaxUint64, other: g}
	}
	return l
}

// draw returns the index of a candidate; there must be one.
func (l *lottery) draw() int {
	i, part := bits.Mul64(rand.Uint64(), uint64(len(l.tickets)))
	if t := &l.tickets[i]; part >= t.own {
		return int(t.other)
	}
	return int(i)
}

// maxDraws is how many draws may find what can't be taken before all are looked
// at in turn. Drawing again keeps the shares of the rest.
const maxDraws = 16

// Pick implements Picker.
func (l *lottery) Pick(r *Request) *Backend {
	if len(l.candidates) == 0 {
		return nil
	}
	for range maxDraws {
		if b := l.candidates[l.draw()].Backend; r.Take(b) {
			return b
		}
	}
	start := rand.IntN(len(l.candidates))
	for i := range l.candidates {
		if b := l.candidates[(start+i)%len(l.candidates)].Backend; r.Take(b) {
			return b
		}
	}
	return nil
}

// bestOfSome is a lottery of which the least loaded of some draws is taken.
type bestOfSome struct {
	*lottery
	choose int
}

// Pick implements Picker.
func (s *bestOfSome) Pick(r *Request) *Backend {
	n := len(s.candidates)
	if n == 0 {
		return nil
	}
	var room [8]loadedCandidate // larger numbers are on the heap
	drawn := room[:0]
	for range 2 * s.choose { // some come twice
		i := s.draw()
		if !slices.ContainsFunc(drawn, func(d loadedCandidate) bool { return d.index == i }) {
			drawn = append(drawn, loadedCandidate{i, perWeight(s.candidates[i])})
		}
		if len(drawn) == min(s.choose, n) {
			break
		}
	}
	for len(drawn) > 0 {
		least := 0
		for i, d := range drawn {
			if d.load < drawn[least].load {
				least = i
			}
		}
		if b := s.candidates[drawn[least].index].Backend; r.Take(b) {
			return b
		}
		drawn = slices.Delete(drawn, least, least+1)
	}
	return s.lottery.Pick(r)
}

type loadedCandidate struct {
	index int
	load  float64
}

// perWeight is the candidate's load for each unit of its weight.
func perWeight(c Candidate) float64 { return float64(c.Backend.Load()) / float64(c.Weight) }

// Interface guards
var (
	_ SelectionPolicy       = (*Random)(nil)
	_ caddyfile.Unmarshaler = (*Random)(nil)
	_ SelectionPolicy       = (*RandomChoose)(nil)
	_ caddyfile.Unmarshaler = (*RandomChoose)(nil)
	_ caddy.Provisioner     = (*RandomChoose)(nil)
	_ caddy.Validator       = (*RandomChoose)(nil)
)
