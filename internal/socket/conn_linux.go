package socket

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a stream, TCP or Unix. Its methods may be called from any goroutine,
// as those of net.TCPConn.
//
// Addresses, deadlines, SetLinger and Close do without a socket of Go's; so does
// a Read that need not wait. All else makes one, and fails if that can't be had:
// the connection is lost then.
type Conn struct {
	network string
	remote  net.Addr
	unnamed net.Addr // the local address as far as it is known without a call

	real atomic.Pointer[net.Conn] // *net.TCPConn or *net.UnixConn; set once

	mu              sync.Mutex // guards the rest
	fd              int        // -1: it is real, closed or detached
	closed          bool
	detached        bool
	lingers         bool     // Close may wait
	local           net.Addr // nil: not asked for
	readBy, writeBy time.Time
}

// Of returns a Conn that is a socket of Go's.
func Of(tcp *net.TCPConn) *Conn {
	c := &Conn{network: "tcp", remote: tcp.RemoteAddr(), local: tcp.LocalAddr(), fd: -1}
	conn := net.Conn(tcp)
	c.real.Store(&conn)
	return c
}

// Real returns the *net.TCPConn or *net.UnixConn that c becomes by the call, if
// it is not one yet.
func (c *Conn) Real() (net.Conn, error) {
	if real := c.real.Load(); real != nil {
		return *real, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if real := c.real.Load(); real != nil {
		return *real, nil
	}
	if c.fd < 0 {
		return nil, net.ErrClosed
	}
	c.findLocalLocked()
	conn, err := goSocket(c.fd)
	c.fd = -1
	if err != nil {
		c.closed = true
		return nil, err
	}
	if !c.readBy.IsZero() {
		_ = conn.SetReadDeadline(c.readBy)
	}
	if !c.writeBy.IsZero() {
		_ = conn.SetWriteDeadline(c.writeBy)
	}
	c.real.Store(&conn)
	return conn, nil
}

// goSocket turns a descriptor into a socket of Go's, or closes it with a reset.
func goSocket(fd int) (net.Conn, error) {
	// For a moment it is blocking: os.NewFile takes it into Go's poller otherwise,
	// and it is only its copy that has to get there.
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_RDWR)
	f := os.NewFile(uintptr(fd), "socket")
	conn, err := net.FileConn(f) // on a copy of the descriptor
	if err != nil {
		_ = setLinger(fd, 0)
	}
	_ = f.Close()
	return conn, err
}

// Detach gives the descriptor away, which is non-blocking and in nobody's
// poller. From then on c has addresses only, and Close does nothing. It reports
// false if c is closed or detached, if its close may wait, or there is no file for a
// copy, by which c leaves Go's poller; then c is as it was. Nobody may be reading or
// writing.
func (c *Conn) Detach() (fd int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.detached || c.lingers {
		return -1, false
	}
	c.findLocalLocked()
	if c.fd >= 0 {
		fd, c.fd, c.detached = c.fd, -1, true
		return fd, true
	}
	conn := *c.real.Load()
	fd, err := duplicate(conn)
	if err != nil {
		return -1, false
	}
	c.detached = true
	_ = conn.Close()
	return fd, true
}

func duplicate(conn net.Conn) (fd int, err error) {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
	if cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// Close closes the connection, once.
func (c *Conn) Close() error {
	c.mu.Lock()
	fd, closed, detached := c.fd, c.closed, c.detached
	if !detached {
		c.fd, c.closed = -1, true
	}
	c.mu.Unlock()
	switch {
	case detached:
		return nil
	case fd >= 0:
		return c.failure("close", os.NewSyscallError("close", unix.Close(fd)))
	}
	if real := c.real.Load(); real != nil {
		return (*real).Close() // says so if it is closed
	}
	if closed {
		return c.failure("close", net.ErrClosed)
	}
	return nil
}

// Read reads what is there, and makes a socket of Go's to wait for more.
func (c *Conn) Read(b []byte) (int, error) {
	if c.real.Load() == nil {
		if n, done, err := c.readNow(b); done {
			return n, err
		}
	}
	conn, err := c.Real()
	if err != nil {
		return 0, c.failure("read", err)
	}
	return conn.Read(b)
}

// readNow reads from the descriptor. It is not done if that would wait, or c
// has none.
func (c *Conn) readNow(b []byte) (n int, done bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 || !c.readBy.IsZero() && !time.Now().Before(c.readBy) {
		return 0, false, nil
	}
	for {
		n, err = unix.Read(c.fd, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, false, nil
		case err != nil:
			return 0, true, c.failureLocked("read", os.NewSyscallError("read", err))
		case n == 0 && len(b) > 0:
			return 0, true, io.EOF
		default:
			return n, true, nil
		}
	}
}

// Write makes a socket of Go's.
func (c *Conn) Write(b []byte) (int, error) {
	conn, err := c.Real()
	if err != nil {
		return 0, c.failure("write", err)
	}
	return conn.Write(b)
}

// Send writes all of b, by the deadline, and c stays what it is. Nobody else may
// be using c.
func (c *Conn) Send(b []byte, deadline time.Time, await Await) error {
	if c.real.Load() != nil {
		return c.sendReal(b, deadline)
	}
	for len(b) > 0 {
		n, err := unix.Write(c.fd, b)
		switch {
		case err == unix.EAGAIN:
			err = await(c.fd, deadline)
		case err == unix.EINTR:
			err = nil
		case err != nil:
			err = os.NewSyscallError("write", err)
		default:
			b = b[n:]
		}
		if err != nil {
			return &net.OpError{Op: "write", Net: c.network, Addr: c.remote, Err: err}
		}
	}
	return nil
}

func (c *Conn) sendReal(b []byte, deadline time.Time) error {
	if err := c.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := c.Write(b)
	return errors.Join(err, c.SetWriteDeadline(time.Time{}))
}

// LocalAddr returns the connection's own address. Of one that was closed before
// anybody asked, it may be the listener's.
func (c *Conn) LocalAddr() net.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.findLocalLocked()
	if c.local == nil {
		return c.unnamed
	}
	return c.local
}

func (c *Conn) findLocalLocked() {
	if c.local != nil || c.fd < 0 {
		return
	}
	if sa, err := unix.Getsockname(c.fd); err == nil {
		c.local = addrOf(sa)
	}
}

// RemoteAddr returns the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline is that of net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.setDeadline(net.Conn.SetDeadline, t, &c.readBy, &c.writeBy)
}

// SetReadDeadline is that of net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline(net.Conn.SetReadDeadline, t, &c.readBy)
}

// SetWriteDeadline is that of net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(net.Conn.SetWriteDeadline, t, &c.writeBy)
}

// setDeadline remembers it, for when c becomes real: as long as nobody waits
// there is nothing to end.
func (c *Conn) setDeadline(set func(net.Conn, time.Time) error, t time.Time, remember ...*time.Time) error {
	c.mu.Lock()
	real := c.real.Load()
	gone := c.fd < 0
	if real == nil && !gone {
		for _, r := range remember {
			*r = t
		}
	}
	c.mu.Unlock()
	switch {
	case real != nil:
		return set(*real, t)
	case gone:
		return c.failure("set", net.ErrClosed)
	}
	return nil
}

// SetLinger is that of net.TCPConn.
func (c *Conn) SetLinger(seconds int) error {
	c.mu.Lock()
	c.lingers = seconds > 0
	if c.fd >= 0 {
		defer c.mu.Unlock()
		return c.failureLocked("set", setLinger(c.fd, seconds))
	}
	c.mu.Unlock()
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetLinger(seconds) })
}

func setLinger(fd, seconds int) error {
	l := unix.Linger{Onoff: 1, Linger: int32(seconds)}
	if seconds < 0 {
		l = unix.Linger{}
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &l))
}

// failure is err as Go's sockets have it.
func (c *Conn) failure(op string, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failureLocked(op, err)
}

func (c *Conn) failureLocked(op string, err error) error {
	if err == nil {
		return nil
	}
	local := c.local
	if local == nil {
		local = c.unnamed
	}
	return &net.OpError{Op: op, Net: c.network, Source: local, Addr: c.remote, Err: err}
}

// tcpAddr makes a net.TCPAddr, in one piece.
func tcpAddr(ap netip.AddrPort, zone uint32) *net.TCPAddr {
	a := new(struct {
		net.TCPAddr
		ip [16]byte
	})
	a.IP, a.Port, a.Zone = a.ip[:0], int(ap.Port()), zones.name(zone)
	if ip := ap.Addr(); ip.Is4() {
		b := ip.As4()
		a.IP = append(a.IP, b[:]...)
	} else {
		b := ip.As16()
		a.IP = append(a.IP, b[:]...)
	}
	return &a.TCPAddr
}

// addrOf returns nil for what is no address of a stream.
func addrOf(sa unix.Sockaddr) net.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
	case *unix.SockaddrInet6:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port, Zone: zones.name(sa.ZoneId)}
	case *unix.SockaddrUnix:
		return &net.UnixAddr{Name: sa.Name, Net: "unix"}
	}
	return nil
}
