package tcplb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"time"
	"weak"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

const (
	// lookupWait is how long a connect waits for the answer of a lookup where
	// there are remembered addresses to use in its place.
	lookupWait = 100 * time.Millisecond
	// lookupLate is when a lookup without an answer is trouble.
	lookupLate = time.Second
	// lookupAgain is the least time from one failed lookup to the next.
	lookupAgain = time.Second
	// lookupRecent is how long after a failed lookup a connect does not wait for
	// the next one at all.
	lookupRecent = 10 * time.Second
	// staleFor is how long remembered addresses serve while lookups fail: the
	// most that RFC 8767, section 5, recommends. It is longer than a weekend.
	staleFor = 3 * 24 * time.Hour
)

// hostName resolves one name, for all backends and pools that have it. A failed
// or slow lookup says nothing of the backends, so it remembers the last answer,
// and connects go there until the next one comes.
type hostName struct {
	host   string
	lookup func(ctx context.Context, host string) (answer, error)

	mu         sync.Mutex
	addrs      []netip.Addr // of the last answer, first to last to try; nil = none, or there was no such host
	answeredAt time.Time
	wholeAt    time.Time // of the last answer in which no family was missing
	flight     *lookup   // under way; nil = none
	trouble    error     // why the last lookup was no prompt answer; nil = it was
	failedAt   time.Time // the end of that lookup
	warned     bool      // the log says that the name is served from memory
}

// lookup is one that is under way, for all who wait.
type lookup struct {
	began time.Time
	done  chan struct{} // closed when the rest is set
	addrs []netip.Addr
	err   error
}

// names finds the hostName of a host. It lives as long as some target has it.
var names struct {
	mu     sync.Mutex
	byHost map[string]weak.Pointer[hostName]
}

func nameOf(host string) *hostName {
	names.mu.Lock()
	defer names.mu.Unlock()
	if n := names.byHost[host].Value(); n != nil {
		return n
	}
	n := &hostName{host: host, lookup: lookupHost}
	if names.byHost == nil {
		names.byHost = make(map[string]weak.Pointer[hostName])
	}
	names.byHost[host] = weak.Make(n)
	runtime.AddCleanup(n, forgetName, host)
	return n
}

func forgetName(host string) {
	names.mu.Lock()
	defer names.mu.Unlock()
	if names.byHost[host].Value() == nil { // else it is another one's by now
		delete(names.byHost, host)
	}
}

// resolve returns the addresses to try. Each call looks the name up, together
// with others at the same time. It returns what is remembered instead when the
// answer is not there after lookupWait, or at once where lookups have just been
// in trouble; then the lookup goes on for those who come later.
func (n *hostName) resolve(ctx context.Context) ([]netip.Addr, error) {
	now := time.Now()
	n.mu.Lock()
	known := n.knownLocked(now)
	l := n.flight
	if l == nil && (known == nil || n.trouble == nil || now.Sub(n.failedAt) >= lookupAgain) {
		l = n.beginLocked(now)
	}
	late := l != nil && now.Sub(l.began) >= lookupLate
	var tell func()
	if late {
		tell = n.troubledLocked(n.late(), known)
	}
	hopeless := late || n.trouble != nil && now.Sub(n.failedAt) < lookupRecent
	n.mu.Unlock()
	run(tell)
	switch {
	case known == nil:
		return n.await(ctx, l)
	case hopeless:
		return known, nil
	}
	until := l.began.Add(lookupWait)
	if deadline, ok := ctx.Deadline(); ok {
		if half := now.Add(deadline.Sub(now) / 2); half.Before(until) {
			until = half // the rest is for the connect
		}
	}
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-l.done:
	case <-t.C:
		return known, nil
	case <-ctx.Done():
		return nil, n.ended(ctx)
	}
	if l.err != nil && !isNotFound(l.err) {
		return known, nil
	}
	return l.addrs, l.err
}

// await waits for an answer with nothing to use in its place.
func (n *hostName) await(ctx context.Context, l *lookup) ([]netip.Addr, error) {
	select {
	case <-l.done:
		return l.addrs, l.err
	case <-ctx.Done():
		return nil, n.ended(ctx)
	}
}

// ended is the error of a wait that ctx ended.
func (n *hostName) ended(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return &net.DNSError{Err: "operation was canceled", Name: n.host, UnwrapErr: ctx.Err()}
	}
	return &net.DNSError{Err: "i/o timeout", Name: n.host, IsTimeout: true, UnwrapErr: ctx.Err()}
}

func (n *hostName) late() error {
	return &net.DNSError{Err: fmt.Sprintf("no answer within %s", lookupLate), Name: n.host, IsTimeout: true}
}

// knownLocked returns the remembered addresses that may serve; nil = none.
func (n *hostName) knownLocked(now time.Time) []netip.Addr {
	if now.Sub(n.answeredAt) > staleFor {
		return nil
	}
	return n.addrs
}

// beginLocked starts a lookup.
func (n *hostName) beginLocked(now time.Time) *lookup {
	l := &lookup{began: now, done: make(chan struct{})}
	n.flight = l
	slots := lookupSlots
	if n.trouble != nil {
		slots = troubleSlots
	}
	// Owned by the name, one at a time; ends by lookupTimeout. Nobody need wait
	// for it.
	go n.run(l, slots)
	return l
}

func (n *hostName) run(l *lookup, slots semaphore) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	var (
		a    answer
		took time.Duration
		err  = error(&net.DNSError{Err: "too many lookups are under way", Name: n.host, IsTemporary: true})
	)
	if slots.acquire(ctx) {
		began := time.Now()
		a, err = n.lookup(ctx, n.host)
		took = time.Since(began)
		slots.release()
	}
	n.finish(l, a, took, err)
}

// finish takes the outcome of a lookup over.
func (n *hostName) finish(l *lookup, a answer, took time.Duration, err error) {
	now := time.Now()
	n.mu.Lock()
	var tell func()
	switch {
	case err == nil:
		n.answeredLocked(a, now)
		if took < lookupLate {
			tell = n.recoveredLocked()
			break
		}
		n.failedAt = now
		tell = n.troubledLocked(n.late(), n.addrs)
	case isNotFound(err):
		n.addrs, n.answeredAt, n.wholeAt = nil, now, now
		tell = n.recoveredLocked()
	default:
		n.failedAt = now
		tell = n.troubledLocked(err, n.knownLocked(now))
	}
	l.addrs, l.err = n.addrs, err
	if err != nil {
		l.addrs = nil
	}
	n.flight = nil
	n.mu.Unlock()
	close(l.done)
	run(tell)
}

// answeredLocked remembers an answer. Where one family's half of it failed, it
// keeps the addresses that it had of that family.
func (n *hostName) answeredLocked(a answer, now time.Time) {
	if a.whole {
		n.wholeAt = now
	} else if now.Sub(n.wholeAt) <= staleFor {
		first, second := byFamily(a.addrs)
		for _, old := range n.addrs {
			if len(second) == 0 && old.Is4() != first[0].Is4() {
				a.addrs = append(a.addrs, old)
			}
		}
	}
	n.addrs, n.answeredAt = a.addrs, now
}

// troubledLocked notes why lookups are in trouble. It returns what is to be
// called unlocked, if not nil, to log that remembered addresses serve.
func (n *hostName) troubledLocked(err error, known []netip.Addr) (tell func()) {
	n.trouble = err
	if n.warned || known == nil {
		return nil
	}
	n.warned = true
	since := n.answeredAt
	return func() {
		namesLog().Warn("lookups of a name fail or are late, its last addresses serve on",
			zap.String("name", n.host), zap.Stringers("addresses", known), zap.Time("answered", since), zap.Error(err))
	}
}

// recoveredLocked is the same for the end of it.
func (n *hostName) recoveredLocked() (tell func()) {
	n.trouble = nil
	if !n.warned {
		return nil
	}
	n.warned = false
	known := n.addrs
	return func() {
		namesLog().Info("lookups of a name are answered again in time",
			zap.String("name", n.host), zap.Stringers("addresses", known))
	}
}

// A name is of several pools, or outlives them: see pool.logEnd.
var namesLog = func() *zap.Logger { return caddy.Log().Named("tcp_lb") }

func run(f func()) {
	if f != nil {
		f()
	}
}

// troubled says what is wrong with the lookups while remembered addresses serve;
// empty if nothing is, or if there are none. A nil name has no trouble.
func (n *hostName) troubled() string {
	if n == nil {
		return ""
	}
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.trouble
	if n.flight != nil && now.Sub(n.flight.began) >= lookupLate && err == nil {
		err = n.late()
	}
	if err == nil || n.knownLocked(now) == nil {
		return ""
	}
	return fmt.Sprintf("%v; using its addresses of %s", err, n.answeredAt.UTC().Format(time.RFC3339))
}
