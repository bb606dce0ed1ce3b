package tcplb

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// tcpPair returns both ends of a loopback connection, the first with a deadline.
func tcpPair(t testing.TB) (far *net.TCPConn, near net.Conn) {
	t.Helper()
	ln := listen(t)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	near, err = ln.Accept()
	require.NoError(t, err)
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c.(*net.TCPConn), near
}

func write(t testing.TB, c net.Conn, s string) {
	t.Helper()
	_, err := io.WriteString(c, s)
	require.NoError(t, err)
}

func expect(t testing.TB, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, s, string(b))
}

func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.Equal(t, io.EOF, err)
}

func expectReset(t testing.TB, c net.Conn) {
	t.Helper()
	_, err := io.ReadAll(c)
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func fill(b []byte) {
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
}

// flood writes to c until nobody takes any more, or the connection has ended.
func flood(t testing.TB, c *net.TCPConn) {
	t.Helper()
	for err := error(nil); !errors.Is(err, os.ErrDeadlineExceeded); {
		require.NoError(t, c.SetWriteDeadline(time.Now().Add(300*time.Millisecond)))
		_, err = c.Write(make([]byte, 1<<20))
		require.True(t, err == nil || errors.Is(err, os.ErrDeadlineExceeded), "%v", err)
	}
}

// sealed is a wrapper that nothing can look into, and that can't half-close.
type sealed struct{ inner net.Conn }

func (s sealed) Read(b []byte) (int, error)         { return s.inner.Read(b) }
func (s sealed) Write(b []byte) (int, error)        { return s.inner.Write(b) }
func (s sealed) Close() error                       { return s.inner.Close() }
func (s sealed) LocalAddr() net.Addr                { return s.inner.LocalAddr() }
func (s sealed) RemoteAddr() net.Addr               { return s.inner.RemoteAddr() }
func (s sealed) SetDeadline(t time.Time) error      { return s.inner.SetDeadline(t) }
func (s sealed) SetReadDeadline(t time.Time) error  { return s.inner.SetReadDeadline(t) }
func (s sealed) SetWriteDeadline(t time.Time) error { return s.inner.SetWriteDeadline(t) }
