package tcplb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
)

// secure makes the TLS handshake on a new connection to b, in its turn, by the
// deadline or the end of ctx; afresh where it is to resume no session. After an error
// conn is closed.
func (b *Backend) secure(ctx context.Context, conn net.Conn, s *security, afresh bool, deadline time.Time, turn *secure.Turn) (net.Conn, error) {
	began := time.Now()
	if s.timeout > 0 {
		deadline = earlier(deadline, began.Add(s.timeout))
	}
	bare := conn
	if c, ok := conn.(*socket.Conn); ok { // crypto/tls waits in Go's poller
		real, err := c.Real()
		if err != nil {
			_ = conn.Close()
			return nil, err
		}
		bare = real
	}
	channel := b.channelBy(s)
	config, offered, cut := channel.config, channel.session.Load() != nil, channel.cut.Load()
	if afresh {
		config, offered = channel.afresh(), false
	}
	c, err := secure.Client(ctx, bare, config, deadline, turn) // which drops the session where it fails
	if err == nil {
		if offered {
			channel.cut.Store(0)
		}
		return c, nil
	}
	_ = bare.Close()
	return nil, &handshakeError{err, deadline.Sub(began), offered && isRefusal(err), cut}
}

// isRefusal reports whether it was the other side that ended the handshake.
func isRefusal(err error) bool {
	return secure.IsAlert(err) || relay.IsReset(err) || errors.Is(err, io.EOF)
}

// refusedSession returns err if it is the end of a handshake that was to resume a
// session. Some servers that want certificates of clients end each of those; one
// without a session tells whether this is such a server.
func refusedSession(err error) *handshakeError {
	var e *handshakeError
	if !errors.As(err, &e) || !e.resuming {
		return nil
	}
	return e
}

// errTLS is of what failed in a handshake.
var errTLS = errors.New("TLS handshake")

// handshakeError is a failed handshake. What it wraps may be a timeout or a reset,
// and is of TLS all the same.
type handshakeError struct {
	err    error
	within time.Duration // what it had

	resuming bool  // a session was offered, and the other side ended it
	cut      int32 // the channel's, before
}

func (e *handshakeError) Error() string { return "TLS handshake: " + e.words() }

func (e *handshakeError) words() string {
	var op *net.OpError
	switch {
	case errors.Is(e.err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("not done within %s", e.within.Round(time.Millisecond))
	case errors.Is(e.err, io.EOF), errors.Is(e.err, io.ErrUnexpectedEOF):
		return "the backend closed the connection"
	case errors.As(e.err, &op) && op.Source != nil: // with a local port, another one each time
		return op.Err.Error()
	}
	return e.err.Error()
}

func (e *handshakeError) Unwrap() []error { return []error{errTLS, e.err} }

// trouble says why the connection has failed, and what is known of that.
func (s *session) trouble() string {
	if s.err == nil {
		return s.why.String()
	}
	return s.why.String() + ": " + oneLine(s.err)
}

// noteTrouble keeps what TLS has ended an open connection, which is the backend's
// word, or about it: one that does not like the certificate it was shown says so
// after the handshake, as TLS 1.3 has it. A reset is TCP's, and as any other's.
func (s *session) noteTrouble() {
	c, ok := s.conn.(*secure.Conn)
	if !ok {
		return
	}
	if err := c.Failure(); err != nil && !relay.IsReset(err) && (s.why == reasonBackendReset || s.why == reasonError) {
		s.err = fmt.Errorf("TLS: %w", err)
		s.backend.setError(s.err)
		s.backend.checkSoon()
	}
}
