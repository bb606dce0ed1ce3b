// Package socket is TCP connections, and Unix ones to backends, that stay out of
// Go's poller for as long as nobody waits for them there.
//
// Being in it costs a short connection a fifth of its time, and an idle one most
// of its memory: what is moved by an event loop should never have been. So a Conn
// is a descriptor first. It becomes a socket of Go's when somebody needs one, or
// is given away by Detach, whichever comes first, and is closed once in any case:
// no call uses a descriptor's number after another may have got it.
//
// Elsewhere than on Linux a Conn is a socket of Go's from the start.
package socket

import (
	"net"
	"time"
)

// KeepAlive is what Go does by default, and accepted connections have.
var KeepAlive = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second, Count: 9}

// Await waits until a descriptor is writable or has failed, and may return
// before. Its error ends the connect: at the deadline (zero = none),
// os.ErrDeadlineExceeded.
type Await func(fd int, deadline time.Time) error
