package relay

import (
	"net"
	"reflect"
	"sync/atomic"
	"syscall"
	"time"
)

// side is one of the two connections.
type side struct {
	// conn is read and written: a bare socket, or whatever wraps it.
	conn net.Conn
	// raw is set for a bare socket, to read it when it is ready and to splice.
	raw syscall.RawConn
	// base is the innermost connection, where a reset has to happen.
	base net.Conn
	// writeCloser half-closes; nil if nothing in the chain can.
	writeCloser writeCloser
	// patient is conn, if that can be waited for without a buffer.
	patient patient

	closed, reset, failed Reason // how it is called when this side does it

	finished atomic.Bool // it closed its sending way in order
	lost     atomic.Bool // it reset the connection, or is unreachable
	over     atomic.Bool // it was ended here, so that its errors tell nothing
}

type writeCloser interface{ CloseWrite() error }

// patient is a wrapper that is waited for before it is read: package secure's.
type patient interface {
	// Await returns once ReadReady may have something.
	Await() error
	// ReadReady reads what is there, which may be nothing.
	ReadReady(b []byte) (int, error)
	// Complete reports whether the peer has said that nothing more comes.
	Complete() bool
	// Shed gives memory back, and may be called at any time.
	Shed()
}

func (s *side) init(conn net.Conn, closed, reset, failed Reason) {
	s.conn, s.base, s.closed, s.reset, s.failed = conn, conn, closed, reset, failed
	for s.base != nil {
		if s.writeCloser == nil {
			s.writeCloser, _ = s.base.(writeCloser)
		}
		inner := Unwrap(s.base)
		if inner == nil {
			break
		}
		s.base = inner
	}
	s.patient, _ = conn.(patient)
	switch c := conn.(type) { // exactly these types: a wrapper may hold bytes back
	case *net.TCPConn:
		s.raw, _ = c.SyscallConn()
	case *net.UnixConn:
		s.raw, _ = c.SyscallConn()
	}
}

// Unwrap returns the connection inside conn, or nil. Reads and writes must not
// use it; a reset and, where the wrapper can't, a half-close may.
func Unwrap(conn net.Conn) net.Conn {
	switch c := conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		return nil
	case interface{ NetConn() net.Conn }: // crypto/tls, and what this balancer accepts
		return c.NetConn()
	case interface{ Raw() net.Conn }: // PROXY protocol
		return c.Raw()
	}
	// The usual wrapper is a struct that embeds a net.Conn.
	v := reflect.ValueOf(conn)
	if v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct {
		return nil
	}
	f, ok := v.Type().FieldByName("Conn")
	if !ok || !f.Anonymous || len(f.Index) != 1 {
		return nil
	}
	inner, _ := v.FieldByIndex(f.Index).Interface().(net.Conn)
	return inner
}

// closeWrite passes an end of file on, behind all that was written. Where no
// layer can half-close, the end of the whole connection has to tell it: a peer
// that waits for it would wait until the idle timeout.
func (s *side) closeWrite() {
	if s.writeCloser == nil {
		s.over.Store(true)
		_ = s.conn.Close()
		return
	}
	if s.writeCloser.CloseWrite() == nil {
		return
	}
	// TLS gives up on its closing alert where the receiver takes nothing for 5 s;
	// the socket's end of file needs no room.
	if inner, ok := s.base.(writeCloser); ok {
		_ = inner.CloseWrite()
	}
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// sever makes all that waits for the connection fail, now and later, and its
// close a reset, where there is such a thing. It never blocks, so it leaves what
// is no socket to expire.
func (s *side) sever() {
	s.over.Store(true)
	switch c := s.base.(type) {
	case *net.TCPConn:
		_ = c.SetLinger(0)
		_ = c.SetDeadline(longAgo)
	case *net.UnixConn:
		_ = c.SetDeadline(longAgo)
	}
}

// expire makes what waits for the connection fail, whatever it is: code of
// somebody else's, which may block, as close may.
func (s *side) expire() { _ = s.base.SetDeadline(longAgo) }

// close closes the innermost connection: the layers around it could still say a
// proper goodbye.
func (s *side) close() { _ = s.base.Close() }
