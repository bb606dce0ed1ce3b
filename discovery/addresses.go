package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// errNone is that there is no such name, or nothing of use under it.
var errNone = errors.New("no such name, or no address under it")

// families are the ones that are asked for.
type families struct{ v4, v6 bool }

// half is what one lookup found of one family.
type half struct {
	addrs []netip.Addr // none without an error = there are none
	ttl   time.Duration
	err   error
}

// halves is what it found of both.
type halves struct{ v4, v6 half }

// known is what lookups of a name found last, each family by itself.
type known struct {
	name   string // that was asked for in the end; empty = nothing is known
	v4, v6 []netip.Addr
}

func (k known) addrs() []netip.Addr {
	return append(append([]netip.Addr(nil), k.v4...), k.v6...)
}

// merge puts what was found now in the place of what was known. A half that
// failed keeps what it had. It is of no use, with an error, if neither half has an
// address: one that is not there may be gone, or be in the half that failed.
func (k known) merge(name string, found halves) (merged known, ttl time.Duration, err error) {
	err = errors.Join(found.v4.err, found.v6.err)
	if len(found.v4.addrs)+len(found.v6.addrs) == 0 {
		if err == nil {
			err = errNone
		}
		return known{}, 0, err
	}
	merged = known{name: name, v4: found.v4.addrs, v6: found.v6.addrs}
	ttl = forever
	if found.v4.err == nil {
		ttl = min(ttl, found.v4.ttl)
	} else if k.name == name {
		merged.v4 = k.v4
	}
	if found.v6.err == nil {
		ttl = min(ttl, found.v6.ttl)
	} else if k.name == name {
		merged.v6 = k.v6
	}
	return merged, ttl, err
}

// addresses asks for those of a fully qualified name, but for a half that is
// there already.
func (r *round) addresses(ctx context.Context, name string, wanted families, have halves) halves {
	var wg sync.WaitGroup
	if wanted.v4 && have.v4.addrs == nil {
		wg.Go(func() { have.v4 = r.half(ctx, name, dns.TypeA) })
	}
	if wanted.v6 && have.v6.addrs == nil {
		wg.Go(func() { have.v6 = r.half(ctx, name, dns.TypeAAAA) })
	}
	wg.Wait()
	return have
}

func (r *round) half(ctx context.Context, name string, kind uint16) half {
	if r.library != nil {
		return r.libraryHalf(ctx, name, kind)
	}
	all, err := r.resolve(ctx, name, kind)
	if err != nil {
		return half{err: err}
	}
	return half{addrs: usable(all.found), ttl: all.ttl}
}

func (r *round) libraryHalf(ctx context.Context, name string, kind uint16) half {
	if err := r.slots.acquire(ctx); err != nil {
		return half{err: err}
	}
	defer r.slots.release()
	network := "ip4"
	if kind == dns.TypeAAAA {
		network = "ip6"
	}
	found, err := r.library.LookupNetIP(ctx, network, name)
	if noSuchHost(err) {
		return half{ttl: forever}
	}
	if err != nil {
		return half{err: fmt.Errorf("%s %s: %w", dns.Type(kind), name, err)}
	}
	h := half{ttl: forever}
	for _, addr := range found {
		if addr = addr.Unmap(); connectable(addr) {
			h.addrs = append(h.addrs, addr)
		}
	}
	return h
}

func noSuchHost(err error) bool {
	var failure *net.DNSError
	return errors.As(err, &failure) && failure.IsNotFound
}

// fromHostsFile returns what the hosts file has of a name, if that is asked at all.
func (r *round) fromHostsFile(ctx context.Context, name string, wanted families) (found halves, ok bool) {
	if !r.hosts {
		return halves{}, false
	}
	return inHalves(lookupHostsFile(ctx, strings.TrimSuffix(name, ".")), wanted)
}

// inHalves takes addresses without a TTL apart. It reports false if none is wanted.
func inHalves(addrs []netip.Addr, wanted families) (found halves, ok bool) {
	found = halves{v4: half{ttl: forever}, v6: half{ttl: forever}}
	for _, addr := range addrs {
		switch addr = addr.Unmap(); {
		case !connectable(addr):
		case addr.Is4() && wanted.v4:
			found.v4.addrs = append(found.v4.addrs, addr)
		case addr.Is6() && wanted.v6:
			found.v6.addrs = append(found.v6.addrs, addr)
		}
	}
	return found, len(found.v4.addrs)+len(found.v6.addrs) > 0
}

// usable returns the addresses of A or AAAA records.
func usable(records []dns.RR) (addrs []netip.Addr) {
	for _, rr := range records {
		var ip net.IP
		switch rr := rr.(type) {
		case *dns.A:
			ip = rr.A
		case *dns.AAAA:
			ip = rr.AAAA
		}
		if addr, ok := netip.AddrFromSlice(ip); ok && connectable(addr.Unmap()) {
			addrs = append(addrs, addr.Unmap())
		}
	}
	return addrs
}

// connectable is false for what is no server's address, such as 0.0.0.0, which some
// name servers give for names that they block, and which leads to this machine.
func connectable(addr netip.Addr) bool {
	return addr.IsValid() && !addr.IsUnspecified() && !addr.IsMulticast() && addr != broadcast && !(addr.Is6() && addr.IsLinkLocalUnicast())
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// search asks for what a name may stand for, one after the other, until one is
// there. Where one failed, a later one may not take its place, unless it had it
// before: it may be somebody else's.
func search[T any](names []string, before string, ask func(name string) (found T, ok bool, err error)) (found T, err error) {
	var failure error
	for _, name := range names {
		found, ok, err := ask(name)
		if ok && (failure == nil || before == "" || before == name) {
			return found, nil
		}
		if failure == nil && err != nil && !errors.Is(err, errNone) {
			failure = err
		}
	}
	if failure == nil {
		failure = errNone
	}
	return found, failure
}
