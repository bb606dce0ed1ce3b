package secure

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is the client's side of a TLS connection whose handshake is done.
type Conn struct {
	tls  *tls.Conn
	gate *gate

	mu      sync.Mutex // held while reading, but not while waiting
	mayHave bool       // what was received before may give more
	done    atomic.Bool
	failure atomic.Pointer[error]
}

// closeTime is what Close gives its closing alert where the peer's buffers are
// full. Nobody is there to read it then.
const closeTime = 50 * time.Millisecond

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// Client makes the handshake on a *net.TCPConn or *net.UnixConn, in its turn, by
// the deadline (zero = none) and for as long as ctx lasts. What it waits for
// processors puts the deadline off. After an error the socket is the caller's to
// close.
func Client(ctx context.Context, socket net.Conn, config *tls.Config, deadline time.Time, turn *Turn) (*Conn, error) {
	g, err := newGate(socket)
	if err != nil {
		return nil, err
	}
	if err := socket.SetDeadline(deadline); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = socket.SetDeadline(longAgo) })
	c := &Conn{tls: tls.Client(g, config), gate: g, mayHave: true}
	err = g.shake(c.tls, &handshake{ctx: ctx, turn: turn, socket: socket, deadline: deadline})
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	_ = socket.SetDeadline(time.Time{})
	// A renegotiation is a handshake amid reading, and has to wait in it.
	g.lazy = canWait && config.Renegotiation == tls.RenegotiateNever
	c.shed()
	return c, nil
}

// ConnectionState is that of tls.Conn.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.tls.ConnectionState() }

// Await returns once ReadReady may have something, and holds nothing meanwhile.
// It fails where the socket does that waits, as by a deadline.
func (c *Conn) Await() error {
	if c.mayHave || !c.gate.lazy {
		return nil
	}
	c.mayHave = true
	return c.gate.await()
}

// ReadReady reads what is there; 0 and no error where that is not a record yet.
// It is one goroutine's, as Await is.
func (c *Conn) ReadReady(b []byte) (int, error) {
	c.mu.Lock()
	n, err := c.tls.Read(b)
	c.mu.Unlock()
	if err == errNothing {
		c.mayHave = false
		return n, nil
	}
	if err == io.EOF && !c.gate.ended {
		c.done.Store(true)
	}
	if err != nil && err != io.EOF {
		c.failure.Store(&err)
	}
	return n, err
}

// Read is that of net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	for {
		if err := c.Await(); err != nil {
			return 0, err
		}
		if n, err := c.ReadReady(b); n > 0 || err != nil || len(b) == 0 {
			return n, err
		}
	}
}

// Complete reports whether the peer has said that it sends no more. Whatever
// becomes of the socket after that, nothing is missing.
func (c *Conn) Complete() bool { return c.done.Load() }

// Failure returns what has ended the reading, an end of file apart.
func (c *Conn) Failure() error {
	if err := c.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// IsAlert reports whether err is the peer's, which has ended the connection by
// an alert: as one does that does not like the other's certificate.
func IsAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// Shed gives back what crypto/tls keeps for the next record, unless that is being
// read. It never waits.
func (c *Conn) Shed() {
	if c.mu.TryLock() {
		c.shed()
		c.mu.Unlock()
	}
}

// Write is that of net.Conn.
func (c *Conn) Write(b []byte) (int, error) { return c.tls.Write(b) }

// CloseWrite says that no more comes: by a closing alert, however long that has to
// wait for room, and then as TCP says it, for those who look at nothing else.
func (c *Conn) CloseWrite() error {
	err := c.tls.CloseWrite()
	if half, ok := c.gate.Conn.(interface{ CloseWrite() error }); ok {
		return errors.Join(err, half.CloseWrite())
	}
	return err
}

// Close says goodbye, if it has not been said, and closes the socket.
func (c *Conn) Close() error {
	_ = c.gate.Conn.SetWriteDeadline(time.Now().Add(closeTime))
	return c.tls.Close()
}

// NetConn returns the socket.
func (c *Conn) NetConn() net.Conn { return c.gate.Conn }

// LocalAddr returns the socket's.
func (c *Conn) LocalAddr() net.Addr { return c.gate.LocalAddr() }

// RemoteAddr returns the socket's.
func (c *Conn) RemoteAddr() net.Addr { return c.gate.RemoteAddr() }

// SetDeadline is the socket's. After a write that it ends nothing can be written.
func (c *Conn) SetDeadline(t time.Time) error { return c.gate.Conn.SetDeadline(t) }

// SetReadDeadline is the socket's.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.gate.Conn.SetReadDeadline(t) }

// SetWriteDeadline is the socket's.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.gate.Conn.SetWriteDeadline(t) }

// Interface guard
var _ net.Conn = (*Conn)(nil)
