package tcplb

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// socket is a listening socket, shared by the listeners of configs that
// overlap. Connections that wait to be accepted wait in it, not in any of them.
type socket struct {
	ln       *net.TCPListener
	entrance *entrance
	users    int // listeners that are not closed; guarded by sockets.mu

	// turn is held by the listener that accepts. One at a time does, so that a
	// listener that is closed can be woken without disturbing another.
	turn chan struct{}

	mu         sync.Mutex
	accepting  *listener // that holds the turn; nil = none, or it is not waiting
	nextNotice time.Time // before which no further warning is logged
}

// sockets are the open ones, by address.
var sockets = struct {
	mu sync.Mutex
	by map[string]*socket
}{by: make(map[string]*socket)}

// listener is one config's share in a socket.
type listener struct {
	*socket
	arrivals  arrivals
	closed    chan struct{}
	closeOnce sync.Once
	unwatch   func() bool // stops waiting for the config's end
}

// listenShared returns a listener on the socket for the address, and opens that
// if need be. The listener ends with ctx: caddy-l4 forgets to close it when
// another one of the config fails.
func listenShared(ctx context.Context, address caddy.NetworkAddress, config net.ListenConfig, how arrivals) (any, error) {
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	key := address.JoinHostPort(0)
	s := sockets.by[key]
	if s == nil {
		ln, err := openSocket(ctx, key, config)
		if errors.Is(err, fs.ErrPermission) {
			return address.Listen(ctx, 0, config) // Caddy may have ways to get it
		}
		if err != nil {
			return nil, err
		}
		s = &socket{entrance: &entrance{address: key}, ln: ln.(*net.TCPListener), turn: make(chan struct{}, 1)}
		sockets.by[key] = s
	}
	s.users++
	l := &listener{socket: s, arrivals: how, closed: make(chan struct{})}
	l.unwatch = context.AfterFunc(ctx, func() { _ = l.Close() })
	return l, nil
}

// openSocket listens as Caddy does, with SO_REUSEPORT: a reload may change from
// ":8080" to "tcp_lb/:8080", and back.
//
// Go would turn on keep-alive probes for each connection, in four system calls.
// Connections have it from the listening socket, with Go's numbers.
func openSocket(ctx context.Context, address string, config net.ListenConfig) (net.Listener, error) {
	inherit := config.KeepAlive == 0 && !config.KeepAliveConfig.Enable
	control := config.Control
	config.Control = func(network, address string, c syscall.RawConn) error {
		if control != nil {
			if err := control(network, address, c); err != nil {
				return err
			}
		}
		options := []socketOption{{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}}
		if inherit {
			options = append(options, keepAliveOptions...)
		}
		return setOptions(c, options)
	}
	if inherit {
		config.KeepAlive = -1
		config.SetMultipathTCP(false) // which need not pass the options on
	}
	return config.Listen(ctx, "tcp", address)
}

type socketOption struct{ level, name, value int }

// keepAliveOptions are relay.KeepAlive as socket options.
var keepAliveOptions = []socketOption{
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(relay.KeepAlive.Idle / time.Second)},
	{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(relay.KeepAlive.Interval / time.Second)},
	{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, relay.KeepAlive.Count},
}

func setOptions(c syscall.RawConn, options []socketOption) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		for _, o := range options {
			if err == nil {
				err = unix.SetsockoptInt(int(fd), o.level, o.name, o.value)
			}
		}
	})
	return errors.Join(cerr, err)
}

// Accept returns the next connection, or net.ErrClosed once l is closed. Other
// errors pass, a lack of files or what a connection had met with before it was
// accepted (accept(2)), but after any of them caddy-l4 would accept nothing more.
func (l *listener) Accept() (net.Conn, error) {
	for wait := minPause; ; wait = min(2*wait, maxPause) {
		if !l.takeTurn() {
			return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
		}
		conn, err := l.ln.AcceptTCP()
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
			l.notice("accepting fails, trying again", err)
			pause(wait, l.closed)
		}
	}
}

// receive takes the files for an accepted connection, and keeps it back while so
// many are on their way that there is none, for a grace at most. It returns nil if
// it closed the connection: one that may never come to a handler isn't waited for.
func (l *listener) receive(conn *net.TCPConn) *acceptedConn {
	c := &acceptedConn{TCPConn: conn, from: l.entrance}
	if l.arrivals.waiting == nil {
		if !c.claimAsGuest(l.arrivals.files) {
			l.entrance.turnAway(c, noFiles)
			_ = conn.Close()
			return nil
		}
		return c
	}
	c.claim(l.closed, func() { l.notice("no files are left, accepting slowly", nil) })
	l.arrivals.waiting.add(c)
	return c
}

// entrances returns the addresses on which a config listens, with their books.
func entrances() []*entrance {
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	list := make([]*entrance, 0, len(sockets.by))
	for _, s := range sockets.by {
		list = append(list, s.entrance)
	}
	return list
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

// notice logs why accepting pauses, once a minute at most.
func (l *listener) notice(message string, err error) {
	l.mu.Lock()
	now := time.Now()
	due := now.After(l.nextNotice)
	if due {
		l.nextNotice = now.Add(time.Minute)
	}
	l.mu.Unlock()
	if due {
		caddy.Log().Named("tcp_lb").Warn(message,
			zap.String("listener", l.entrance.address), zap.Error(err))
	}
}

// Interface guard
var _ net.Listener = (*listener)(nil)
