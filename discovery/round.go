package discovery

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// maxAliases is how many CNAME records may lead to an answer.
const maxAliases = 16

// A question has a socket open, which is of the files' reserve. Those of names in
// trouble, whose servers may be silent, don't hold up the rest.
var slots, troubleSlots = make(semaphore, 8), make(semaphore, 4)

// semaphore bounds how many questions are under way at once.
type semaphore chan struct{}

// acquire waits for a slot; it returns an error when ctx ended first.
func (s semaphore) acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return endOf(ctx)
	}
}

func (s semaphore) release() { <-s }

// round is one lookup with all its questions.
type round struct {
	servers
	slots semaphore

	mu     sync.Mutex
	silent map[string]bool // servers that let a question time out: from now on they are asked last
}

func newRound(s servers, slots semaphore) *round {
	return &round{servers: s, slots: slots, silent: make(map[string]bool)}
}

// order returns the servers as they are to be asked.
func (r *round) order() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var first, last []string
	for _, address := range r.nameServers {
		if r.silent[address] {
			last = append(last, address)
		} else {
			first = append(first, address)
		}
	}
	return append(first, last...)
}

// query asks one server after the other until one answers, if only that there is
// nothing.
func (r *round) query(ctx context.Context, name string, kind uint16) (*dns.Msg, error) {
	var failures []string
	for attempt := range r.attempts {
		failures = failures[:0]
		for _, server := range r.order() {
			// Some that don't know EDNS are silent.
			answer, err := r.ask(ctx, server, name, kind, attempt == 0)
			if err == nil {
				return answer, nil
			}
			if ctx.Err() != nil {
				return nil, fmt.Errorf("%s %s: %w", dns.Type(kind), name, endOf(ctx))
			}
			failures = append(failures, fmt.Sprintf("%s: %v", server, err))
		}
	}
	return nil, fmt.Errorf("%s %s: %s", dns.Type(kind), name, strings.Join(failures, "; "))
}

// endOf says why ctx has ended.
func endOf(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("the lookup took longer than %s", lookupTimeout)
	}
	return ctx.Err()
}

// ask puts a question to one server.
func (r *round) ask(ctx context.Context, server, name string, kind uint16, edns bool) (*dns.Msg, error) {
	if err := r.slots.acquire(ctx); err != nil {
		return nil, err
	}
	defer r.slots.release()
	question := new(dns.Msg).SetQuestion(name, kind)
	if edns {
		question.SetEdns0(udpSize, false)
	}
	answer, err := exchange(ctx, server, question, r.timeout)
	if silent := (*silentError)(nil); errors.As(err, &silent) {
		r.mu.Lock()
		r.silent[server] = true
		r.mu.Unlock()
	}
	if err != nil {
		return nil, err
	}
	if edns && (answer.Rcode == dns.RcodeFormatError || answer.Rcode == dns.RcodeNotImplemented || answer.Rcode == dns.RcodeBadVers) {
		question = new(dns.Msg).SetQuestion(name, kind)
		if answer, err = exchange(ctx, server, question, r.timeout); err != nil {
			return nil, err
		}
	}
	switch {
	case !ofTheName(answer.Rcode):
		return nil, fmt.Errorf("the server says %s", dns.RcodeToString[answer.Rcode])
	case answer.Rcode == dns.RcodeSuccess && !answer.Authoritative && !answer.RecursionAvailable && len(answer.Answer) == 0:
		return nil, errors.New("the server knows nothing of the name and asks no others")
	}
	return answer, nil
}

// records are what there is of one type under a name.
type records struct {
	found   []dns.RR // none = there is no such name, or nothing of the type
	related []dns.RR // what came along
	ttl     time.Duration
}

// resolve returns the records of a fully qualified name, or of the one that it is
// an alias of.
func (r *round) resolve(ctx context.Context, name string, kind uint16) (records, error) {
	all, end := records{ttl: forever}, name
	for range maxAliases {
		answer, err := r.query(ctx, end, kind)
		if err != nil {
			return records{}, err
		}
		found, last, ttl, err := follow(answer, end, kind)
		if err != nil {
			return records{}, fmt.Errorf("%s %s: %w", dns.Type(kind), name, err)
		}
		all.found, all.related, all.ttl = found, answer.Extra, min(all.ttl, ttl)
		if len(found) > 0 || dns.CanonicalName(last) == dns.CanonicalName(end) || answer.Rcode != dns.RcodeSuccess || answer.RecursionAvailable {
			return all, nil
		}
		end = last // the server does not follow aliases that leave its zones
	}
	return records{}, fmt.Errorf("%s %s: %w", dns.Type(kind), name, errAliases)
}

var errAliases = errors.New("aliases without end")

// follow finds the records of a type in an answer, over its aliases. It returns
// the last name of those, and the least TTL on the way.
func follow(answer *dns.Msg, name string, kind uint16) (found []dns.RR, last string, ttl time.Duration, err error) {
	aliases := make(map[string]*dns.CNAME)
	for _, rr := range answer.Answer {
		if alias, ok := rr.(*dns.CNAME); ok {
			aliases[dns.CanonicalName(alias.Hdr.Name)] = alias
		}
	}
	last, ttl = dns.CanonicalName(name), forever
	for n := 0; aliases[last] != nil; n++ {
		if n == maxAliases {
			return nil, "", 0, errAliases
		}
		ttl = min(ttl, lifetime(aliases[last]))
		last = dns.CanonicalName(aliases[last].Target)
	}
	for _, rr := range answer.Answer {
		if h := rr.Header(); h.Rrtype == kind && h.Class == dns.ClassINET && dns.CanonicalName(h.Name) == last {
			found = append(found, rr)
			ttl = min(ttl, lifetime(rr))
		}
	}
	return found, last, ttl, nil
}

// forever is longer than any TTL.
const forever = time.Duration(math.MaxInt64)

// lifetime is a record's TTL. With the highest bit set it is 0: RFC 2181, section 8.
func lifetime(rr dns.RR) time.Duration {
	if ttl := rr.Header().Ttl; ttl <= math.MaxInt32 {
		return time.Duration(ttl) * time.Second
	}
	return 0
}
