package tcplb

import (
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// turnedAway says why a connection of a tcp_lb listener was ended before it
// reached a handler. Its names are values of a label.
type turnedAway int

const (
	handshakeTimeout turnedAway = iota // not there in time
	filesShort                         // on its way for long while others had no file
	noFiles                            // no file left for it
	numTurnedAway
)

var turnedAwayNames = [numTurnedAway]string{
	handshakeTimeout: "handshake_timeout",
	filesShort:       "files_short",
	noFiles:          "max_connections",
}

// entrance is the address of a tcp_lb listener, with its books. They last as
// long as a config listens there.
type entrance struct {
	address string
	counts  [numTurnedAway]atomic.Uint64

	notice notice
	mu     sync.Mutex
	told   [numTurnedAway]uint64 // of counts, what has been logged; guarded by mu
}

// turnAway counts and logs a connection that has been ended: one line each for
// debugging, and warnings that sum up.
func (e *entrance) turnAway(c *acceptedConn, why turnedAway) {
	e.counts[why].Add(1)
	logger := caddy.Log().Named("tcp_lb")
	if line := logger.Check(zap.DebugLevel, "closed a connection that had not reached tcp_lb"); line != nil {
		line.Write(zap.String("listener", e.address), zap.Stringer("client", c.RemoteAddr()),
			zap.Duration("waited", c.waited()), zap.String("reason", turnedAwayNames[why]))
	}
	e.notice.add(e.warn)
}

func (e *entrance) warn(uint64) {
	e.mu.Lock()
	fields := []zap.Field{zap.String("listener", e.address)}
	for i := range e.counts {
		n := e.counts[i].Load()
		fields = append(fields, zap.Uint64(turnedAwayNames[i]+"_count", n-e.told[i]))
		e.told[i] = n
	}
	e.mu.Unlock()
	caddy.Log().Named("tcp_lb").Warn("closed connections that had not reached tcp_lb", fields...)
}
