package listener

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/notice"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
	"go.uber.org/zap"
)

// sharedSocket is a listening socket, shared by the listeners of configs that
// overlap. Connections that wait to be accepted wait in it, not in any of them.
type sharedSocket struct {
	ln       *socket.Listener
	entrance *Entrance
	users    int // listeners that are not closed; guarded by sockets.mu

	// turn is held by the listener that accepts. One at a time does, so that a
	// listener that is closed can be woken without disturbing another.
	turn chan struct{}

	mu        sync.Mutex
	accepting *listener // that holds the turn; nil = none, or it is not waiting
	lastError error     // of an accept

	failing, slow notice.Notice
}

// sockets are the open ones, by address.
var sockets = struct {
	mu sync.Mutex
	by map[string]*sharedSocket
}{by: make(map[string]*sharedSocket)}

// listener is one config's share in a socket.
type listener struct {
	*sharedSocket
	arrivals  Arrivals
	closed    chan struct{}
	closeOnce sync.Once
	unwatch   func() bool // stops waiting for the config's end
}

// Listen returns a listener on the socket for the address, host:port, and opens
// that if need be. The listener ends with ctx: caddy-l4 forgets to close it when
// another one of the config fails.
//
// The socket has SO_REUSEPORT as Caddy's have: a reload may change from ":8080"
// to "tcp_lb/:8080", and back.
func Listen(ctx context.Context, address string, config net.ListenConfig, how Arrivals, log func() *zap.Logger) (net.Listener, error) {
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	s := sockets.by[address]
	if s == nil {
		ln, err := socket.Listen(ctx, address, config)
		if err != nil {
			return nil, err
		}
		s = &sharedSocket{entrance: &Entrance{address: address, log: log}, ln: ln, turn: make(chan struct{}, 1)}
		sockets.by[address] = s
	}
	s.users++
	l := &listener{sharedSocket: s, arrivals: how, closed: make(chan struct{})}
	l.unwatch = context.AfterFunc(ctx, func() { _ = l.Close() })
	return l, nil
}

// Accept returns the next connection, or net.ErrClosed once l is closed. Other
// errors pass, a lack of files or what a connection had met with before it was
// accepted (accept(2)), but after any of them caddy-l4 would accept nothing more.
func (l *listener) Accept() (net.Conn, error) {
	for wait := minPause; ; wait = min(2*wait, maxPause) {
		if !l.takeTurn() {
			return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
		}
		conn, err := l.ln.Accept()
		l.endTurn()
		switch {
		case err == nil:
			if c := l.receive(conn); c != nil {
				return c, nil
			}
			wait = minPause / 2 // what it was about is over
		case isClosed(l.closed):
			// The next round says so.
		case errors.Is(err, net.ErrClosed):
			return nil, err
		default:
			l.failed(err)
			pause(wait, l.closed)
		}
	}
}

// receive takes the files for an accepted connection, and keeps it back while so
// many are on their way that there is none, for a grace at most. It returns nil if
// it closed the connection: one that may never come to a handler isn't waited for.
func (l *listener) receive(conn *socket.Conn) *Conn {
	c := &Conn{Conn: conn, from: l.entrance}
	if l.arrivals.Waiting == nil {
		if !c.claimAsGuest(l.arrivals.Files) {
			l.entrance.turnAway(c, noFiles)
			_ = conn.Close()
			return nil
		}
		return c
	}
	c.claim(l.closed, l.waits)
	l.arrivals.Waiting.add(c)
	return c
}

// Entrances returns the addresses on which a config listens, with their books.
func Entrances() []*Entrance {
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	list := make([]*Entrance, 0, len(sockets.by))
	for _, s := range sockets.by {
		list = append(list, s.entrance)
	}
	return list
}

// Accepting returns the list of the config that is accepting at the address; nil
// if there is none, or the config has no list.
func Accepting(address string) *WaitingList {
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	s := sockets.by[address]
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.accepting == nil {
		return nil
	}
	return s.accepting.arrivals.Waiting
}

// takeTurn waits until l may accept; it reports false once l is closed.
func (l *listener) takeTurn() bool {
	select {
	case l.turn <- struct{}{}:
	case <-l.closed:
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if isClosed(l.closed) {
		<-l.turn
		return false
	}
	l.accepting = l
	return true
}

func (l *listener) endTurn() {
	l.mu.Lock()
	l.accepting = nil
	if isClosed(l.closed) {
		_ = l.ln.SetDeadline(time.Time{}) // Close may have set one
	}
	l.mu.Unlock()
	<-l.turn
}

// Close ends l. The socket closes with the last of its listeners.
func (l *listener) Close() error {
	var err error
	l.closeOnce.Do(func() {
		l.unwatch()
		l.mu.Lock()
		close(l.closed)
		if l.accepting == l {
			_ = l.ln.SetDeadline(time.Unix(1, 0)) // wakes it
		}
		l.mu.Unlock()

		sockets.mu.Lock()
		defer sockets.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(sockets.by, l.entrance.address)
			err = l.ln.Close()
		}
	})
	return err
}

// Addr returns the socket's address.
func (l *listener) Addr() net.Addr { return l.ln.Addr() }

// failed notes that accepting did.
func (s *sharedSocket) failed(err error) {
	s.mu.Lock()
	s.lastError = err
	s.mu.Unlock()
	s.failing.Add(func(times uint64) {
		s.mu.Lock()
		err := s.lastError
		s.mu.Unlock()
		s.entrance.log().Warn("accepting fails, trying again",
			zap.String("listener", s.entrance.address), zap.Error(err), zap.Uint64("times", times))
	})
}

// waits notes that a connection has to be kept back.
func (s *sharedSocket) waits() {
	s.slow.Add(func(times uint64) {
		s.entrance.log().Warn("no files are left, accepting slowly",
			zap.String("listener", s.entrance.address), zap.Uint64("times", times))
	})
}

// Interface guard
var _ net.Listener = (*listener)(nil)
