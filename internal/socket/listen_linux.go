package socket

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/raw"
	"golang.org/x/sys/unix"
)

// Listener accepts TCP connections that are in nobody's poller.
type Listener struct {
	addr net.Addr

	// One of the two: the socket, or Go's listener on it where connections need
	// more than they inherit.
	file *os.File
	tcp  *net.TCPListener

	raw    syscall.RawConn // of file
	closed atomic.Bool
}

// Option is an option of a socket, as setsockopt(2) has it.
type Option struct{ Level, Name, Value int }

// inherited are set on a listening socket, and connections have them from it: Go
// would set each for each connection.
var inherited = append([]Option{{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}}, KeepAliveOptions...)

// KeepAliveOptions are KeepAlive as options.
var KeepAliveOptions = []Option{
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(KeepAlive.Idle / time.Second)},
	{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(KeepAlive.Interval / time.Second)},
	{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, KeepAlive.Count},
}

// Listen opens a socket with SO_REUSEPORT. Where config wants keep-alive probes
// of its own, or sockets need not pass options on (MPTCP), connections are Go's.
func Listen(ctx context.Context, address string, config net.ListenConfig) (*Listener, error) {
	inherit := config.KeepAlive == 0 && !config.KeepAliveConfig.Enable
	control := config.Control
	config.Control = func(network, address string, c syscall.RawConn) error {
		if control != nil {
			if err := control(network, address, c); err != nil {
				return err
			}
		}
		options := []Option{{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}}
		if inherit {
			options = append(options, inherited...)
		}
		return setOptions(c, options)
	}
	if inherit {
		config.KeepAlive = -1
		config.SetMultipathTCP(false) // which need not pass the options on
	}
	ln, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	tcp := ln.(*net.TCPListener)
	if !inherit {
		return &Listener{addr: tcp.Addr(), tcp: tcp}, nil
	}
	defer tcp.Close() // the copy is what listens
	l := &Listener{addr: tcp.Addr()}
	if l.file, err = tcp.File(); err != nil {
		return nil, err
	}
	if l.raw, err = l.file.SyscallConn(); err != nil {
		_ = l.file.Close()
		return nil, err
	}
	return l, nil
}

func setOptions(c syscall.RawConn, options []Option) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		for _, o := range options {
			if err == nil {
				err = unix.SetsockoptInt(int(fd), o.Level, o.Name, o.Value)
			}
		}
	})
	return errors.Join(cerr, err)
}

// Accept waits for a connection, until the deadline or Close.
func (l *Listener) Accept() (*Conn, error) {
	if l.tcp != nil {
		tcp, err := l.tcp.AcceptTCP()
		if err != nil {
			return nil, err
		}
		return Of(tcp), nil
	}
	c := &Conn{network: "tcp", unnamed: l.addr}
	if !l.addr.(*net.TCPAddr).IP.IsUnspecified() {
		c.local = l.addr // as every one of its connections has it
	}
	var failed error
	err := l.raw.Read(func(fd uintptr) (done bool) {
		done, failed = c.acceptFrom(int(fd))
		return done
	})
	switch {
	case err != nil && l.closed.Load(): // a closed file's says something else
		err = net.ErrClosed
	case err == nil:
		err = failed
	}
	if err != nil {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: err}
	}
	return c, nil
}

// acceptFrom makes c the next connection of the queue. It is not done if there
// is none.
func (c *Conn) acceptFrom(listener int) (done bool, err error) {
	for {
		fd, from, zone, err := raw.Accept(listener)
		switch err {
		case nil:
			c.fd, c.remote = fd, tcpAddr(from, zone)
			return true, nil
		case unix.EAGAIN:
			return false, nil
		case unix.EINTR, unix.ECONNABORTED: // the latter has left the queue
		default:
			return true, os.NewSyscallError("accept4", err)
		}
	}
}

// SetDeadline is that of net.TCPListener.
func (l *Listener) SetDeadline(t time.Time) error {
	if l.tcp != nil {
		return l.tcp.SetDeadline(t)
	}
	return l.file.SetReadDeadline(t)
}

// Close stops listening. An Accept that waits fails with net.ErrClosed.
func (l *Listener) Close() error {
	if l.tcp != nil {
		return l.tcp.Close()
	}
	l.closed.Store(true)
	return l.file.Close()
}

// Addr returns the socket's address.
func (l *Listener) Addr() net.Addr { return l.addr }
