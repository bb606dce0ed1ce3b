package relay

import (
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
)

// keepAliveAfter is the age at which a connection to a backend begins to be
// probed when it is silent. It takes four system calls, and the kernel would
// not have sent the first probe before.
const keepAliveAfter = 15 * time.Second

// KeepAlive is what clients' connections have, too.
var KeepAlive = socket.KeepAlive

// idleTime finds out how long nothing has moved, from looks at a count.
type idleTime struct {
	since time.Time // of the first look that found this count
	count uint64
}

// look returns how long the count has been the same, at least.
func (i *idleTime) look(count uint64, now time.Time) time.Duration {
	if count != i.count {
		*i = idleTime{since: now, count: count}
	}
	return now.Sub(i.since)
}

// period is the time between two looks. An idle connection ends no earlier than
// its timeout after the last byte, and no later than a period after that.
func period(idleTimeout time.Duration) time.Duration {
	if idleTimeout == 0 {
		return keepAliveAfter
	}
	return min(keepAliveAfter, max(idleTimeout/8, time.Millisecond))
}
