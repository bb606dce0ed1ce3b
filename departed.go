package tcplb

import (
	"slices"
	"time"
)

// departedFor is how long the series of a backend or pool stay after its last
// connection, for whoever scrapes now and then to see how that ended.
const departedFor = 2 * time.Minute

// departedSeries are the backends and pools that nothing needs any more but
// their counters. One that comes back goes on counting. The registry's mutex
// guards them.
type departedSeries struct {
	backends []departedBackend
	pools    []departedPool
}

type departedBackend struct {
	lb string
	*Backend
	until time.Time
}

type departedPool struct {
	*pool
	until time.Time
}

func (d *departedSeries) add(p *pool, b *Backend) {
	now := time.Now()
	d.prune(now)
	d.backends = append(d.backends, departedBackend{p.name, b, now.Add(departedFor)})
}

func (d *departedSeries) addPool(p *pool) {
	d.pools = append(d.pools, departedPool{p, time.Now().Add(departedFor)})
}

// prune forgets those whose time is over.
func (d *departedSeries) prune(now time.Time) {
	d.backends = slices.DeleteFunc(d.backends, func(b departedBackend) bool { return !now.Before(b.until) })
	d.pools = slices.DeleteFunc(d.pools, func(p departedPool) bool { return !now.Before(p.until) })
}

// forget takes b out.
func (d *departedSeries) forget(b *Backend) {
	d.backends = slices.DeleteFunc(d.backends, func(o departedBackend) bool { return o.Backend == b })
}

// reviveBackend returns the pool's backend of the address as a new one, but for
// its counters; nil if there is none.
func (d *departedSeries) reviveBackend(p *pool, address string) *Backend {
	d.prune(time.Now())
	i := slices.IndexFunc(d.backends, func(o departedBackend) bool { return o.lb == p.name && o.address == address })
	if i < 0 {
		return nil
	}
	b := d.backends[i].Backend
	d.forget(b)
	b.setHealthy(true)
	b.lastCheck.Store(0)
	b.lastError.Store(nil)
	b.unretire(p)
	return b
}

func (b *Backend) unretire(p *pool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pool, b.retired = p, false
	b.drain, b.cutAt, b.drained = nil, false, drained{}
}

// revivePool returns the pool of the name; nil if there is none.
func (d *departedSeries) revivePool(name string) *pool {
	d.prune(time.Now())
	i := slices.IndexFunc(d.pools, func(o departedPool) bool { return o.name == name })
	if i < 0 {
		return nil
	}
	p := d.pools[i].pool
	d.pools = slices.Delete(d.pools, i, i+1)
	return p
}
