package tcplb

import (
	"maps"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// departedFor is how long the series of a backend or pool stay after its last
// connection, for whoever scrapes now and then to see how that ended.
const departedFor = 2 * time.Minute

// departedSeries are the backends and pools that nothing needs any more but
// their counters. One that comes back goes on counting. The registry's mutex
// guards them.
type departedSeries struct {
	backends map[seriesKey]departedBackend
	pools    map[string]departedPool
}

// seriesKey is what tells a backend's series from all others.
type seriesKey struct{ lb, backend string }

type departedBackend struct {
	*Backend
	until time.Time
}

type departedPool struct {
	*pool
	until  time.Time
	untold bool // its end is not in the log
}

func newDepartedSeries() departedSeries {
	return departedSeries{backends: make(map[seriesKey]departedBackend), pools: make(map[string]departedPool)}
}

func (d *departedSeries) add(p *pool, b *Backend) {
	d.backends[seriesKey{p.name, b.address}] = departedBackend{b, time.Now().Add(departedFor)}
}

func (d *departedSeries) addPool(p *pool) {
	d.pools[p.name] = departedPool{p, time.Now().Add(departedFor), caddy.Exiting()}
}

// prune forgets those whose time is over. It looks at all.
func (d *departedSeries) prune(now time.Time) {
	maps.DeleteFunc(d.backends, func(_ seriesKey, b departedBackend) bool { return !now.Before(b.until) })
	maps.DeleteFunc(d.pools, func(_ string, p departedPool) bool { return !now.Before(p.until) })
}

// reviveBackend returns the pool's backend of the address as a new one, but for
// its counters and when its drain timeout ends; nil if there is none.
func (d *departedSeries) reviveBackend(p *pool, address string) *Backend {
	key := seriesKey{p.name, address}
	b := d.backends[key].Backend
	if b == nil {
		return nil
	}
	delete(d.backends, key)
	b.forgetChecks()
	b.unretire(p)
	return b
}

func (b *Backend) unretire(p *pool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pool = p
	b.drain, b.cutAt, b.drained = nil, false, drained{}
	b.load.Store(0)
}

// revivePool returns the pool of the name; nil if there is none.
func (d *departedSeries) revivePool(name string) *pool {
	p := d.pools[name].pool
	delete(d.pools, name)
	return p
}
