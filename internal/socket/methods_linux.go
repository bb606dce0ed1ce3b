package socket

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

// What follows are methods of net.TCPConn, by which others may know one. Each
// makes a socket of Go's.

// SyscallConn is that of net.TCPConn.
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	conn, err := c.Real()
	if err != nil {
		return nil, c.failure("syscall", err)
	}
	return conn.(syscall.Conn).SyscallConn()
}

// File is that of net.TCPConn.
func (c *Conn) File() (*os.File, error) {
	conn, err := c.Real()
	if err != nil {
		return nil, c.failure("file", err)
	}
	return conn.(interface{ File() (*os.File, error) }).File()
}

// ReadFrom is that of net.TCPConn.
func (c *Conn) ReadFrom(r io.Reader) (int64, error) {
	conn, err := c.Real()
	if err != nil {
		return 0, c.failure("readfrom", err)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		return tcp.ReadFrom(r)
	}
	return io.Copy(struct{ io.Writer }{conn}, r) // a Unix socket's ReadFrom is another
}

// WriteTo is that of net.TCPConn.
func (c *Conn) WriteTo(w io.Writer) (int64, error) {
	conn, err := c.Real()
	if err != nil {
		return 0, c.failure("writeto", err)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		return tcp.WriteTo(w)
	}
	return io.Copy(w, struct{ io.Reader }{conn})
}

// CloseRead is that of net.TCPConn.
func (c *Conn) CloseRead() error {
	conn, err := c.Real()
	if err != nil {
		return c.failure("close", err)
	}
	return conn.(interface{ CloseRead() error }).CloseRead()
}

// CloseWrite is that of net.TCPConn.
func (c *Conn) CloseWrite() error {
	conn, err := c.Real()
	if err != nil {
		return c.failure("close", err)
	}
	return conn.(interface{ CloseWrite() error }).CloseWrite()
}

// SetNoDelay is that of net.TCPConn.
func (c *Conn) SetNoDelay(on bool) error {
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetNoDelay(on) })
}

// SetKeepAlive is that of net.TCPConn.
func (c *Conn) SetKeepAlive(on bool) error {
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetKeepAlive(on) })
}

// SetKeepAlivePeriod is that of net.TCPConn.
func (c *Conn) SetKeepAlivePeriod(d time.Duration) error {
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetKeepAlivePeriod(d) })
}

// SetKeepAliveConfig is that of net.TCPConn.
func (c *Conn) SetKeepAliveConfig(config net.KeepAliveConfig) error {
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetKeepAliveConfig(config) })
}

// SetReadBuffer is that of net.TCPConn.
func (c *Conn) SetReadBuffer(bytes int) error {
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetReadBuffer(bytes) })
}

// SetWriteBuffer is that of net.TCPConn.
func (c *Conn) SetWriteBuffer(bytes int) error {
	return c.withTCP(func(tcp *net.TCPConn) error { return tcp.SetWriteBuffer(bytes) })
}

func (c *Conn) withTCP(set func(*net.TCPConn) error) error {
	conn, err := c.Real()
	if err != nil {
		return c.failure("set", err)
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return c.failure("set", errors.ErrUnsupported)
	}
	return set(tcp)
}

// Interface guards
var (
	_ net.Conn      = (*Conn)(nil)
	_ syscall.Conn  = (*Conn)(nil)
	_ io.ReaderFrom = (*Conn)(nil)
	_ io.WriterTo   = (*Conn)(nil)
)
