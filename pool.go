package tcplb

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/notice"
	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// pool is the state behind all handlers of one name, shared by the configs
// that overlap during a reload and handed on from each to the next.
type pool struct {
	name string

	// newest is the generation that was started last and still runs; nil once
	// none runs.
	newest atomic.Pointer[generation]
	voice  atomic.Pointer[voice] // of that one or the last that was; never nil once one ran
	active atomic.Int64          // connections being handled, with a backend or without
	demand demand                // for probes

	closed                         [numReasons]atomic.Uint64 // connections that ended before they had a backend
	times                          poolTimes
	refusals, overLimit, overFiles notice.Notice
	overPlaces, staying            notice.Notice

	clients     clients // what each of them has of active
	overClients notice.Notice
	sweep       sweep

	onPanic func(value any, stack []byte) // logPanic

	waiters waiters
	changes atomic.Uint64 // of availability, of the newest generation, and of drainEnd
	// drainEnd is when the drain timeout ends, once no config has the pool, in Unix
	// nanoseconds; 0 = one has.
	drainEnd atomic.Int64
	outage   outage
	slow     slowStarts

	// generations are the running ones, oldest first; guarded by the registry.
	generations []*generation
	backends    map[string]*Backend // by address; guarded by the registry
	gone        totals              // of backends that were dropped; guarded by the registry
}

func newPool(name string) *pool {
	p := &pool{name: name, backends: make(map[string]*Backend), times: newPoolTimes()}
	p.onPanic = p.logPanic
	return p
}

// totals sum up what a pool did.
type totals struct {
	connections, cut, received, sent, errors, retries uint64
}

func (t totals) plus(o totals) totals {
	return totals{t.connections + o.connections, t.cut + o.cut, t.received + o.received, t.sent + o.sent, t.errors + o.errors, t.retries + o.retries}
}

func (t totals) minus(o totals) totals {
	return totals{t.connections - o.connections, t.cut - o.cut, t.received - o.received, t.sent - o.sent, t.errors - o.errors, t.retries - o.retries}
}

func (s *stats) totals() totals {
	return totals{s.opened.Load(), s.closed[reasonDrainTimeout].Load(), s.received.Load(), s.sent.Load(), s.dialErrors(), s.retries.Load()}
}

// registry holds the pools of every running config and of the connections that
// outlived theirs. Its mutex guards the structure: which pools, generations,
// backends and checkers exist. It is taken before a backend's own mutex, never
// after, and never while picking or relaying.
var registry = &poolRegistry{pools: make(map[string]*pool), departed: newDepartedSeries(), hands: make(map[seriesKey]hand)}

type poolRegistry struct {
	mu       sync.Mutex
	pools    map[string]*pool
	departed departedSeries
	hands    map[seriesKey]hand // those that say something
}

func (r *poolRegistry) poolLocked(name string) *pool {
	p := r.pools[name]
	if p == nil {
		if p = r.departed.revivePool(name); p == nil {
			p = newPool(name)
		}
		r.pools[name] = p
	}
	return p
}

// backendLocked returns the pool's backend of the target, a new one if need be.
func (r *poolRegistry) backendLocked(p *pool, t target) *Backend {
	b := p.backends[t.String()]
	if b == nil {
		if b = r.departed.reviveBackend(p, t.String()); b == nil {
			b = newBackend(p, t.String(), t)
		}
		r.takeInLocked(p, b)
	}
	return b
}

// takeInLocked makes b one of p's, as it was set by hand.
func (r *poolRegistry) takeInLocked(p *pool, b *Backend) {
	p.backends[b.address] = b
	h := r.hands[seriesKey{p.name, b.address}]
	b.hand.Store(&h)
}

// start makes g the newest generation of its pool.
func (r *poolRegistry) start(g *generation) {
	r.mu.Lock()
	r.departed.prune(time.Now())
	p := r.poolLocked(g.name)
	var prev tiers
	old := p.newest.Load()
	if old != nil {
		prev = old.currentTiers()
	}
	g.pool = p
	g.follows = old != nil && old.hasAvailable()
	p.generations = append(p.generations, g)
	g.succeedLocked(old)
	t, _ := r.enrollLocked(p, g, g.wantedLocked(), time.Time{})
	t.slowly = g.follows
	p.setNewestLocked(g)
	r.settleLocked(p, &t)
	g.inherit(prev)
	r.mu.Unlock()
	t.finish(p, g)
}

// stop ends g. Backends that no generation names any more are drained, for as
// long as the newest config says, if one has the pool. A generation that was
// newest hands back to the one before it, as happens when a config fails after
// its apps have started.
func (r *poolRegistry) stop(g *generation) {
	r.mu.Lock()
	r.departed.prune(time.Now())
	p := g.pool
	p.generations = slices.DeleteFunc(p.generations, func(o *generation) bool { return o == g })
	var newest *generation
	if n := len(p.generations); n > 0 {
		newest = p.generations[n-1]
	}
	p.setNewestLocked(newest)
	timeout := g.drainTimeout
	if newest != nil {
		timeout = newest.drainTimeout
	}
	until := time.Now().Add(timeout)
	if newest == nil {
		p.drainEnd.Store(until.UnixNano())
		p.slow.stopLocked()
		if caddy.Exiting() {
			exitsBy(until)
		}
	}
	t, left := r.enrollLocked(p, g, nil, until)
	r.settleLocked(p, &t)
	for _, b := range left {
		r.dropLocked(b, &t.lines)
	}
	ended, did := r.forgetIfEmptyLocked(p)
	r.mu.Unlock()
	switch {
	case caddy.Exiting():
		t.lines = nil
	case newest == nil && !ended:
		t.lines.add("pool left the config, draining its connections",
			zap.String("lb", p.name), zap.Int64("connections", p.active.Load()), zap.Time("until", until))
	}
	t.finish(p, newest)
	if ended {
		p.logEnd(did)
	}
}

// setNewestLocked is called with nil when the last generation has ended.
func (p *pool) setNewestLocked(g *generation) {
	p.newest.Store(g)
	if g == nil {
		p.sweep.setLocked(p, 0)
		return
	}
	v := g.voice // a copy: a pointer into g would keep all of it
	p.voice.Store(&v)
	p.sweep.setLocked(p, v.logInterval)
	p.drainEnd.Store(0)
}

// drainLimit returns when a search for a backend has to be over; zero while a
// config has the pool.
func (p *pool) drainLimit() time.Time {
	if end := p.drainEnd.Load(); end != 0 {
		return time.Unix(0, end)
	}
	return time.Time{}
}

func (p *pool) abandoned() bool {
	end := p.drainEnd.Load()
	return end != 0 && time.Now().UnixNano() >= end
}

// drainBefore ends what is drained for longer by then.
func (p *pool) drainBefore(t time.Time) {
	if end := p.drainEnd.Load(); end > t.UnixNano() && p.drainEnd.CompareAndSwap(end, t.UnixNano()) {
		p.changed()
	}
}

// changed wakes who waits for a change, and tells of the beginning or end of an
// outage.
func (p *pool) changed() {
	p.changes.Add(1)
	p.review()
	p.reportOutage()
}

// logger returns the newest config's. Once there is none its log may be closed,
// and Caddy's default one serves.
func (p *pool) logger() *zap.Logger {
	if g := p.newest.Load(); g != nil {
		return g.logger
	}
	return caddy.Log().Named("tcp_lb")
}

// adopt returns the backend that now stands for the address of b, which was
// retired: another one, or b itself, brought back for the connections that an
// ended config still hands over.
func (r *poolRegistry) adopt(b *Backend) *Backend {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.poolLocked(b.pool.name)
	if p.backends[b.address] == nil {
		back := r.departed.reviveBackend(p, b.address)
		if back == nil { // long ago
			back = b
			back.unretire(p)
		}
		r.takeInLocked(p, back)
	}
	return p.backends[b.address]
}

// retire drops b, unless someone took it meanwhile.
func (r *poolRegistry) retire(b *Backend) {
	r.mu.Lock()
	p := b.pool
	var lines logLines
	r.dropLocked(b, &lines)
	ended, did := r.forgetIfEmptyLocked(p)
	r.mu.Unlock()
	lines.write(p.logger())
	if ended {
		p.logEnd(did)
	}
}

// dropLocked drops b if nothing needs it, and adds that it is drained: its last
// connection may end before the change is done by which it left.
func (r *poolRegistry) dropLocked(b *Backend, lines *logLines) {
	was, dropped := r.dropIfUnusedLocked(b)
	if dropped && was.open > 0 && !caddy.Exiting() {
		lines.add("backend is drained",
			zap.String("lb", b.pool.name), zap.String("backend", b.address),
			zap.Int("connections", was.open), zap.Int("cut_by_drain_timeout", was.cut))
	}
}

// leave counts a connection as handled. The last one of a pool that no config
// has takes that with it.
func (p *pool) leave() {
	if p.active.Add(-1) > 0 || p.newest.Load() != nil {
		return
	}
	registry.mu.Lock()
	ended, did := registry.forgetIfEmptyLocked(p)
	registry.mu.Unlock()
	if ended {
		p.logEnd(did)
	}
}

func (r *poolRegistry) dropIfUnusedLocked(b *Backend) (was drained, dropped bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users > 0 || !b.load.CompareAndSwap(0, retired) {
		return drained{}, false
	}
	if b.drain != nil {
		b.drain.Stop()
	}
	now := b.stats.totals()
	b.pool.gone = b.pool.gone.plus(now.minus(b.settled))
	b.settled = now
	delete(b.pool.backends, b.address)
	r.departed.add(b.pool, b)
	return b.drained, true
}

// forgetIfEmptyLocked drops a pool that no config and no connection needs any
// more. It reports whether it did and that is to be logged, and what the pool did.
func (r *poolRegistry) forgetIfEmptyLocked(p *pool) (ended bool, did totals) {
	if len(p.generations) > 0 || len(p.backends) > 0 || p.active.Load() > 0 || r.pools[p.name] != p {
		return false, totals{}
	}
	delete(r.pools, p.name)
	r.departed.addPool(p)
	return !caddy.Exiting(), p.gone // else drainOnExit tells, once
}

// newest returns the newest running generation of the name, or nil.
func (r *poolRegistry) newest(name string) *generation {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.pools[name]; p != nil {
		return p.newest.Load()
	}
	return nil
}

// sortedLocked returns the backends by address.
func (p *pool) sortedLocked() []*Backend {
	return slices.SortedFunc(maps.Values(p.backends), func(a, b *Backend) int { return strings.Compare(a.address, b.address) })
}

// poolView is a pool with its backends for a reader. configured are those of
// the newest config, in its order; backends are all that are still counted,
// by address.
type poolView struct {
	*pool
	configured []*Backend
	backends   []*Backend
}

// total returns what the pool has done so far.
func (v poolView) total() totals {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	t := v.gone
	for _, b := range v.backends {
		t = t.plus(b.stats.totals().minus(b.settled))
	}
	return t
}

// snapshot returns all pools by name.
func (r *poolRegistry) snapshot() []poolView {
	views, _, _ := r.snapshotWithDeparted()
	return views
}

// snapshotWithDeparted returns in one look what has departed and is still shown,
// too.
func (r *poolRegistry) snapshotWithDeparted() ([]poolView, map[string]departedPool, map[seriesKey]departedBackend) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.departed.prune(time.Now())
	views := make([]poolView, 0, len(r.pools))
	for _, p := range r.pools {
		v := poolView{pool: p, backends: p.sortedLocked()}
		if g := p.newest.Load(); g != nil {
			for _, m := range g.members() {
				v.configured = append(v.configured, m.Backend)
			}
		}
		views = append(views, v)
	}
	slices.SortFunc(views, func(a, b poolView) int { return strings.Compare(a.name, b.name) })
	return views, maps.Clone(r.departed.pools), maps.Clone(r.departed.backends)
}
