package tcplb

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
)

// Backend is one server behind the balancer, as a pool knows it. It outlives
// the config that named it: verdict, counters and open connections carry over
// to the next config that names the same address in the same pool, and end
// when no config names it and its last connection is gone.
type Backend struct {
	pool    *pool
	address string
	target  target
	begun   *secure.Line // clients' TLS handshakes that it has to answer

	// healthy is the checker's verdict, see setHealthy; a backend starts up.
	healthy atomic.Bool
	barred  atomic.Bool  // by hand, by its weight, or since it left a pool that goes on
	ejected atomic.Int64 // Unix nanoseconds until which it is, as clients' connections failed; 0 = it is not
	// load counts the connections that picked the backend and have not ended, be
	// they connecting or open; retired once the backend was dropped from its pool.
	load atomic.Int64
	// limit of load, whether it is a backup, and how connections to it begin, are
	// those of the newest config that named it.
	limit    atomic.Int64 // 0 = none
	backup   atomic.Bool
	approach atomic.Pointer[approach]
	channel  atomic.Pointer[channel] // see channelBy

	hand      atomic.Pointer[hand]      // see byHand
	weight    atomic.Int64              // in the newest config; 0 also once no config names it
	effective atomic.Int64              // what of that holds; 0 = no new connections
	slow      atomic.Pointer[slowStart] // since it came back; nil = none
	slowly    atomic.Bool               // the newest config has slow starts
	source    atomic.Pointer[string]    // what found it; nil = the config named it, the last time
	given     int                       // the weight that a config gave it last; guarded by the registry

	lastCheck atomic.Int64 // Unix nanoseconds of the last finished probe; 0 = none yet
	lastError atomic.Pointer[string]

	// A connect that failed by a fault on this side is none of these.
	lastConnect      atomic.Int64           // Unix nanoseconds of the last connect for a client; 0 = none yet
	lastConnectError atomic.Pointer[string] // nil = it worked

	stats   stats
	settled totals // what of stats is in some pool's gone; guarded by the registry

	mu       sync.Mutex
	users    int // generations that name it
	sessions sessionList
	drain    *time.Timer // runs once no config names it
	drainEnd time.Time   // when that is
	cutAt    bool        // the drain timeout is over: later sessions end at once
	drained  drained
	closing  *time.Timer // runs, or has run, while it is down and its sessions are not to go on
	closeAt  time.Time   // when that ends
	closed   bool        // it has: later sessions end at once

	watched  atomic.Bool // by the newest config that has it
	aging    atomic.Bool // its connections have a max_lifetime, by the last config that had it
	failures failures
	ejection *time.Timer // ends ejected; guarded by the registry
	fresh    bool        // it has just joined; guarded by the registry
	untold   bool        // down, but by no check; guarded by the registry

	checker  *checker                // the running one, or the last; guarded by the registry's mutex
	checking atomic.Pointer[checker] // the running one: see checkSoon and probeWanted
	events   eventQueue
}

// stats are a backend's counters. All only ever grow.
type stats struct {
	opened   atomic.Uint64
	closed   [numReasons]atomic.Uint64
	errors   [numDialErrors]atomic.Uint64
	retries  atomic.Uint64
	received atomic.Uint64 // bytes from clients
	sent     atomic.Uint64 // bytes to clients

	checksPassed, checksFailed atomic.Uint64
	turnedUp, turnedDown       atomic.Uint64
	ejections                  atomic.Uint64
	turnedAt                   atomic.Int64 // Unix nanoseconds of the last of those; 0 = none yet

	dialTime  histogram
	checkTime histogram
	duration  histogram
}

func newBackend(p *pool, address string, t target) *Backend {
	b := &Backend{pool: p, address: address, target: t, given: defaultWeight, begun: newBegun()}
	b.healthy.Store(true)
	var all poolTimes
	if p != nil {
		all = p.times
	}
	b.stats.dialTime.init(backendDialBuckets, all.dial)
	b.stats.checkTime.init(nil, all.check)
	b.stats.duration.init(nil, all.duration)
	return b
}

// Address returns the backend's address in canonical form: host:port, or
// unix//path.
func (b *Backend) Address() string { return b.address }

// Load returns how many connections are open to the backend or being opened.
func (b *Backend) Load() int64 { return max(0, b.load.Load()) }

// Available reports whether new connections may go to the backend. It is the
// one place where the verdict of the health checks, failures of clients, the state
// that was set by hand and the weight become an answer. Every pick asks it.
func (b *Backend) Available() bool {
	return b.healthy.Load() && !b.barred.Load() && b.ejected.Load() == 0
}

// setHealthy sets the verdict, and reports whether it is another one.
func (b *Backend) setHealthy(up bool) (changed bool) { return b.healthy.Swap(up) != up }

// connections returns the number of opened and of open connections, so that opened
// less active is what has been closed, by reason, in closed. Reading closed
// first keeps active from being negative.
func (s *stats) connections() (opened, active uint64, closed [numReasons]uint64) {
	var total uint64
	for i := range closed {
		closed[i] = s.closed[i].Load()
		total += closed[i]
	}
	opened = s.opened.Load()
	return opened, opened - total, closed
}

func (s *stats) dialErrors() (total uint64) {
	for i := range s.errors {
		total += s.errors[i].Load()
	}
	return total
}

// retired is a load below any count.
const retired = math.MinInt64

// taking is what came of a take.
type taking int

const (
	wasTaken taking = iota
	wasFull
	wasGone // the backend is retired
)

// take counts one connection more, if there is room for it. Until that is
// released the backend is not retired.
func (b *Backend) take() taking {
	for {
		n, limit := b.load.Load(), b.limit.Load()
		switch {
		case n < 0:
			return wasGone
		case limit > 0 && n >= limit:
			return wasFull
		case b.load.CompareAndSwap(n, n+1):
			return wasTaken
		}
	}
}

// release takes back a take. The place goes to the first who waits for one.
func (b *Backend) release() {
	p := b.pool // before the last one is gone, and with it perhaps the pool
	var last bool
	if b.limit.Load() > 0 {
		last = p.freePlace(b)
	} else if last = b.countDown(); b.limit.Load() > 0 { // which it has just got
		p.review()
	}
	if last && !b.used() {
		registry.retire(b)
	}
}

// countDown counts one connection less, and tells the policy. It reports whether
// that was the last.
func (b *Backend) countDown() (last bool) {
	p := b.pool
	last = b.load.Add(-1) == 0
	if g := p.newest.Load(); g != nil {
		g.loadChanged(b)
	}
	return last
}

// used reports whether a running config names the backend.
func (b *Backend) used() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.users > 0
}

// enter adds a connected session. It returns the reason if that is over before it
// began: the backend left the config so long ago, or it is down and its sessions
// were cut; else reasonNone.
func (b *Backend) enter(s *session) reason {
	b.stats.opened.Add(1)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sessions.add(s)
	if b.users == 0 && b.drain == nil { // adopted
		b.drain = time.AfterFunc(time.Until(b.drainEnd), b.cut)
	}
	switch {
	case b.cutAt:
		return reasonDrainTimeout
	case b.closed:
		return reasonBackendDown
	}
	return reasonNone
}

// serves reports whether a new connection may stay: not one to a backend that
// was barred meanwhile, or that has left the config, if there is another config
// or the drain timeout is over.
func (b *Backend) serves() bool {
	if b.barred.Load() {
		return false
	}
	b.mu.Lock()
	users, end, p := b.users, b.drainEnd, b.pool
	b.mu.Unlock()
	return users > 0 || p.newest.Load() == nil && time.Now().Before(end)
}

// leave counts the session as ended.
func (b *Backend) leave(s *session, why reason, duration time.Duration) {
	b.mu.Lock()
	b.sessions.remove(s)
	b.mu.Unlock()
	b.stats.duration.observe(duration)
	b.stats.closed[why].Add(1)
}

// drained is what became of a backend's connections since it left the config.
type drained struct {
	open int // when that was
	cut  int
}

// join says that one config more names the backend. It returns whether none did,
// and how many sessions were being drained and go on.
func (b *Backend) join() (came bool, open int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.users++
	if b.byHand().state != stateMaint {
		open = b.stopDrainingLocked()
	}
	return b.users == 1, open
}

// unuse says that one config less names the backend. After the last one the open
// sessions have until then to end by themselves; it returns how many there are.
func (b *Backend) unuse(until time.Time) (open int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.users--
	if b.users > 0 {
		return 0
	}
	return b.startDrainingLocked(until)
}

// startDrainingLocked returns how many sessions are to be drained from now on.
// Where that has begun before, it goes on.
func (b *Backend) startDrainingLocked(until time.Time) (open int) {
	if b.drain != nil {
		return 0
	}
	b.drained = drained{open: b.sessions.count}
	b.drainEnd = until
	b.drain = time.AfterFunc(time.Until(until), b.cut)
	return b.drained.open
}

// drainBefore ends draining by then.
func (b *Backend) drainBefore(t time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users > 0 || !b.drainEnd.After(t) {
		return
	}
	b.drainEnd = t
	if b.drain != nil {
		b.drain.Reset(time.Until(t))
	}
}

// stopDrainingLocked returns how many sessions were being drained.
func (b *Backend) stopDrainingLocked() (open int) {
	if b.drain != nil {
		b.drain.Stop()
		open = b.sessions.count
	}
	b.drain, b.drainEnd, b.cutAt, b.drained = nil, time.Time{}, false, drained{}
	return open
}

// cut ends what is still open when the drain timeout is over.
func (b *Backend) cut() {
	b.mu.Lock()
	if b.drain == nil {
		b.mu.Unlock()
		return // back in a config just as the timer fired
	}
	b.cutAt = true
	open := b.openLocked()
	b.drained.cut += len(open)
	b.mu.Unlock()
	for _, s := range open {
		s.end(reasonDrainTimeout)
	}
}

// setConnect notes how a connect for a client ended.
func (b *Backend) setConnect(at time.Time, err error) {
	b.lastConnect.Store(at.UnixNano())
	if err == nil {
		b.lastConnectError.Store(nil)
		if b.checking.Load() == nil { // no check will tell of it
			b.lastError.Store(nil)
		}
		return
	}
	msg := oneLine(err)
	b.lastConnectError.Store(&msg)
}

func (b *Backend) setError(err error) {
	msg := oneLine(err)
	b.lastError.Store(&msg)
}
