package tcplb

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
)

// lookupTimeout ends a lookup. It is what Go's resolver takes by default to
// ask three servers twice.
const lookupTimeout = 30 * time.Second

// A lookup has up to two sockets open, which are of the files' reserve. Those
// of names in trouble, which may each take lookupTimeout, don't hold up the rest.
var lookupSlots, troubleSlots = newLookupSlots(files.OpenLimit())

func newLookupSlots(limit uint64) (all, trouble semaphore) {
	n := 16
	if limit > 0 {
		n = int(min(16, max(4, limit/64)))
	}
	return newSemaphore(n - n/4), newSemaphore(n / 4)
}

// semaphore bounds how many lookups are under way at once.
type semaphore chan struct{}

func newSemaphore(n int) semaphore { return make(semaphore, n) }

// acquire waits for a slot; it reports false when ctx ended first.
func (s semaphore) acquire(ctx context.Context) bool {
	select {
	case s <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s semaphore) release() { <-s }

// answer is what a lookup found.
type answer struct {
	addrs []netip.Addr
	whole bool // both families were answered, if only to say that there is none
}

// resolver is strict: where a server fails to answer for one family, or for one
// of the search domains, it does not take what else there is for the answer.
// Two things are beyond it: a server that refuses, rather than fails, counts as
// asked where a search domain is left; and a server that is not the name's and
// doesn't ask others, but knows EDNS, counts as one that has no such host.
var resolver = net.Resolver{PreferGo: true, StrictErrors: true}

// lookupHost asks Go's resolver. If a part of the answer failed, what there is
// of it counts. "No such host" is an answer only when no part failed.
func lookupHost(ctx context.Context, host string) (answer, error) {
	a := answer{whole: true}
	ips, err := resolver.LookupIPAddr(ctx, host)
	switch {
	case isNotFound(err):
		err = notFound(ctx, host, err)
	case isTemporary(err):
		lenient := net.Resolver{PreferGo: true, Dial: resolver.Dial}
		if some, lenientErr := lenient.LookupIPAddr(ctx, host); lenientErr == nil {
			ips, err, a.whole = some, nil, false
		}
	}
	if err != nil {
		return answer{}, err
	}
	for _, ip := range ips {
		if addr, ok := netip.AddrFromSlice(ip.IP); ok {
			a.addrs = append(a.addrs, addr.Unmap().WithZone(ip.Zone))
		}
	}
	if len(a.addrs) == 0 { // as of names that must not be asked for
		return answer{}, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return a, nil
}

// notFound asks for each family alone whether there is no such host: of both
// together Go's resolver may say so where only one has said it and the other
// failed. It returns err if it is so.
func notFound(ctx context.Context, host string, err error) error {
	for _, family := range []string{"ip4", "ip6"} {
		switch _, familyErr := resolver.LookupIP(ctx, family, host); {
		case familyErr == nil: // there is, since just now
			return &net.DNSError{Err: "contradicting answers", Name: host, IsTemporary: true}
		case !isNotFound(familyErr):
			return familyErr
		}
	}
	return err
}

func isTemporary(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.Temporary()
}

func isNotFound(err error) bool {
	var dns *net.DNSError
	return errors.As(err, &dns) && dns.IsNotFound
}
