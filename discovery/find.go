package discovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// maxFound is how many backends a source may find. An answer with more is a
// mistake, or worse.
const maxFound = 10_000

// finder does the lookups of a source, one at a time, and remembers what each
// part of the last answer was.
type finder interface {
	// find returns an error and nothing else if there is no answer that can take
	// the place of the last one.
	find(ctx context.Context, r *round) (result, error)
}

// result is what a lookup found.
type result struct {
	found   []Found       // sorted, each address once; not empty
	ttl     time.Duration // the least of all records
	partial error         // what failed, and keeps what it had; nil = nothing
}

// addressFinder finds the addresses of a name.
type addressFinder struct {
	name   string
	port   uint16
	wanted families

	known known
}

func (f *addressFinder) find(ctx context.Context, r *round) (result, error) {
	a, err := f.answer(ctx, r)
	if err != nil {
		return result{}, err
	}
	backends := make(backends)
	for _, addr := range a.addrs() {
		backends.add(netip.AddrPortFrom(addr, f.port), tier{})
	}
	found, err := backends.sorted()
	if err != nil {
		return result{}, err
	}
	f.known = a.known
	return result{found: found, ttl: a.ttl, partial: a.partial}, nil
}

// answer is known with what else there is to say of it.
type answer struct {
	known
	ttl     time.Duration
	partial error
}

func (f *addressFinder) answer(ctx context.Context, r *round) (answer, error) {
	merge := func(name string, found halves) (answer, bool, error) {
		merged, ttl, err := f.known.merge(name, found)
		return answer{merged, ttl, err}, merged.name != "", err
	}
	if found, ok := r.fromHostsFile(ctx, f.name, f.wanted); ok {
		a, _, _ := merge(f.name, found)
		return a, nil
	}
	return search(r.names(f.name), f.known.name, func(name string) (answer, bool, error) {
		return merge(name, r.addresses(ctx, name, f.wanted, halves{}))
	})
}

// tier is where a backend belongs.
type tier struct {
	backup bool
	weight int // 0 = not said
}

// backends are collected here, each once.
type backends map[netip.AddrPort]tier

// add adds a backend, the ordinary ones before the backups. Of one that is there
// already the first counts, and of the same tier the heavier.
func (b backends) add(address netip.AddrPort, t tier) {
	old, ok := b[address]
	if !ok || old.backup == t.backup && old.weight < t.weight {
		b[address] = t
	}
}

func (b backends) sorted() ([]Found, error) {
	if len(b) > maxFound {
		return nil, fmt.Errorf("%d backends, more than %d can't be meant", len(b), maxFound)
	}
	addresses := make([]netip.AddrPort, 0, len(b))
	for address := range b {
		addresses = append(addresses, address)
	}
	slices.SortFunc(addresses, func(x, y netip.AddrPort) int {
		return cmp.Or(x.Addr().Compare(y.Addr()), cmp.Compare(x.Port(), y.Port()))
	})
	found := make([]Found, len(addresses))
	for i, address := range addresses {
		found[i] = Found{Address: address.String(), Weight: b[address].weight, Backup: b[address].backup}
	}
	return found, nil
}

// firstOf joins some errors, and counts the others.
func firstOf(failures []error) error {
	const few = 3
	if more := len(failures) - few; more > 0 {
		return errors.Join(append(slices.Clone(failures[:few]), fmt.Errorf("and %d more", more))...)
	}
	return errors.Join(failures...)
}

// oneLine is for a log's field, and for JSON.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
