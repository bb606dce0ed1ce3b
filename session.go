package tcplb

import (
	"errors"
	"io"
	"net"
	"runtime/debug"
	"time"

	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

// session is one client's connection, from the handler's call to its end.
type session struct {
	generation *generation
	// client is what the handler was called with, or the accepted connection
	// inside it where that was taken over.
	client    net.Conn
	leavePool func() // nil: it was not admitted
	link             // to the backend, once it has one
	relay     *relay // nil: it never had a backend
	began     time.Time
	why       reason
	err       error
}

// serve is one connection's story. It ends with the call or, where the
// connection could be taken over, by itself.
func (g *generation) serve(cx *layer4.Connection) {
	open.enter() // finish leaves
	s := &session{generation: g, client: cx, began: time.Now()}
	if !s.begin(cx) {
		s.finish()
		return
	}
	if c, ok := cx.Conn.(*acceptedConn); ok {
		c.takeOver()
		s.client = c
		s.relay.start(s.finish)
		return
	}
	s.relay.run()
	s.finish()
}

// begin admits the client, connects to a backend and prepares the relay.
func (s *session) begin(cx *layer4.Connection) (ok bool) {
	g := s.generation
	defer func() {
		if v := recover(); v != nil {
			g.logPanic(v, debug.Stack())
			s.why, ok = reasonError, false
		}
	}()
	if s.leavePool, ok = g.admit(cx); !ok {
		s.why = reasonMaxConnections
		return false
	}
	if s.link, s.err = g.connect(cx.RemoteAddr()); s.err != nil {
		s.why = reasonNoBackend
		return false
	}
	r := newRelay(clientConn(cx), s.conn, g.idleTimeout)
	r.onPanic = g.logPanic
	r.up.total, r.down.total = &s.backend.stats.received, &s.backend.stats.sent
	r.up.first = prefetched(cx)
	s.relay = r
	if !s.backend.enter(s) {
		s.end(reasonDrainTimeout)
	}
	return true
}

// end cuts the session short, for the reason.
func (s *session) end(why reason) { s.relay.cut(why) }

// finish closes, counts and logs, and lets go of the backend.
func (s *session) finish() {
	defer open.leave()
	g := s.generation
	if s.conn != nil {
		_ = s.conn.Close()
	}
	if s.leavePool != nil {
		s.closeClient() // before its file is given back
		s.leavePool()
	}
	duration := time.Since(s.began)
	switch {
	case s.relay != nil:
		s.why = s.relay.reason()
		s.backend.leave(s, s.why, duration)
	case s.why == reasonNoBackend:
		g.pool.noBackend.Add(1)
	case s.why == reasonMaxConnections:
		g.pool.overLimit.Add(1)
	default:
		g.pool.failed.Add(1)
	}
	// Through the newest config's log: that of the one which accepted the
	// connection may be closed.
	to := g
	if newest := g.pool.newest.Load(); newest != nil {
		to = newest
	}
	if s.why == reasonNoBackend {
		s.logFailure(to.logger)
	}
	if to.accessLog {
		s.logAccess(to.access, duration)
	}
	if s.release != nil {
		s.release()
	}
}

func (s *session) closeClient() {
	if c, ok := s.client.(*acceptedConn); ok {
		_ = c.end()
		return
	}
	_ = s.client.Close()
}

func (s *session) logFailure(to *zap.Logger) {
	to.Debug("no backend could be reached",
		zap.String("lb", s.generation.name), zap.Stringer("client", s.client.RemoteAddr()),
		zap.Int("attempt", s.attempts), zap.Error(s.err))
}

// logAccess writes the connection's line. Its frame is large; finish, in which
// most goroutines would outgrow their first stack otherwise, calls it only if
// there is a line to write.
func (s *session) logAccess(to *zap.Logger, duration time.Duration) {
	var backend string
	if s.backend != nil {
		backend = s.backend.address
	}
	var received, sent uint64
	if s.relay != nil {
		received, sent = s.relay.up.moved.Load(), s.relay.down.moved.Load()
	}
	fields := []zap.Field{
		zap.String("lb", s.generation.name),
		zap.Stringer("client", s.client.RemoteAddr()),
		zap.String("backend", backend),
		zap.Int("attempts", s.attempts),
		zap.Duration("dial_time", s.took),
		zap.Duration("duration", duration),
		zap.Uint64("received_bytes", received),
		zap.Uint64("sent_bytes", sent),
		zap.Stringer("reason", s.why),
	}
	if s.err != nil && !errors.Is(s.err, net.ErrClosed) {
		fields = append(fields, zap.Error(s.err))
	}
	to.Info("connection", fields...)
}

// admit counts the connection against the limits.
func (g *generation) admit(cx *layer4.Connection) (release func(), ok bool) {
	p := g.pool
	if n := p.active.Add(1); g.limit > 0 && n > g.limit {
		p.active.Add(-1)
		g.warnOfLimit(g.limit)
		return nil, false
	}
	release, ok = g.leavePool, true
	if c := acceptedFrom(cx.Conn); c != nil {
		ok = c.admit()
	} else if ok = files.acquirePair(); ok {
		release = g.leavePoolAndFiles
	}
	if !ok {
		p.active.Add(-1)
		g.warnOfLimit(files.connections())
		return nil, false
	}
	return release, true
}

// warnOfLimit logs that connections are being refused, once a minute at most.
func (g *generation) warnOfLimit(limit int64) {
	now := time.Now().UnixNano()
	next := g.pool.nextLimitNotice.Load()
	if now < next || !g.pool.nextLimitNotice.CompareAndSwap(next, now+int64(time.Minute)) {
		return
	}
	g.logger.Warn("connection limit reached, closing new connections",
		zap.String("lb", g.name), zap.Int64("limit", limit))
}

func (g *generation) leavePool() { g.pool.active.Add(-1) }

func (g *generation) leavePoolAndFiles() {
	files.releasePair()
	g.leavePool()
}

// clientConn returns the connection to relay: the socket itself if nothing is
// in between, else caddy-l4's view of it.
func clientConn(cx *layer4.Connection) net.Conn {
	switch c := cx.Conn.(type) {
	case *acceptedConn:
		return c.TCPConn
	case *net.TCPConn, *net.UnixConn:
		return c
	}
	return cx
}

// prefetched takes out what matchers have read of the client's bytes; nil if
// they have read nothing.
func prefetched(cx *layer4.Connection) []byte {
	n := len(cx.MatchingBytes())
	if n == 0 {
		return nil
	}
	b := make([]byte, n)
	n, _ = io.ReadFull(cx, b) // from its buffer: it neither waits nor fails
	return b[:n]
}

func (g *generation) logPanic(value any, stack []byte) {
	g.logger.Error("panic while handling a connection",
		zap.String("lb", g.name), zap.Any("panic", value), zap.ByteString("stack", stack))
}
