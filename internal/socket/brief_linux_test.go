package socket

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func brief(t testing.TB, c *Conn) net.Conn {
	t.Helper()
	b, err := c.Brief()
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func TestBrief(t *testing.T) {
	c, peer := pair(t)
	fd := c.fd
	local, remote := c.LocalAddr(), c.RemoteAddr()
	b := brief(t, c)
	require.True(t, polled(t, fd), "the descriptor itself, not a copy")
	require.NoError(t, c.Close(), "which it has nothing to do with any more")
	require.Equal(t, local, b.LocalAddr())
	require.Equal(t, remote, b.RemoteAddr())

	go write(t, peer, "hello")
	expect(t, b, "hello")
	write(t, b, "bye")
	require.NoError(t, b.(*Brief).CloseWrite())
	expect(t, peer, "bye")
	_, err := peer.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)

	write(t, peer, "late")
	require.NoError(t, peer.CloseWrite())
	expect(t, b, "late")
	_, err = b.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err, "as it is")
	require.NoError(t, b.Close())
	_, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	require.ErrorIs(t, err, unix.EBADF, "the file is back")
}

// Errors and deadlines are those of Go's sockets.
func TestBriefErrors(t *testing.T) {
	failsAs := func(t *testing.T, b net.Conn, is error, text string) {
		t.Helper()
		_, err := b.Read(make([]byte, 1))
		var op *net.OpError
		require.True(t, errors.As(err, &op), "%v", err)
		require.Equal(t, b.RemoteAddr(), op.Addr)
		require.ErrorIs(t, err, is)
		require.ErrorContains(t, err, text)
	}
	t.Run("deadline", func(t *testing.T) {
		c, _ := pair(t)
		require.NoError(t, c.SetDeadline(time.Now().Add(time.Millisecond)))
		b := brief(t, c)
		failsAs(t, b, os.ErrDeadlineExceeded, "i/o timeout")
		require.NoError(t, b.SetDeadline(time.Time{}))
		ended := make(chan error)
		go func() {
			_, err := b.Read(make([]byte, 1))
			ended <- err
		}()
		require.NoError(t, b.SetReadDeadline(time.Unix(1, 0)), "of one that waits")
		var timeout net.Error
		require.True(t, errors.As(<-ended, &timeout) && timeout.Timeout())
	})
	t.Run("reset", func(t *testing.T) {
		c, peer := pair(t)
		b := brief(t, c)
		require.NoError(t, peer.SetLinger(0))
		require.NoError(t, peer.Close())
		failsAs(t, b, unix.ECONNRESET, "read: connection reset by peer")
	})
	t.Run("closed", func(t *testing.T) {
		c, _ := pair(t)
		b := brief(t, c)
		require.NoError(t, b.Close())
		failsAs(t, b, net.ErrClosed, "use of closed network connection")
		require.ErrorIs(t, b.SetDeadline(time.Time{}), net.ErrClosed)
		require.ErrorIs(t, b.(*Brief).CloseWrite(), net.ErrClosed)
		require.ErrorIs(t, b.Close(), net.ErrClosed)
	})
	t.Run("one that is real", func(t *testing.T) {
		c, _ := pair(t)
		_, err := c.Real()
		require.NoError(t, err)
		require.Same(t, c, brief(t, c))
	})
	t.Run("one that is closed", func(t *testing.T) {
		c, _ := pair(t)
		require.NoError(t, c.Close())
		_, err := c.Brief()
		require.ErrorIs(t, err, net.ErrClosed)
	})
}
