package tcplb

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/notice"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

// session is one client's connection, from the handler's call to its end. It
// keeps nothing of the config that accepted it: connections may outlive many.
type session struct {
	pool *pool
	from net.Addr // the client's address
	// client is what the handler was called with, or the accepted connection
	// inside it where that was taken over; nil: an event loop has all of it.
	client    net.Conn
	of        clientKey   // whose it is
	leavePool func(*pool) // nil: it was not admitted
	place     place       // among the backend's
	link                  // to the backend, once it has one
	relay     relay.Relay // nil: it never had a backend
	began     time.Time
	why       reason
	err       error
}

// serve is one connection's story. It ends with the call or, where the
// connection could be taken over, by itself.
func (g *generation) serve(cx *layer4.Connection) {
	open.enter() // finish leaves
	s := &session{pool: g.pool, client: cx, began: time.Now()}
	if !s.begin(g, cx) {
		s.finish()
		return
	}
	if c, ok := cx.Conn.(*listener.Conn); ok {
		s.takeOver(c)
		s.relay.Start(s.finish)
		return
	}
	s.relay.(*relay.Pair).Run() // others want a connection that can be taken over
	s.finish()
}

// takeOver keeps of an accepted connection what is needed to its end. On an
// event loop that is next to nothing, for thousands that rest.
func (s *session) takeOver(c *listener.Conn) {
	if _, ok := s.relay.(*relay.Pair); ok {
		c.TakeOver()
		s.client = c
		return
	}
	c.GiveAway()
	s.client, s.leavePool = nil, (*pool).leaveWithFiles
}

// begin admits the client, connects to a backend and prepares the relay.
func (s *session) begin(g *generation, cx *layer4.Connection) (ok bool) {
	defer func() {
		if v := recover(); v != nil {
			s.pool.logPanic(v, debug.Stack())
			if s.relay == nil {
				s.why, ok = reasonError, false
				return
			}
			s.end(reasonError)
			ok = true // it is the relay that closes the sockets
		}
	}()
	s.from = cx.RemoteAddr()
	find := search{pool: s.pool, request: Request{client: s.from, cx: cx}, began: s.began}
	s.of = clientKeyOf(find.request.Client().Addr())
	if s.leavePool, s.why = g.admit(cx, s.of); s.why != reasonNone {
		return false
	}
	find.waiter.client, find.waiter.silent = cx, isBare(cx.Conn) && len(cx.MatchingBytes()) == 0
	g, s.err = find.find(g)
	s.link = find.link
	if s.err != nil {
		s.why = find.failure(s.err)
		return false
	}
	s.from = compact(s.from)
	s.prepare(g, cx)
	if why := s.backend.enter(s); why != reasonNone {
		s.end(why)
	}
	s.contain(s.logConnected) // the relay, and with it the last line, is yet to start
	return true
}

// prepare makes the relay: on an event loop, which needs neither goroutines nor
// Go's poller, where there is one and both connections are bare sockets.
func (s *session) prepare(g *generation, cx *layer4.Connection) {
	o := relay.Options{
		IdleTimeout: g.idleTimeout,
		Lifetime:    g.lifetime.draw(rand.Float64()),
		First:       prefetched(cx),
		Up:          &s.backend.stats.received,
		Down:        &s.backend.stats.sent,
		OnPanic:     s.pool.onPanic,
	}
	if backend, ok := s.conn.(*socket.Conn); ok {
		if client, ok := cx.Conn.(*listener.Conn); ok {
			if r := newLooped(client, backend, o); r != nil {
				s.relay, s.conn = r, nil // which closes it
				return
			}
		}
		if real, err := backend.Real(); err == nil {
			s.conn = real
		}
	}
	s.relay = relay.New(clientConn(cx), s.conn, o)
}

// failure returns the reason of a search that failed with err.
func (s *search) failure(err error) reason {
	switch {
	case errors.Is(err, errClientLeft):
		return s.left
	case errors.Is(err, errAbandoned):
		return reasonDrainTimeout
	case errors.Is(err, errFull):
		return reasonMaxConnections
	default:
		return reasonNoBackend
	}
}

// end cuts the session short, for the reason.
func (s *session) end(why reason) { s.relay.Cut(relay.Reason(why)) }

// finish closes, counts and logs, and lets go of the backend.
func (s *session) finish() {
	defer open.leave()
	defer func() {
		if v := recover(); v != nil {
			s.pool.logPanic(v, debug.Stack())
		}
	}()
	if s.backend != nil {
		defer s.release()
	}
	if s.leavePool != nil {
		s.pool.clients.leave(s.of) // before its client can come again
	}
	s.contain(s.closeBackend)
	s.contain(s.closeClient)
	duration := time.Since(s.began)
	if s.relay != nil {
		s.why, s.err = reason(s.relay.Reason()), s.relay.Err()
		_, sent := s.relay.Moved()
		if s.why == reasonBackendClosed && sent == 0 && duration < earlyClose {
			s.why = reasonBackendClosedEarly
		}
		s.noteTrouble()
		if s.why == reasonBackendClosedEarly || s.why == reasonBackendReset && sent == 0 {
			s.backend.failed(s.trouble())
		}
		s.backend.leave(s, s.why, duration)
	} else {
		s.pool.closed[s.why].Add(1)
	}
	if s.leavePool != nil {
		s.leavePool(s.pool)
	}
	s.log(duration)
}

// earlyClose is within what time a backend that sends nothing and closes did not
// want the connection. Later it may be one that only receives, or one at rest.
const earlyClose = time.Second

// contain calls what may be anybody's code: a wrapper's Close, an address's String.
func (s *session) contain(f func()) {
	defer func() {
		if v := recover(); v != nil {
			s.pool.logPanic(v, debug.Stack())
		}
	}()
	f()
}

func (s *session) closeBackend() {
	if s.conn != nil {
		_ = s.conn.Close()
	}
}

// closeClient closes a client that was admitted. Others are their listener's.
func (s *session) closeClient() {
	if s.leavePool == nil || s.client == nil {
		return
	}
	if socket, ok := innermost(s.client).(interface{ SetLinger(int) error }); ok && s.relay == nil && s.why == reasonDrainTimeout {
		_ = socket.SetLinger(0) // cut, as others are
	}
	if c, ok := s.client.(*listener.Conn); ok {
		_ = c.End()
	} else {
		_ = s.client.Close()
	}
}

// log says how the connection ended, through the newest config's log: that of
// the one which accepted the connection may be closed.
func (s *session) log(duration time.Duration) {
	to := s.pool.voice.Load()
	switch {
	case s.why == reasonNoBackend:
		s.logRefusal(to, "no backend could be reached", &s.pool.refusals, s.pool.warnOfRefusals)
	case errors.Is(s.err, errFull):
		s.logRefusal(to, "no backend had a place", &s.pool.overPlaces, s.pool.warnOfPlaces)
	}
	if to.accessLog {
		s.logAccess(to.access, duration)
	}
}

// logRefusal says that a client was turned away: each at level DEBUG, and once
// a minute how many at WARN.
func (s *session) logRefusal(to *voice, message string, n *notice.Notice, warn func(uint64)) {
	if c := to.logger.Check(zap.DebugLevel, message); c != nil {
		c.Write(zap.String("lb", s.pool.name), zap.Stringer("client", s.from),
			zap.Int("attempt", s.attempts), errorField(s.err))
	}
	n.Add(warn)
}

func (p *pool) warnOfRefusals(clients uint64) {
	p.voice.Load().logger.Warn("clients are turned away, no backend could be reached",
		zap.String("lb", p.name), zap.Uint64("clients", clients))
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
		received, sent = s.relay.Moved()
	}
	fields := []zap.Field{
		zap.String("lb", s.pool.name),
		zap.Stringer("client", s.from),
		zap.String("backend", backend),
		zap.Int("attempts", s.attempts),
		zap.Duration("dial_time", s.took),
		zap.Duration("duration", duration),
		zap.Uint64("received_bytes", received),
		zap.Uint64("sent_bytes", sent),
		zap.Stringer("reason", s.why),
	}
	if len(s.failed) > 0 {
		fields = append(fields, zap.Array("failed", s.failed))
	}
	switch {
	case errors.Is(s.err, errNoBackend):
		fields = append(fields, errorField(errNoBackend)) // failed has the rest
	case s.err != nil:
		fields = append(fields, errorField(s.err))
	}
	level := zap.InfoLevel
	if s.why.failure() {
		level = zap.WarnLevel
	}
	to.Log(level, "connection", fields...)
}

// admit counts the connection against the limits, first of all the client's own:
// who is over that takes no place of others. why is the reason for a refusal. What
// it counts for the client finish takes back.
func (g *generation) admit(cx *layer4.Connection, client clientKey) (release func(*pool), why reason) {
	p := g.pool
	if !p.clients.enterSoon(client, g.clientLimit) {
		p.clients.refused.Store(new(client)) // a copy, which only this way needs
		p.overClients.Add(p.warnOfClients)
		return nil, reasonMaxConnectionsPerClient
	}
	if release, ok := g.admitToPool(cx); ok {
		return release, reasonNone
	}
	p.clients.leave(client)
	return nil, reasonMaxConnections
}

func (g *generation) admitToPool(cx *layer4.Connection) (release func(*pool), ok bool) {
	p := g.pool
	if n := p.active.Add(1); g.limit > 0 && n > g.limit {
		p.leave()
		p.overLimit.Add(p.warnOfLimit)
		return nil, false
	}
	release, ok = (*pool).leave, true
	if c := acceptedFrom(cx.Conn); c != nil {
		ok = c.Admit()
	} else if ok = files.Process.AcquirePair(); ok {
		release = (*pool).leaveWithFiles
	}
	if !ok {
		p.leave()
		p.overFiles.Add(p.warnOfFiles)
		return nil, false
	}
	return release, true
}

func (p *pool) warnOfPlaces(clients uint64) {
	p.voice.Load().logger.Warn("clients are turned away, every available backend has its max_connections",
		zap.String("lb", p.name), zap.Uint64("clients", clients))
}

func (p *pool) warnOfLimit(clients uint64) {
	to := p.voice.Load()
	to.logger.Warn("connection limit reached, closing new connections",
		zap.String("lb", p.name), zap.Int64("max_connections", to.limit), zap.Uint64("clients", clients))
}

// warnOfClients names one of them.
func (p *pool) warnOfClients(connections uint64) {
	to := p.voice.Load()
	to.logger.Warn("a client has its limit of connections, closing new ones", zap.String("lb", p.name),
		zap.Stringer("client", p.clients.refused.Load()), zap.Int64("max_connections_per_client", to.clientLimit), zap.Uint64("connections", connections))
}

func (p *pool) warnOfFiles(clients uint64) {
	p.voice.Load().logger.Warn("connection limit reached, all pools together have the process's files in use, closing new connections",
		zap.String("lb", p.name), zap.Int64("limit", files.Process.Connections()), zap.Uint64("clients", clients))
}

func (p *pool) leaveWithFiles() {
	files.Process.ReleasePair()
	p.leave()
}

// clientConn returns the connection to relay: the socket itself if nothing is
// in between, else caddy-l4's view of it.
func clientConn(cx *layer4.Connection) net.Conn {
	switch c := cx.Conn.(type) {
	case *listener.Conn:
		if conn := c.NetConn(); conn != nil {
			return conn
		}
	case *net.TCPConn, *net.UnixConn:
		return c
	}
	return cx
}

// isBare reports whether nothing is between the socket and caddy-l4.
func isBare(conn net.Conn) bool {
	switch conn.(type) {
	case *listener.Conn, *net.TCPConn, *net.UnixConn:
		return true
	}
	return false
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

func (p *pool) logPanic(value any, stack []byte) {
	p.voice.Load().logger.Error("panic while handling a connection",
		zap.String("lb", p.name), zap.Any("panic", value), zap.ByteString("stack", stack))
}
