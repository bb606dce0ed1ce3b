package tcplb

import (
	"math/rand/v2"
	"net/netip"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"
)

func init() {
	caddy.RegisterModule(IPHash{})
}

// IPHash sends each client's address to the same backend, by Maglev hashing
// (Eisenbud et al., NSDI 2016). While the backends are the same, every instance
// chooses alike, over restarts and whatever the order of its config; where one
// comes or goes, few clients of the others move.
//
// The address is the one that a PROXY protocol handler in front gave, if there is
// one. Of an IPv6 address the first 64 bits count, and an IPv4 address that is
// mapped to IPv6 is taken for what it is. Clients without an address, of a Unix
// socket, are spread at random.
//
// So that others can compute it: a backend's name is its address as in the
// metrics' label, and backends take turns in the order of their names. The
// table has 65,537 places or, where the sum of weights, divided by their greatest
// common divisor, is above 655, 655,373. With xxHash64 of seed 0 and seed 1,
// h0 and h1, of the name, a backend prefers the places
// (h0 mod M + j·(h1 mod (M-1) + 1)) mod M for j = 0, 1, 2, …; in each round it takes a turn
// if its weight times the number of rounds so far, this one included, has reached
// its goal, and the goal then grows by the largest weight from that.
// A client's place is xxHash64 of seed 0 of its address, 4 or 8
// bytes, mod M; where that backend can't be had, the next places are asked.
type IPHash struct{}

// CaddyModule returns the Caddy module information.
func (IPHash) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.ip_hash",
		New: func() caddy.Module { return new(IPHash) },
	}
}

// UnmarshalCaddyfile reads the policy's name; it has no options.
func (IPHash) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return onlyName(d) }

// NewPicker implements SelectionPolicy.
func (IPHash) NewPicker(available []Candidate, prev Picker) Picker {
	t := newMaglev(available)
	if old, ok := prev.(*maglev); ok && old.sameAs(t) {
		return old
	}
	t.fill()
	return t
}

// Pick implements Picker.
func (t *maglev) Pick(r *Request) *Backend {
	if len(t.candidates) == 0 {
		return nil
	}
	at := t.placeOf(r.Client().Addr())
	if b := t.at(at); r.Take(b) {
		return b
	}
	// The places behind are in no order, so that another client of this backend
	// goes elsewhere; nearly all backends are within the first few times their number.
	for i := uint64(1); i <= min(uint64(4*len(t.candidates)), uint64(len(t.table))-1); i++ {
		if b := t.at((at + i) % uint64(len(t.table))); r.Take(b) {
			return b
		}
	}
	for _, c := range t.candidates {
		if r.Take(c.Backend) {
			return c.Backend
		}
	}
	return nil
}

func (t *maglev) at(place uint64) *Backend { return t.candidates[t.table[place]].Backend }

// placeOf returns a client's place in the table.
func (t *maglev) placeOf(client netip.Addr) uint64 {
	m := uint64(len(t.table))
	client = client.Unmap()
	switch {
	case client.Is4():
		a := client.As4()
		return xxhash.Sum64(a[:]) % m
	case client.Is6():
		a := client.As16()
		return xxhash.Sum64(a[:8]) % m
	}
	return rand.Uint64N(m)
}

// Interface guards
var (
	_ SelectionPolicy       = (*IPHash)(nil)
	_ caddyfile.Unmarshaler = (*IPHash)(nil)
)
