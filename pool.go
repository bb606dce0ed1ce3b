package tcplb

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

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
	active atomic.Int64 // connections being handled, with a backend or without
	demand demand       // for probes

	noBackend       atomic.Uint64 // connections for which none could be reached
	overLimit       atomic.Uint64 // connections over the limit
	failed          atomic.Uint64 // connections that ended before they had a backend, in an error
	nextLimitNotice atomic.Int64  // Unix nanoseconds before which no further warning is logged

	// generations are the running ones, oldest first; guarded by the registry.
	generations []*generation
	backends    map[string]*Backend // by address; guarded by the registry
	gone        totals              // of backends that were dropped; guarded by the registry
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
var registry = &poolRegistry{pools: make(map[string]*pool)}

type poolRegistry struct {
	mu    sync.Mutex
	pools map[string]*pool
}

func (r *poolRegistry) poolLocked(name string) *pool {
	p := r.pools[name]
	if p == nil {
		p = &pool{name: name, backends: make(map[string]*Backend)}
		r.pools[name] = p
	}
	return p
}

// start makes g the newest generation of its pool.
func (r *poolRegistry) start(g *generation) {
	r.mu.Lock()
	p := r.poolLocked(g.name)
	var prev Picker
	if old := p.newest.Load(); old != nil {
		prev = old.currentPicker()
	}
	for _, m := range g.config {
		b := p.backends[m.target.String()]
		if b == nil {
			b = newBackend(p, m.target.String(), m.target)
			p.backends[b.address] = b
		}
		b.mu.Lock()
		b.users++
		b.mu.Unlock()
		b.stopDraining()
		g.members = append(g.members, Candidate{Backend: b, Weight: m.weight})
	}
	g.pool = p
	p.generations = append(p.generations, g)
	p.newest.Store(g)
	g.inherit(prev)
	revived := r.settleLocked(p)
	r.mu.Unlock()
	announceUp(g, revived)
}

// stop ends g. Backends that no generation names any more are drained. A
// generation that was newest hands back to the one before it, as happens when
// a config fails after its apps have started.
func (r *poolRegistry) stop(g *generation) {
	lastDrain.Store(max(lastDrain.Load(), int64(g.drainTimeout+time.Duration(1+g.retries)*g.dialTimeout)))
	r.mu.Lock()
	p := g.pool
	p.generations = slices.DeleteFunc(p.generations, func(o *generation) bool { return o == g })
	p.newest.Store(nil)
	if n := len(p.generations); n > 0 {
		p.newest.Store(p.generations[n-1])
	}
	for _, m := range g.members {
		b := m.Backend
		b.mu.Lock()
		b.users--
		unused := b.users == 0
		b.mu.Unlock()
		if unused {
			b.startDraining(g.drainTimeout)
		}
	}
	revived := r.settleLocked(p)
	newest := p.newest.Load()
	for _, m := range g.members {
		r.dropIfUnusedLocked(m.Backend)
	}
	ended := r.forgetIfEmptyLocked(p)
	r.mu.Unlock()
	announceUp(newest, revived)
	if ended {
		p.logEnd(p.gone)
	}
}

// announceUp logs that backends came up with a config.
func announceUp(g *generation, backends []*Backend) {
	for _, b := range backends {
		b.logTurn(g, nil)
	}
}

// settleLocked makes weights and checkers what the newest generation says. It
// returns the backends that this brought up, to be announced.
func (r *poolRegistry) settleLocked(p *pool) (revived []*Backend) {
	g := p.newest.Load()
	members := make(map[*Backend]int)
	if g != nil {
		for _, m := range g.members {
			members[m.Backend] = m.Weight
		}
	}
	for _, b := range p.backends {
		weight, ok := members[b]
		b.weight.Store(int64(weight))
		switch {
		case ok && g.checks.enabled:
			b.checkLocked(g)
		case ok: // no checks: nothing could bring a down backend up again
			b.stopCheckingLocked()
			if b.turnLocked(nil) {
				revived = append(revived, b)
			}
		case !b.used():
			b.stopCheckingLocked()
		}
	}
	if len(revived) > 0 {
		for _, g := range p.generations {
			g.rebuild()
		}
	}
	return revived
}

// adopt returns the backend that now stands for the address of b, which was
// retired: another one, or b itself, brought back for the connections that an
// ended config still hands over.
func (r *poolRegistry) adopt(b *Backend) *Backend {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.poolLocked(b.pool.name)
	if p.backends[b.address] == nil {
		p.backends[b.address] = b
		b.mu.Lock()
		b.pool, b.retired = p, false
		b.drain, b.cutAt = nil, false
		b.mu.Unlock()
	}
	return p.backends[b.address]
}

// retire drops b, unless someone took it meanwhile.
func (r *poolRegistry) retire(b *Backend) {
	r.mu.Lock()
	p := b.pool
	r.dropIfUnusedLocked(b)
	ended := r.forgetIfEmptyLocked(p)
	r.mu.Unlock()
	if ended {
		p.logEnd(p.gone)
	}
}

func (r *poolRegistry) dropIfUnusedLocked(b *Backend) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users > 0 || b.holds > 0 || b.retired {
		return
	}
	b.retired = true
	if b.drain != nil {
		b.drain.Stop()
	}
	now := b.stats.totals()
	b.pool.gone = b.pool.gone.plus(now.minus(b.settled))
	b.settled = now
	delete(b.pool.backends, b.address)
}

// forgetIfEmptyLocked drops a pool that no config and no connection needs any
// more, and reports whether it did.
func (r *poolRegistry) forgetIfEmptyLocked(p *pool) bool {
	if len(p.generations) > 0 || len(p.backends) > 0 || r.pools[p.name] != p {
		return false
	}
	delete(r.pools, p.name)
	return true
}

// logEnd writes a pool's last line. The log of its config is closed by then,
// so it goes to Caddy's default one.
func (p *pool) logEnd(t totals) {
	caddy.Log().Named("tcp_lb").Info("pool ended",
		zap.String("lb", p.name),
		zap.Uint64("connections", t.connections),
		zap.Uint64("cut_by_drain_timeout", t.cut),
		zap.Uint64("no_backend", p.noBackend.Load()),
		zap.Uint64("max_connections", p.overLimit.Load()),
		zap.Uint64("received_bytes", t.received),
		zap.Uint64("sent_bytes", t.sent))
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
	r.mu.Lock()
	defer r.mu.Unlock()
	views := make([]poolView, 0, len(r.pools))
	for _, p := range r.pools {
		v := poolView{pool: p, backends: slices.Collect(maps.Values(p.backends))}
		slices.SortFunc(v.backends, func(a, b *Backend) int { return strings.Compare(a.address, b.address) })
		if g := p.newest.Load(); g != nil {
			for _, m := range g.members {
				v.configured = append(v.configured, m.Backend)
			}
		}
		views = append(views, v)
	}
	slices.SortFunc(views, func(a, b poolView) int { return strings.Compare(a.name, b.name) })
	return views
}
