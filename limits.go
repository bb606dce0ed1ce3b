package tcplb

import (
	"errors"
	"math"
	"net"
	"sync/atomic"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// The balancer must never let the process run out of files: caddy-l4 stops
// accepting for good when it does. So every file that it opens, or has caddy-l4
// open for it, is taken from one budget for the process, and refused in time.
var files = newFileBudget(openFileLimit())

func init() { relay.LimitPipes(int(files.limit / 64)) }

const filesPerConnection = 2 // the client's socket and the backend's

// fileBudget counts files against a limit.
type fileBudget struct {
	limit  int64 // files that connections may use
	probes int   // files set apart for probes
	used   atomic.Int64

	// Connections over the limit have to be accepted to be refused; these are
	// of the reserve.
	overflowLimit int64
	overflow      atomic.Int64

	// Of the files that are in use, those of connections that may stay without
	// coming to tcp_lb. They may be half, so that there are always some for
	// those that do.
	guests atomic.Int64
}

// newFileBudget divides the process's limit of open files (0 = none). Up to 64
// are set apart for probes and up to 128 for listeners, logs, the admin
// endpoint and whatever else Caddy serves; half of those may be connections
// that are about to be refused, and a few are pipes.
func newFileBudget(limit uint64) *fileBudget {
	if limit == 0 || limit > math.MaxInt32 {
		return &fileBudget{limit: math.MaxInt32, probes: 64, overflowLimit: 64}
	}
	n := int64(limit)
	probes, reserve := min(64, max(1, n/8)), min(128, n/4)
	return &fileBudget{
		limit:         max(filesPerConnection, n-probes-reserve),
		probes:        int(probes),
		overflowLimit: max(1, reserve/2),
	}
}

// connections returns how many connections the budget is enough for.
func (f *fileBudget) connections() int64 { return f.limit / filesPerConnection }

func (f *fileBudget) acquire(n int64) bool { return acquireUpTo(&f.used, n, f.limit) }

func (f *fileBudget) release(n int64) { f.used.Add(-n) }

// acquireGently takes files, for which slow probes give way.
func (f *fileBudget) acquireGently(n int64) bool {
	return f.acquire(n) || lanes.giveWay(int(n)) && f.acquire(n)
}

// acquirePair takes the files of one connection.
func (f *fileBudget) acquirePair() bool { return f.acquireGently(filesPerConnection) }

func (f *fileBudget) releasePair() { f.release(filesPerConnection) }

func (f *fileBudget) acquireOverflow() bool { return acquireUpTo(&f.overflow, 1, f.overflowLimit) }

func (f *fileBudget) releaseOverflow() { f.overflow.Add(-1) }

func (f *fileBudget) acquireForGuest(n int64) bool {
	return acquireUpTo(&f.guests, n, max(filesPerConnection, f.limit/2))
}

func (f *fileBudget) releaseOfGuest(n int64) { f.guests.Add(-n) }

func acquireUpTo(used *atomic.Int64, n, limit int64) bool {
	if used.Add(n) <= limit {
		return true
	}
	used.Add(-n)
	return false
}

// isScarcity reports whether a connect failed for want of something on this
// side, files, memory, places in epoll (ENOSPC) or local ports, which says
// nothing of the other side.
//
// Not among these are EAGAIN, by which a Unix socket's full queue is reported,
// and EPERM and EACCES, of a firewall, a policy or a route on this machine: by
// them the one backend can't be reached, for as long as they are in force.
func isScarcity(err error) bool {
	return isAny(err, shortageErrnos) || lacksPorts(err)
}

// lacksPorts reports whether all local ports to the destination are in use. The
// system has the same error for a destination that no local address can reach,
// as IPv6's where IPv6 is off. That holds for UDP, too, whose ports are others
// and whose connect sends nothing.
func lacksPorts(err error) bool {
	if !isAny(err, noAddressErrnos) {
		return false
	}
	var dial *net.OpError
	if !errors.As(err, &dial) {
		return true
	}
	to, ok := dial.Addr.(*net.TCPAddr)
	if !ok {
		return true
	}
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: to.IP, Port: to.Port, Zone: to.Zone})
	if err == nil {
		_ = c.Close()
	}
	return !isAny(err, noAddressErrnos)
}
