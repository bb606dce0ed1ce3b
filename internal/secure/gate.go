package secure

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// gate is the socket as crypto/tls sees it. Once the handshake is done reading
// does not wait: what is there was read before, by await.
type gate struct {
	net.Conn // a *net.TCPConn or *net.UnixConn
	raw      syscall.RawConn
	shaking  *handshake // nil: there is none now
	lazy     bool       // reading does not wait

	// For whoever reads only.
	buf   *[bufferSize]byte // holds the rest
	rest  []byte
	err   error // how reading has ended
	ended bool  // by an end of file of the socket's
	fill  func(fd uintptr) bool
}

// bufferSize has room for two records of the largest size, about.
const bufferSize = 32 << 10

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

func newGate(socket net.Conn) (*gate, error) {
	with, ok := socket.(syscall.Conn)
	if !ok {
		return nil, errors.New("no socket")
	}
	raw, err := with.SyscallConn()
	if err != nil {
		return nil, err
	}
	g := &gate{Conn: socket, raw: raw}
	g.fill = g.fillFrom
	return g, nil
}

// errNothing is that of a read that would have to wait. To crypto/tls it is a
// timeout, after which a read may be tried again.
var errNothing error = nothing{}

type nothing struct{}

func (nothing) Error() string   { return "nothing there" }
func (nothing) Timeout() bool   { return true }
func (nothing) Temporary() bool { return true }

// Read implements net.Conn, for crypto/tls.
func (g *gate) Read(b []byte) (n int, err error) {
	switch {
	case g.shaking != nil:
		return g.shaking.read(b)
	case !g.lazy:
		n, err = g.Conn.Read(b)
	case len(g.rest) > 0:
		n = copy(b, g.rest)
		g.keep(g.rest[n:])
	case g.err != nil:
		err = g.err
	default:
		err = errNothing
	}
	g.ended = g.ended || err == io.EOF
	return n, err
}

// Write implements net.Conn, for crypto/tls.
func (g *gate) Write(b []byte) (int, error) {
	if g.shaking != nil {
		return g.shaking.write(b)
	}
	return g.Conn.Write(b)
}

// keep has the rest kept for the next read, if there is one.
func (g *gate) keep(rest []byte) {
	g.rest = rest
	if len(rest) == 0 && g.buf != nil {
		buffers.Put(g.buf)
		g.buf, g.rest = nil, nil
	}
}

// SetWriteDeadline does nothing: crypto/tls would give a closing alert five
// seconds, and a receiver may be slower than that.
func (g *gate) SetWriteDeadline(time.Time) error { return nil }
