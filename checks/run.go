package checks

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"
)

// Wire is what stands between a check and its backend.
type Wire struct {
	Proxy ProxyVersion // a PROXY header comes first
	TLS   *tls.Config  // nil = none; without a server name the backend's host is it
}

// lingerTime is how long a check waits, once its verdict is certain, for the
// backend to close first; a tenth of that where the backend said it would not.
var lingerTime = 50 * time.Millisecond

// Run checks the target once. Its Dial makes the bare connections.
//
// After a check that passed they are closed in order: with TLS by a close_notify,
// and not by a reset, which services log. Who closes first has the port in
// TIME_WAIT for a minute; where the protocol lets the backend, it is that.
func Run(ctx context.Context, c Check, w Wire, t Target) (err error) {
	r := run{ctx: ctx, wire: w, target: t}
	t.Dial = r.dial
	returned := false
	defer func() {
		if !returned {
			err = &Panic{recover(), debug.Stack()}
		}
		r.close(err == nil)
	}()
	err = explained(c.Check(ctx, t))
	returned = true
	return err
}

// Panic is the error of a check that panics, which may be anybody's module.
type Panic struct {
	Value any
	Stack []byte
}

func (p *Panic) Error() string { return fmt.Sprintf("panic in the check: %v", p.Value) }

// run is one check's connection.
type run struct {
	ctx    context.Context
	wire   Wire
	target Target

	raw  *line // nil = there is none
	tls  *tls.Conn
	stop func() bool // of what ends raw's reads and writes with ctx
}

func (r *run) dial(ctx context.Context) (net.Conn, error) {
	r.close(false)
	conn, err := r.target.Dial(ctx)
	if err != nil {
		return nil, err
	}
	raw := &line{Conn: conn}
	r.raw = raw
	r.stop = context.AfterFunc(r.ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	if header := r.wire.Proxy.local(); header != "" {
		if _, err := io.WriteString(raw, header); err != nil {
			return nil, fmt.Errorf("sending the PROXY header: %w", err)
		}
	}
	if r.wire.TLS == nil {
		return raw, nil
	}
	config := r.wire.TLS
	if config.ServerName == "" {
		config = config.Clone()
		config.ServerName = ServerName(r.target.Host)
	}
	secure := tls.Client(raw, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		if errors.Is(cmp.Or(r.ctx.Err(), ctx.Err()), context.DeadlineExceeded) {
			return nil, ErrHandshakeLate
		}
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	r.tls = secure
	return secure, nil
}

// ErrHandshakeLate is of a TLS handshake that took all the time there was.
var ErrHandshakeLate = fmt.Errorf("TLS handshake: %w", &failure{"not done", context.DeadlineExceeded})

// ServerName returns the host as a certificate has it: without the zone of a
// link-local address, which is this machine's own word.
func ServerName(host string) string {
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() != "" {
		return ip.WithZone("").String()
	}
	return host
}

// line is a bare connection, of which is known whether the backend has closed it.
type line struct {
	net.Conn
	ended atomic.Bool
}

// Read implements net.Conn.
func (l *line) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if err == io.EOF {
		l.ended.Store(true)
	}
	return n, err
}

// CloseWrite is that of net.TCPConn.
func (l *line) CloseWrite() error {
	if half, ok := l.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// close ends the connection, if there is one; in order if the check passed, so
// that the backend has nothing to complain of.
func (r *run) close(passed bool) {
	if r.raw == nil {
		return
	}
	r.stop()
	// Where the backend has closed and all is read, Close is in order by itself.
	if passed && (r.tls != nil || !r.raw.ended.Load()) {
		// What is not read, a session ticket or the rest of an answer, would have
		// Close send a reset.
		raw := r.raw
		timer := time.AfterFunc(lingerTime, func() { _ = raw.Close() })
		if r.tls != nil {
			finish(r.tls)
		} else {
			finish(raw)
		}
		timer.Stop()
	}
	_ = r.raw.Close()
	r.raw, r.tls = nil, nil
}

// finish says that nothing more comes, and reads until the backend says so, too.
func finish(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_, _ = io.Copy(io.Discard, conn)
	}
}

// awaitClose waits for so long for the backend to close. What it still says is of
// no use.
func awaitClose(conn net.Conn, d time.Duration) {
	if conn.SetReadDeadline(time.Now().Add(d)) == nil {
		_, _ = io.Copy(io.Discard, conn)
	}
}

// maxAnswer is how much of what a backend says is looked at.
const maxAnswer = 64 << 10

// maxText is the length of what is told of a failure: a backend may answer
// anything.
const maxText = 300

// failure is an error in other words.
type failure struct {
	text string
	err  error
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.err }

// explained leaves out of an error what its reader has no use for.
func explained(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	var op *net.OpError
	if errors.As(err, &op) && op.Source != nil { // with a local port, another one each time
		text = strings.Replace(text, op.Error(), op.Err.Error(), 1)
	}
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "…"
	}
	if text == err.Error() {
		return err
	}
	return &failure{text, err}
}

// unsent says why a write has failed. A backend that takes no more may have said
// why before, in a text or a TLS alert, and a reset leaves that to be read.
func unsent(conn net.Conn, err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() || conn.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return err
	}
	said := make([]byte, 100)
	n, last := conn.Read(said)
	var op *net.OpError
	switch {
	case n > 0:
		return &failure{fmt.Sprintf("got %q: %s", said[:n], explained(err)), err}
	case errors.As(last, &op) && op.Op == "remote error":
		return last
	}
	return err
}

// received says what became of a read.
func received(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &failure{"the backend closed the connection", err}
	}
	return err
}
