package discovery

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// targetsAtOnce is how many targets are looked up side by side.
const targetsAtOnce = 16

// serviceFinder finds the servers of SRV records.
type serviceFinder struct {
	name   string
	wanted families

	before  string           // what the name stood for in the last answer
	targets map[string]known // of the last answer
}

// services are the SRV records of one name.
type services struct {
	name    string
	records []*dns.SRV
	related []dns.RR
	ttl     time.Duration
}

func (f *serviceFinder) find(ctx context.Context, r *round) (result, error) {
	s, err := search(r.names(f.name), f.before, func(name string) (services, bool, error) {
		s, err := r.services(ctx, name)
		return s, len(s.records) > 0, err
	})
	if err != nil {
		return result{}, err
	}
	targets, ttl, failures, fresh := f.resolve(ctx, r, s)
	if fresh == 0 {
		return result{}, allOf(failures)
	}
	found, err := serversOf(s.records, targets).sorted()
	if err != nil {
		return result{}, err
	}
	f.before, f.targets = s.name, targets
	return result{found: found, ttl: min(s.ttl, ttl), partial: firstOf(failures)}, nil
}

// services asks for the SRV records of a fully qualified name. A record whose
// target is the root says that there is no service.
func (r *round) services(ctx context.Context, name string) (services, error) {
	if r.library != nil {
		return r.libraryServices(ctx, name)
	}
	all, err := r.resolve(ctx, name, dns.TypeSRV)
	if err != nil {
		return services{}, err
	}
	s := services{name: name, related: all.related, ttl: all.ttl}
	for _, rr := range all.found {
		if srv, ok := rr.(*dns.SRV); ok && srv.Target != "." && srv.Port != 0 {
			s.records = append(s.records, srv)
		}
	}
	return s, nil
}

func (r *round) libraryServices(ctx context.Context, name string) (services, error) {
	if err := r.slots.acquire(ctx); err != nil {
		return services{}, err
	}
	defer r.slots.release()
	_, found, err := r.library.LookupSRV(ctx, "", "", name)
	if err != nil && len(found) == 0 && !noSuchHost(err) {
		return services{}, fmt.Errorf("SRV %s: %w", name, err)
	}
	s := services{name: name, ttl: forever}
	for _, srv := range found {
		if srv.Target != "." && srv.Port != 0 {
			s.records = append(s.records, &dns.SRV{Target: srv.Target, Port: srv.Port, Priority: srv.Priority, Weight: srv.Weight})
		}
	}
	return s, nil
}

// resolve returns the addresses of all targets: of those that failed, or have
// none, what they had before. It counts those that have any now.
func (f *serviceFinder) resolve(ctx context.Context, r *round, s services) (targets map[string]known, ttl time.Duration, failures []error, fresh int) {
	targets, ttl = make(map[string]known), forever
	for _, srv := range s.records {
		name := dns.CanonicalName(srv.Target)
		targets[name] = f.targets[name]
	}
	related := f.related(s.related)
	var (
		mu   sync.Mutex
		wg   sync.WaitGroup
		free = make(semaphore, targetsAtOnce)
	)
	for _, name := range slices.Sorted(maps.Keys(targets)) {
		free <- struct{}{}
		wg.Go(func() {
			defer free.release()
			merged, life, err := f.targets[name].merge(name, f.target(ctx, r, name, related[name]))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failures = append(failures, targetError(name, err))
			}
			if merged.name != "" {
				targets[name], ttl = merged, min(ttl, life)
				fresh++
			}
		})
	}
	wg.Wait()
	slices.SortFunc(failures, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return targets, ttl, failures, fresh
}

// allOf is the error of a lookup without any answer. It is errNone only if each
// one is.
func allOf(failures []error) error {
	err := firstOf(failures)
	if slices.ContainsFunc(failures, func(err error) bool { return !errors.Is(err, errNone) }) {
		err = errors.New(oneLine(err))
	}
	return err
}

func targetError(name string, err error) error {
	if errors.Is(err, errNone) {
		return fmt.Errorf("target %s: %w", name, err)
	}
	return err // it has the name
}

// target returns the addresses of one target. Those that came with its record are
// not asked for.
func (f *serviceFinder) target(ctx context.Context, r *round, name string, came halves) halves {
	if addr, err := netip.ParseAddr(strings.TrimSuffix(name, ".")); err == nil {
		found, _ := inHalves([]netip.Addr{addr}, f.wanted) // no name, but plain what is meant
		return found
	}
	if found, ok := r.fromHostsFile(ctx, name, f.wanted); ok {
		return found
	}
	return r.addresses(ctx, name, f.wanted, came)
}

// related are the addresses of the wanted families that came with an answer, by
// their name.
func (f *serviceFinder) related(extra []dns.RR) map[string]halves {
	came := make(map[string]halves)
	for _, rr := range extra {
		name := dns.CanonicalName(rr.Header().Name)
		h, addrs := came[name], usable([]dns.RR{rr})
		switch {
		case len(addrs) == 0 || rr.Header().Class != dns.ClassINET:
			continue
		case rr.Header().Rrtype == dns.TypeA && f.wanted.v4:
			h.v4 = h.v4.with(addrs[0], lifetime(rr))
		case rr.Header().Rrtype == dns.TypeAAAA && f.wanted.v6:
			h.v6 = h.v6.with(addrs[0], lifetime(rr))
		}
		came[name] = h
	}
	return came
}

func (h half) with(addr netip.Addr, ttl time.Duration) half {
	if h.addrs == nil {
		h.ttl = ttl
	}
	return half{addrs: append(h.addrs, addr), ttl: min(h.ttl, ttl)}
}

// serversOf puts records and addresses together. Those of the lowest priority
// serve, all others are backups.
func serversOf(records []*dns.SRV, targets map[string]known) backends {
	lowest := records[0].Priority
	for _, srv := range records {
		lowest = min(lowest, srv.Priority)
	}
	var serving, spare []*dns.SRV
	for _, srv := range records {
		if srv.Priority == lowest {
			serving = append(serving, srv)
		} else {
			spare = append(spare, srv)
		}
	}
	all := make(backends)
	for i, records := range [][]*dns.SRV{serving, spare} {
		weight := weights(records)
		for _, srv := range records {
			for _, addr := range targets[dns.CanonicalName(srv.Target)].addrs() {
				all.add(netip.AddrPortFrom(addr, srv.Port), tier{backup: i == 1, weight: weight(srv.Weight)})
			}
		}
	}
	return all
}

// maxWeight is the greatest weight of a backend.
const maxWeight = 256

// weights returns how weights of SRV records, 0–65535, become those of backends,
// 1–256: as they are if they fit, and else in proportion, the greatest becoming
// 256. Beside others a 0 is "a very small chance of being selected" (RFC 2782):
// it becomes 1, and the others are taken in proportion as well.
func weights(records []*dns.SRV) func(uint16) int {
	greatest, zero := 0, false
	for _, srv := range records {
		greatest = max(greatest, int(srv.Weight))
		zero = zero || srv.Weight == 0
	}
	if greatest == 0 || greatest <= maxWeight && !zero {
		return func(w uint16) int { return max(1, int(w)) }
	}
	return func(w uint16) int { return max(1, (int(w)*maxWeight+greatest/2)/greatest) }
}
