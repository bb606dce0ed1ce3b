// Package relay moves bytes both ways between two connections until both ways
// have ended. It knows connections, not backends or configs.
//
// It promises:
//   - An end of file on one side becomes a half-close on the other, and the other
//     way goes on. A reset becomes a reset, after what was read before it has been
//     delivered, so that nobody takes a cut stream for a complete one.
//   - Bytes that were read before the relay began go first, and once. Bytes are
//     counted as they are delivered.
//   - A receiver that is slow stops the sender. An idle connection holds no buffer
//     and no pipe, and one whose receiver is stuck no pipe.
//   - A connection ends for one reason, and a cut from any goroutine, at any
//     moment, never waits. A panic ends the connection, not the process.
package relay

import (
	"sync/atomic"
	"time"
)

// Relay is one connection being relayed. Its methods may be called from any
// goroutine, at any time, also after its end.
type Relay interface {
	// Start relays without the caller, and calls ended once nothing uses the
	// connections any more. It is called once.
	Start(ended func())
	// Cut ends the connection at once, whatever either side does or doesn't, and
	// never waits for that. Both sides see a reset: the stream was not complete.
	Cut(why Reason)
	// Reason returns why the connection ended; None if it has not.
	Reason() Reason
	// Err returns what went wrong, of one that has ended for ClientError or Error;
	// nil if nobody said.
	Err() error
	// Moved returns how many bytes were delivered to the backend and to the client.
	Moved() (up, down uint64)
	// Idle returns for about how long no byte has moved.
	Idle() time.Duration
}

// Options of a relay.
type Options struct {
	IdleTimeout time.Duration // it ends when no byte has moved for so long; 0 = never
	Lifetime    time.Duration // it ends at this age, whatever moves; 0 = never
	First       []byte        // were read from the client before, and go first
	// Up and Down get what is delivered to the backend and to the client added,
	// live, beside the relay's own count.
	Up, Down *atomic.Uint64
	// OnPanic is called with what was recovered, before the connection ends.
	OnPanic func(value any, stack []byte)
}
