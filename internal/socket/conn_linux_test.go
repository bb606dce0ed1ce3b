package socket

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What comes before a handler asks for a socket keeps a connection out of Go's
// poller; what needs one gets it, with all that was said before.
func TestConnBecomesRealWhenItMust(t *testing.T) {
	isReal := func(c *Conn) bool { return c.real.Load() != nil }
	t.Run("not by what needs no poller", func(t *testing.T) {
		c, peer := pair(t)
		fd := c.descriptor(t)
		require.Equal(t, peer.LocalAddr().String(), c.RemoteAddr().String())
		require.Equal(t, peer.RemoteAddr().String(), c.LocalAddr().String())
		for _, d := range []time.Time{time.Now().Add(time.Hour), {}} {
			require.NoError(t, c.SetDeadline(d))
			require.NoError(t, c.SetReadDeadline(d))
			require.NoError(t, c.SetWriteDeadline(d))
		}
		require.NoError(t, c.SetLinger(-1))
		write(t, peer, "hello")
		waitReadable(t, fd)
		expect(t, c, "hello")
		require.NoError(t, peer.CloseWrite())
		waitReadable(t, fd)
		n, err := c.Read(make([]byte, 1))
		require.Zero(t, n)
		require.Equal(t, io.EOF, err)
		require.False(t, isReal(c))
		require.False(t, polled(t, fd))
		require.NoError(t, c.Close())
	})
	for name, f := range map[string]func(c *Conn) error{
		"Write":       func(c *Conn) error { _, err := c.Write([]byte("x")); return err },
		"CloseWrite":  (*Conn).CloseWrite,
		"SyscallConn": func(c *Conn) error { _, err := c.SyscallConn(); return err },
		"SetNoDelay":  func(c *Conn) error { return c.SetNoDelay(false) },
		"Real":        func(c *Conn) error { _, err := c.Real(); return err },
		"Read": func(c *Conn) error {
			_ = c.SetReadDeadline(time.Unix(1, 0))
			_, err := c.Read(make([]byte, 1))
			if !assert.ErrorIs(t, err, os.ErrDeadlineExceeded) {
				return err
			}
			return nil
		},
	} {
		t.Run("by "+name, func(t *testing.T) {
			c, peer := pair(t)
			require.NoError(t, f(c))
			require.True(t, isReal(c))
			require.True(t, polled(t, c.descriptor(t)))
			require.Equal(t, peer.RemoteAddr().String(), c.LocalAddr().String())
			conn, err := c.Real()
			require.NoError(t, err)
			again, err := c.Real()
			require.NoError(t, err)
			require.Same(t, conn, again)
			require.NoError(t, c.Close())
			require.ErrorIs(t, c.Close(), net.ErrClosed)
		})
	}
}

func waitReadable(t testing.TB, fd int) {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, int(hangTimeout/time.Millisecond))
		if err != unix.EINTR {
			require.NoError(t, err)
			require.Equal(t, 1, n, "readable")
			return
		}
	}
}

func TestDeadlinesAreRemembered(t *testing.T) {
	c, _ := pair(t)
	began := time.Now()
	require.NoError(t, c.SetReadDeadline(began.Add(50*time.Millisecond)))
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.GreaterOrEqual(t, time.Since(began), 50*time.Millisecond)
	write(t, c, "the other way is open")

	c, peer := pair(t)
	require.NoError(t, c.SetWriteDeadline(time.Unix(1, 0)))
	_, err = c.Write([]byte("x"))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	write(t, peer, "x")
	expect(t, c, "x")

	c, peer = pair(t)
	require.NoError(t, c.SetDeadline(time.Unix(1, 0)))
	require.NoError(t, c.SetDeadline(time.Time{}))
	write(t, c, "x")
	expect(t, peer, "x")
	require.NoError(t, c.SetDeadline(time.Unix(1, 0)))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "set when it is real")
}

func TestLingerAndClose(t *testing.T) {
	c, peer := pair(t)
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	_, err := peer.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.ErrorIs(t, c.Close(), net.ErrClosed, "as Go's say")
	for _, err := range []error{c.SetLinger(0), c.SetDeadline(time.Time{}), c.CloseWrite()} {
		require.ErrorIs(t, err, net.ErrClosed)
	}
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	require.NotNil(t, c.LocalAddr())
	require.Equal(t, peer.LocalAddr().String(), c.RemoteAddr().String())
	_, ok := c.Detach()
	require.False(t, ok)

	c, peer = pair(t)
	require.NoError(t, peer.SetLinger(0))
	require.NoError(t, peer.Close())
	waitReadable(t, c.descriptor(t))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.ErrorContains(t, err, "read tcp "+c.LocalAddr().String()+"->"+c.RemoteAddr().String()+": read: connection reset")
}

// A close that may wait is nothing for an event loop.
func TestWhatLingersIsNotDetached(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, c *Conn){
		"untouched": func(*testing.T, *Conn) {},
		"real": func(t *testing.T, c *Conn) {
			_, err := c.Real()
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t, "127.0.0.1:0")
			c, _ := join(t, l, l.Addr().String())
			before(t, c)
			require.NoError(t, c.SetLinger(1))
			_, ok := c.Detach()
			require.False(t, ok)
			require.NoError(t, c.SetLinger(-1))
			fd, ok := c.Detach()
			require.True(t, ok)
			require.NoError(t, unix.Close(fd))
		})
	}
}

func TestDetach(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, c *Conn, peer *net.TCPConn){
		"untouched": func(*testing.T, *Conn, *net.TCPConn) {},
		"real": func(t *testing.T, c *Conn, peer *net.TCPConn) {
			write(t, c, "a word before")
			expect(t, peer, "a word before")
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := listen(t, "[::]:0")
			c, peer := join(t, l, net.JoinHostPort("127.0.0.1", portOf(l.Addr())))
			before(t, c, peer)
			was := c.descriptor(t)
			fd, ok := c.Detach()
			require.True(t, ok)
			defer unix.Close(fd)
			require.False(t, polled(t, fd))
			if was != fd {
				require.False(t, polled(t, was))
			}
			flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
			require.NoError(t, err)
			require.NotZero(t, flags&unix.O_NONBLOCK)
			flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
			require.NoError(t, err)
			require.NotZero(t, flags&unix.FD_CLOEXEC)

			require.Equal(t, peer.RemoteAddr().String(), c.LocalAddr().String())
			require.Equal(t, peer.LocalAddr().String(), c.RemoteAddr().String())
			_, again := c.Detach()
			require.False(t, again)
			_, err = c.Read(make([]byte, 1))
			require.ErrorIs(t, err, net.ErrClosed)
			require.ErrorIs(t, c.SetLinger(0), net.ErrClosed)
			require.ErrorIs(t, c.SetDeadline(time.Unix(1, 0)), net.ErrClosed)
			require.NoError(t, c.Close())
			require.NoError(t, c.Close())

			_, err = unix.Write(fd, []byte("x"))
			require.NoError(t, err)
			expect(t, peer, "x")
			write(t, peer, "y")
			waitReadable(t, fd)
			b := make([]byte, 2)
			n, err := unix.Read(fd, b)
			require.NoError(t, err)
			require.Equal(t, "y", string(b[:n]))
		})
	}
}

func portOf(a net.Addr) string {
	_, port, _ := net.SplitHostPort(a.String())
	return port
}

// A connection that needs a file more, and there is none.
func TestLackOfFiles(t *testing.T) {
	c, peer := pair(t)
	other, otherPeer := pair(t)
	write(t, other, "x")
	third, thirdPeer := pair(t)
	restore := lackFiles(t)

	_, err := c.Write([]byte("x"))
	require.ErrorIs(t, err, syscall.EMFILE)
	_, err = peer.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET, "it is lost, and says so")
	_, err = c.Write([]byte("x"))
	require.ErrorIs(t, err, net.ErrClosed)
	_, ok := c.Detach()
	require.False(t, ok)

	_, ok = other.Detach()
	require.False(t, ok)
	write(t, other, "y")
	expect(t, otherPeer, "xy")
	fd, ok := third.Detach()
	require.True(t, ok, "which needs none")
	require.NoError(t, unix.Close(fd))
	_, err = thirdPeer.Read(make([]byte, 1))
	require.Equal(t, io.EOF, err)

	restore()
	_, ok = other.Detach()
	require.True(t, ok, "nothing was lost")
}

// Whoever comes first, a descriptor is closed once and used by nobody after
// that: its number is another's at once.
func TestDescriptorsAreClosedOnce(t *testing.T) {
	const rounds = 300
	l := listen(t, "127.0.0.1:0")
	stop := make(chan struct{})
	var bystanders, wg sync.WaitGroup
	var opened atomic.Uint64
	for range 2 {
		bystanders.Go(func() { // takes numbers as they become free, and keeps them a while
			for kept := []*canary(nil); ; {
				select {
				case <-stop:
					for _, k := range kept {
						k.check(t)
					}
					return
				default:
				}
				kept = append(kept, newCanary(t, opened.Add(1)))
				if len(kept) == 8 {
					kept[0].check(t)
					kept = kept[1:]
				}
			}
		})
	}
	for i := range rounds {
		c, peer := join(t, l, l.Addr().String())
		if i%3 == 0 {
			_, err := c.Real()
			require.NoError(t, err)
		}
		if i%2 == 0 {
			write(t, peer, "x")
		}
		wg.Go(func() { _ = c.SetLinger(0); _ = c.Close() })
		wg.Go(func() { _, _ = c.Read(make([]byte, 1)); _ = c.LocalAddr() })
		wg.Go(func() { _ = c.SetReadDeadline(time.Unix(1, 0)); _ = c.SetDeadline(time.Unix(1, 0)) })
		wg.Go(func() { _, _ = c.Write([]byte("x")) })
		wg.Go(func() {
			if fd, ok := c.Detach(); ok {
				_, err := unix.Getpeername(fd)
				assert.True(t, err == nil || err == unix.ENOTCONN, "%v", err)
				assert.NoError(t, unix.Close(fd))
			}
		})
		wg.Wait()
		// And later, when the number is another's.
		k := newCanary(t, opened.Add(1))
		_ = c.SetLinger(0)
		_, _ = c.Read(make([]byte, 1))
		_, _ = c.Write([]byte("x"))
		_ = c.Close()
		_, ok := c.Detach()
		require.False(t, ok)
		k.check(t)
		_ = peer.Close()
	}
	close(stop)
	bystanders.Wait()
	require.Greater(t, opened.Load(), uint64(rounds))
}

// The same one by one: no method touches the number that c has given up.
func TestNumberOfAnother(t *testing.T) {
	giveUp := map[string]func(t *testing.T, c *Conn){
		"closed": func(t *testing.T, c *Conn) { require.NoError(t, c.Close()) },
		"detached": func(t *testing.T, c *Conn) {
			fd, ok := c.Detach()
			require.True(t, ok)
			require.NoError(t, unix.Close(fd))
		},
		"real, and closed": func(t *testing.T, c *Conn) {
			_, err := c.Real()
			require.NoError(t, err)
			require.NoError(t, c.Close())
		},
	}
	methods := map[string]func(c *Conn){
		"Close":           func(c *Conn) { _ = c.Close() },
		"Read":            func(c *Conn) { _, _ = c.Read(make([]byte, 1)) },
		"Write":           func(c *Conn) { _, _ = c.Write([]byte("x")) },
		"Real":            func(c *Conn) { _, _ = c.Real() },
		"SetLinger":       func(c *Conn) { _ = c.SetLinger(0) },
		"SetReadDeadline": func(c *Conn) { _ = c.SetReadDeadline(time.Unix(1, 0)) },
		"LocalAddr":       func(c *Conn) { _ = c.LocalAddr() },
		"CloseWrite":      func(c *Conn) { _ = c.CloseWrite() },
		"Detach": func(c *Conn) {
			if fd, ok := c.Detach(); ok {
				_ = unix.Close(fd)
			}
		},
	}
	for given, giveUp := range giveUp {
		for name, call := range methods {
			t.Run(given+", "+name, func(t *testing.T) {
				c, _ := pair(t)
				number := c.descriptor(t)
				giveUp(t, c)
				k := newCanary(t, 1)
				for k.r != number && k.w != number { // the lowest free numbers come first
					defer k.check(t)
					k = newCanary(t, 1)
				}
				call(c)
				call(c)
				k.check(t)
			})
		}
	}
}

// canary is a pipe that nobody else may touch.
type canary struct {
	id   uint64
	r, w int
}

func newCanary(t testing.TB, id uint64) *canary {
	var p [2]int
	assert.NoError(t, unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	return &canary{id, p[0], p[1]}
}

func (c *canary) check(t testing.TB) {
	b := binary.BigEndian.AppendUint64(nil, c.id)
	_, err := unix.Write(c.w, b)
	assert.NoError(t, err)
	n, err := unix.Read(c.r, b)
	assert.NoError(t, err)
	assert.Equal(t, 8, n)
	assert.Equal(t, c.id, binary.BigEndian.Uint64(b))
	assert.NoError(t, unix.Close(c.r))
	assert.NoError(t, unix.Close(c.w))
}

// A connection of Go's own may be given away, too.
func TestOf(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	peer, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer peer.Close()
	tcp, err := ln.Accept()
	require.NoError(t, err)
	c := Of(tcp.(*net.TCPConn))
	require.Equal(t, tcp.LocalAddr(), c.LocalAddr())
	fd, ok := c.Detach()
	require.True(t, ok)
	require.False(t, polled(t, fd))
	require.NoError(t, unix.Close(fd))
}
