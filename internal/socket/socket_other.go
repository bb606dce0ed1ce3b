//go:build !linux

package socket

import (
	"errors"
	"net"
	"net/netip"
	"time"
)

// Conn is a TCP connection.
type Conn struct{ *net.TCPConn }

// Of returns a Conn that is a socket of Go's.
func Of(c *net.TCPConn) *Conn { return &Conn{TCPConn: c} }

// Real returns the socket of Go's.
func (c *Conn) Real() (net.Conn, error) { return c.TCPConn, nil }

// Detach is Linux's only.
func (c *Conn) Detach() (fd int, ok bool) { return -1, false }

// Connect is Linux's only: elsewhere it returns errors.ErrUnsupported.
func Connect(netip.AddrPort, time.Time, Await) (*Conn, error) {
	return nil, errors.ErrUnsupported
}

// ConnectFrom is Linux's only, too.
func ConnectFrom(netip.Addr, netip.AddrPort, time.Time, Await) (*Conn, error) {
	return nil, errors.ErrUnsupported
}

// ConnectUnix is Linux's only, too.
func ConnectUnix(string, time.Time, Await) (*Conn, error) {
	return nil, errors.ErrUnsupported
}
