package tcplb

import (
	"sync"
	"time"
)

// demand bounds the probes of a pool's backends that clients cause who find none
// available. However many wait, those are demandRate a second, a twentieth of a
// core, and as many of each backend as wantedSpacing allows. Where they are too
// few for all backends, these have them in turn.
type demand struct {
	mu   sync.Mutex // held by one client; others that come meanwhile have theirs done by it
	last time.Time
	next int // the backend whose turn it is
}

const (
	demandRate  = 1000 // probes a second
	demandBurst = 100  // of them at once
)

// wantProbes has backends that are down probed soon, since a client found none
// available. It is cheap, for many clients at once.
func (g *generation) wantProbes() {
	d := &g.pool.demand
	if !d.mu.TryLock() {
		return
	}
	defer d.mu.Unlock()
	members := g.members()
	for range min(d.allowance(time.Now()), len(members)) {
		d.next = (d.next + 1) % len(members)
		members[d.next].Backend.probeWanted()
	}
}

// allowance returns how many probes may be asked for.
func (d *demand) allowance(now time.Time) int {
	n := min(now.Sub(d.last)/(time.Second/demandRate), demandBurst)
	if n > 0 {
		d.last = now
	}
	return int(max(0, n))
}
