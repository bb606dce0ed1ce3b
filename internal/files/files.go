// Package files is the budget of open files. The balancer must never let the
// process run out of them: caddy-l4 stops accepting for good when it does. So
// every file that it opens, or has caddy-l4 open for it, is taken from one budget
// for the process, and refused in time.
//
// What the package promises: no more files are given out than there are; what is
// taken once is given back once, by whoever took it; nothing here waits. Who may
// take what, and who waits for whom, is for its callers to say.
package files

import (
	"math"
	"sync/atomic"
)

// Process is the budget of this process.
var Process = New(Divide(OpenLimit()))

// PerConnection is how many files one takes: the client's socket and the backend's.
const PerConnection = 2

// Shares are the parts of a limit of open files. The rest is a reserve for
// listeners, logs, the admin endpoint and whatever else Caddy serves.
type Shares struct {
	Connections int64 // files that connections may use
	Probes      int64 // set apart for probes
	Overflow    int64 // of the reserve, for connections that are accepted to be refused
}

// Divide divides the process's limit of open files (0 = none). Up to 64 are set
// apart for probes and up to 128 are in reserve: a quarter of those may be
// connections that are about to be refused, another is for pipes, half of one for
// event loops, and lookups take some.
func Divide(limit uint64) Shares {
	if limit == 0 || limit > math.MaxInt32 {
		return Shares{Connections: math.MaxInt32, Probes: 64, Overflow: 32}
	}
	n := int64(limit)
	probes, reserve := min(64, max(1, n/8)), min(128, n/4)
	return Shares{
		Connections: max(PerConnection, n-probes-reserve),
		Probes:      probes,
		Overflow:    max(1, reserve/4),
	}
}

// Budget counts files against its shares.
type Budget struct {
	shares   Shares
	used     atomic.Int64
	overflow atomic.Int64

	// Of the files that are in use, those of connections that may stay without
	// coming to tcp_lb. They may be half, so that there are always some for
	// those that do.
	guests atomic.Int64

	giveWay atomic.Pointer[func(n int64) bool]
}

// New returns a budget of which nothing is in use.
func New(s Shares) *Budget { return &Budget{shares: s} }

// Limit returns how many files connections may use.
func (b *Budget) Limit() int64 { return b.shares.Connections }

// Connections returns how many connections the budget is enough for.
func (b *Budget) Connections() int64 { return b.Limit() / PerConnection }

// Probes returns how many files are set apart for probes.
func (b *Budget) Probes() int { return int(b.shares.Probes) }

// Used, Overflow and Guests return how many files are in use of each share.
func (b *Budget) Used() int64     { return b.used.Load() }
func (b *Budget) Overflow() int64 { return b.overflow.Load() }
func (b *Budget) Guests() int64   { return b.guests.Load() }

// OnShortage has giveWay called when files are wanted and there are none. It
// gives back up to n of those that were borrowed, and reports false if there are
// none to give. It must not wait.
func (b *Budget) OnShortage(giveWay func(n int64) bool) { b.giveWay.Store(&giveWay) }

// Acquire takes n files, or none.
func (b *Budget) Acquire(n int64) bool { return b.AcquireBelow(n, b.Limit()) }

// AcquireBelow takes n files if no more than limit are in use then.
func (b *Budget) AcquireBelow(n, limit int64) bool { return acquireUpTo(&b.used, n, limit) }

// Release gives n files back.
func (b *Budget) Release(n int64) { b.used.Add(-n) }

// AcquireGently takes files, for which those who borrowed some give way.
func (b *Budget) AcquireGently(n int64) bool {
	if b.Acquire(n) {
		return true
	}
	giveWay := b.giveWay.Load()
	return giveWay != nil && (*giveWay)(n) && b.Acquire(n)
}

// AcquirePair takes the files of one connection.
func (b *Budget) AcquirePair() bool { return b.AcquireGently(PerConnection) }

// ReleasePair gives them back.
func (b *Budget) ReleasePair() { b.Release(PerConnection) }

// AcquireOverflow takes the file of a connection that is to be refused.
func (b *Budget) AcquireOverflow() bool { return acquireUpTo(&b.overflow, 1, b.shares.Overflow) }

// ReleaseOverflow gives it back.
func (b *Budget) ReleaseOverflow() { b.overflow.Add(-1) }

// AcquireForGuest counts n files, which are taken besides, as those of guests.
func (b *Budget) AcquireForGuest(n int64) bool {
	return acquireUpTo(&b.guests, n, max(PerConnection, b.Limit()/2))
}

// ReleaseOfGuest takes n files off that count.
func (b *Budget) ReleaseOfGuest(n int64) { b.guests.Add(-n) }

func acquireUpTo(used *atomic.Int64, n, limit int64) bool {
	if used.Add(n) <= limit {
		return true
	}
	used.Add(-n)
	return false
}
