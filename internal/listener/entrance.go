package listener

import (
	"iter"
	"sync"
	"sync/atomic"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/notice"
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

// Entrance is the address of a tcp_lb listener, with its books. They last as
// long as a config listens there.
type Entrance struct {
	address string
	log     func() *zap.Logger
	counts  [numTurnedAway]atomic.Uint64

	notice notice.Notice
	mu     sync.Mutex
	told   [numTurnedAway]uint64 // of counts, what has been logged; guarded by mu
}

// Address returns where it is, host:port.
func (e *Entrance) Address() string { return e.address }

// TurnedAway yields how many connections were ended there before they reached a
// handler, by the reason.
func (e *Entrance) TurnedAway() iter.Seq2[string, uint64] {
	return func(yield func(reason string, count uint64) bool) {
		for why, reason := range turnedAwayNames {
			if !yield(reason, e.counts[why].Load()) {
				return
			}
		}
	}
}

// turnAway counts and logs a connection that has been ended: one line each for
// debugging, and warnings that sum up.
func (e *Entrance) turnAway(c *Conn, why turnedAway) {
	e.counts[why].Add(1)
	if line := e.log().Check(zap.DebugLevel, "closed a connection that had not reached tcp_lb"); line != nil {
		line.Write(zap.String("listener", e.address), zap.Stringer("client", c.RemoteAddr()),
			zap.Duration("waited", c.waited()), zap.String("reason", turnedAwayNames[why]))
	}
	e.notice.Add(e.warn)
}

func (e *Entrance) warn(uint64) {
	e.mu.Lock()
	fields := []zap.Field{zap.String("listener", e.address)}
	for i := range e.counts {
		n := e.counts[i].Load()
		fields = append(fields, zap.Uint64(turnedAwayNames[i]+"_count", n-e.told[i]))
		e.told[i] = n
	}
	e.mu.Unlock()
	e.log().Warn("closed connections that had not reached tcp_lb", fields...)
}
