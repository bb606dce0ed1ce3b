package socket

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Brief is a connection that ends soon. It waits in Go's poller, as Go's sockets
// do, which cost a dozen system calls more: for a copy of the descriptor, and
// options that only matter to one that rests.
type Brief struct {
	f             *os.File
	network       string
	local, remote net.Addr
}

// Brief returns what c becomes by that; c is detached then. Who has it already as
// a socket of Go's gets that.
func (c *Conn) Brief() (net.Conn, error) {
	if c.real.Load() != nil {
		return c, nil
	}
	local := c.LocalAddr()
	fd, ok := c.Detach()
	if !ok {
		return nil, c.failure("detach", net.ErrClosed)
	}
	b := &Brief{os.NewFile(uintptr(fd), "socket"), c.network, local, c.remote}
	// os.NewFile does not tell where Go's poller could not have it, which this does.
	if err := b.f.SetReadDeadline(c.readBy); err != nil {
		_ = b.f.Close()
		return nil, &net.OpError{Op: "dial", Net: c.network, Addr: c.remote, Err: os.NewSyscallError("epoll_ctl", unix.ENOSPC)}
	}
	if !c.writeBy.IsZero() {
		_ = b.SetWriteDeadline(c.writeBy)
	}
	return b, nil
}

// Read implements net.Conn.
func (b *Brief) Read(p []byte) (int, error) {
	n, err := b.f.Read(p)
	return n, b.failure("read", err)
}

// Write implements net.Conn.
func (b *Brief) Write(p []byte) (int, error) {
	n, err := b.f.Write(p)
	return n, b.failure("write", err)
}

// Close implements net.Conn.
func (b *Brief) Close() error { return b.failure("close", b.f.Close()) }

// CloseWrite is that of net.TCPConn.
func (b *Brief) CloseWrite() error {
	raw, err := b.f.SyscallConn()
	if err != nil {
		return b.failure("close", err)
	}
	if cerr := raw.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) }); cerr != nil {
		err = cerr
	}
	return b.failure("shutdown", err)
}

// SyscallConn implements syscall.Conn.
func (b *Brief) SyscallConn() (syscall.RawConn, error) { return b.f.SyscallConn() }

// LocalAddr implements net.Conn.
func (b *Brief) LocalAddr() net.Addr { return b.local }

// RemoteAddr implements net.Conn.
func (b *Brief) RemoteAddr() net.Addr { return b.remote }

// SetDeadline implements net.Conn.
func (b *Brief) SetDeadline(t time.Time) error { return b.failure("set", b.f.SetDeadline(t)) }

// SetReadDeadline implements net.Conn.
func (b *Brief) SetReadDeadline(t time.Time) error { return b.failure("set", b.f.SetReadDeadline(t)) }

// SetWriteDeadline implements net.Conn.
func (b *Brief) SetWriteDeadline(t time.Time) error { return b.failure("set", b.f.SetWriteDeadline(t)) }

// failure is err as Go's sockets have it.
func (b *Brief) failure(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	var ofFile *os.PathError
	if errors.As(err, &ofFile) {
		err = ofFile.Err
	}
	switch errno, isErrno := err.(unix.Errno); {
	case isErrno:
		err = os.NewSyscallError(op, errno)
	case !errors.Is(err, os.ErrDeadlineExceeded): // of closed files there are two
		err = net.ErrClosed
	}
	return &net.OpError{Op: op, Net: b.network, Source: b.local, Addr: b.remote, Err: err}
}

// Interface guards
var (
	_ net.Conn     = (*Brief)(nil)
	_ syscall.Conn = (*Brief)(nil)
)
