package socket

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// polling awaits with poll(2).
func polling(fd int, deadline time.Time) error {
	for {
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return os.ErrDeadlineExceeded
		}
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(p, 5); n > 0 || err != nil && err != unix.EINTR {
			return err
		}
	}
}

// unexpected is for what is to be done at once.
func unexpected(int, time.Time) error { return errors.New("had to wait") }

func addrPort(t testing.TB, a net.Addr) netip.AddrPort {
	t.Helper()
	to, err := netip.ParseAddrPort(a.String())
	require.NoError(t, err)
	return to
}

func TestConnect(t *testing.T) {
	for _, c := range []struct{ listen, to string }{
		{"127.0.0.1:0", "127.0.0.1"},
		{"[::1]:0", "::1"},
		{"127.0.0.1:0", "::ffff:127.0.0.1"},
		{"127.0.0.1:0", "0.0.0.0"},
		{"[::1]:0", "::"},
	} {
		t.Run(c.to, func(t *testing.T) {
			l := listen(t, c.listen)
			to := netip.AddrPortFrom(netip.MustParseAddr(c.to), addrPort(t, l.Addr()).Port())
			conn, err := Connect(to, time.Time{}, unexpected)
			require.NoError(t, err)
			defer conn.Close()
			peer, err := l.Accept()
			require.NoError(t, err)
			defer peer.Close()
			require.False(t, polled(t, conn.descriptor(t)))
			require.Equal(t, 1, optionOf(t, conn.descriptor(t), Option{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}))
			require.Zero(t, optionOf(t, conn.descriptor(t), KeepAliveOptions[0]))
			require.Equal(t, l.Addr().String(), conn.RemoteAddr().String())
			require.Equal(t, peer.RemoteAddr().String(), conn.LocalAddr().String())

			write(t, conn, "x")
			expect(t, peer, "x")
			real, err := conn.Real()
			require.NoError(t, err)
			require.IsType(t, (*net.TCPConn)(nil), real)
		})
	}
}

func TestConnectFrom(t *testing.T) {
	for _, c := range []struct{ listen, from, want string }{
		{"127.0.0.1:0", "127.0.0.5", "127.0.0.5"},
		{"127.0.0.1:0", "::ffff:127.0.0.5", "127.0.0.5"},
		{"[::1]:0", "::1", "::1"},
	} {
		t.Run(c.from, func(t *testing.T) {
			l := listen(t, c.listen)
			conn, err := ConnectFrom(netip.MustParseAddr(c.from), addrPort(t, l.Addr()), time.Time{}, unexpected)
			require.NoError(t, err)
			defer conn.Close()
			peer, err := l.Accept()
			require.NoError(t, err)
			defer peer.Close()
			require.Equal(t, c.want, conn.LocalAddr().(*net.TCPAddr).IP.String())
			require.Equal(t, peer.RemoteAddr().String(), conn.LocalAddr().String())
			require.Equal(t, 1, optionOf(t, conn.descriptor(t), Option{Level: unix.IPPROTO_IP, Name: unix.IP_BIND_ADDRESS_NO_PORT}))
		})
	}
}

// Send writes it all, waits where there is no room, and leaves the descriptor what it
// was.
func TestSend(t *testing.T) {
	c, peer := pair(t)
	require.NoError(t, c.Send([]byte("x"), time.Time{}, unexpected))
	expect(t, peer, "x")
	require.False(t, polled(t, c.descriptor(t)))

	filled := 0
	for b := make([]byte, 64<<10); ; {
		n, err := unix.Write(c.descriptor(t), b)
		if err == unix.EAGAIN {
			break
		}
		require.NoError(t, err)
		filled += n
	}
	deadline := time.Now().Add(20 * time.Millisecond)
	err := c.Send([]byte("y"), deadline, polling)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.EqualError(t, err, "write tcp "+peer.LocalAddr().String()+": i/o timeout")

	waits := 0
	long := strings.Repeat("z", 100<<10)
	require.NoError(t, c.Send([]byte(long), time.Time{}, func(fd int, _ time.Time) error {
		waits++
		_, err := io.CopyN(io.Discard, peer, int64(min(filled, 256<<10)))
		filled -= min(filled, 256<<10)
		return err
	}))
	require.Positive(t, waits)
	_, err = io.CopyN(io.Discard, peer, int64(filled))
	require.NoError(t, err)
	expect(t, peer, long)

	require.NoError(t, peer.SetLinger(0))
	require.NoError(t, peer.Close())
	require.NoError(t, polling(c.descriptor(t), time.Now().Add(hangTimeout)))
	err = c.Send([]byte("x"), time.Time{}, unexpected)
	require.True(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE), "%v", err)
}

// One that is a socket of Go's already writes as those do.
func TestSendOnReal(t *testing.T) {
	c, peer := pair(t)
	_, err := c.Real()
	require.NoError(t, err)
	require.NoError(t, c.Send([]byte("x"), time.Now().Add(hangTimeout), unexpected))
	expect(t, peer, "x")
	require.ErrorIs(t, c.Send([]byte("x"), time.Unix(1, 0), unexpected), os.ErrDeadlineExceeded)
	write(t, c, "y")
	expect(t, peer, "y")
}

func TestConnectUnix(t *testing.T) {
	dir := t.TempDir()
	for name, path := range map[string]string{"a path": filepath.Join(dir, "x"), "an abstract name": "@" + filepath.Join(dir, "x")} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("unix", path)
			require.NoError(t, err)
			defer ln.Close()
			conn, err := ConnectUnix(path, time.Time{}, unexpected)
			require.NoError(t, err)
			defer conn.Close()
			peer, err := ln.Accept()
			require.NoError(t, err)
			defer peer.Close()
			require.Equal(t, path, conn.RemoteAddr().String())
			require.Equal(t, "unix", conn.RemoteAddr().Network())
			require.NotNil(t, conn.LocalAddr())
			write(t, conn, "x")
			expect(t, peer, "x")
			real, err := conn.Real()
			require.NoError(t, err)
			require.IsType(t, (*net.UnixConn)(nil), real)
			require.ErrorIs(t, conn.SetNoDelay(true), errors.ErrUnsupported)
			require.NoError(t, conn.CloseWrite())
			fd, ok := conn.Detach()
			require.True(t, ok)
			require.False(t, polled(t, fd))
			require.NoError(t, unix.Close(fd))
		})
	}
}

// Errors are the same as net.Dialer's, to the letter.
func TestConnectErrors(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	closed := addrPort(t, l.Addr())
	require.NoError(t, l.Close())
	dir := t.TempDir()
	from := netip.MustParseAddr("192.0.2.9")
	_, want := (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}).Dial("tcp", closed.String())
	_, err := ConnectFrom(from, closed, time.Time{}, unexpected)
	require.EqualError(t, err, want.Error())
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	for name, c := range map[string]struct {
		network, address string
		errno            error
	}{
		"refused":        {"tcp", closed.String(), syscall.ECONNREFUSED},
		"unreachable":    {"tcp", "255.255.255.255:80", syscall.ENETUNREACH},
		"no such path":   {"unix", filepath.Join(dir, "none"), syscall.ENOENT},
		"a long path":    {"unix", dir + string(make([]byte, 200)), syscall.EINVAL},
		"an odd address": {"tcp", "[ff02::1]:80", nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, want := net.DialTimeout(c.network, c.address, hangTimeout)
			var conn *Conn
			var err error
			if c.network == "unix" {
				conn, err = ConnectUnix(c.address, time.Time{}, unexpected)
			} else {
				conn, err = Connect(netip.MustParseAddrPort(c.address), time.Time{}, unexpected)
			}
			require.Error(t, want)
			require.Nil(t, conn)
			require.EqualError(t, err, want.Error())
			if c.errno != nil {
				require.ErrorIs(t, err, c.errno)
			}
			var op, wantOp *net.OpError
			require.ErrorAs(t, err, &op)
			require.ErrorAs(t, want, &wantOp)
			require.IsType(t, wantOp.Addr, op.Addr)
			require.Equal(t, wantOp.Addr.String(), op.Addr.String())
		})
	}
}

// busy listens with a queue that is full: further connects have to wait.
func busy(t testing.TB) (fd int, address netip.AddrPort) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, unix.Listen(fd, 0))
	sa, err := unix.Getsockname(fd)
	require.NoError(t, err)
	address = addrPort(t, addrOf(sa))
	c, err := Connect(address, time.Time{}, unexpected)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return fd, address
}

func TestConnectWaits(t *testing.T) {
	listener, address := busy(t)
	began := time.Now()
	deadline := began.Add(50 * time.Millisecond)
	var asked time.Time
	conn, err := Connect(address, deadline, func(fd int, until time.Time) error {
		asked = until
		return polling(fd, until)
	})
	require.Nil(t, conn)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.GreaterOrEqual(t, time.Since(began), 50*time.Millisecond)
	require.Equal(t, deadline, asked)
	_, want := net.DialTimeout("tcp", address.String(), 50*time.Millisecond)
	require.EqualError(t, err, want.Error())
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout())

	waits := 0
	conn, err = Connect(address, time.Time{}, func(fd int, until time.Time) error {
		if waits++; waits == 1 {
			return nil // for nothing
		}
		for {
			// The queue has a place, which the next SYN finds.
			if c, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK); err == nil {
				t.Cleanup(func() { _ = unix.Close(c) })
				return polling(fd, time.Now().Add(hangTimeout))
			}
		}
	})
	require.NoError(t, err)
	require.Equal(t, 2, waits)
	require.Equal(t, address.String(), conn.RemoteAddr().String())
	require.NoError(t, conn.Close())
}

// A Unix socket's queue is full at once, or has a place.
func TestConnectToFullUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
	require.NoError(t, unix.Listen(fd, 0))
	c, err := ConnectUnix(path, time.Time{}, unexpected)
	require.NoError(t, err)
	defer c.Close()
	_, err = ConnectUnix(path, time.Time{}, unexpected)
	require.ErrorIs(t, err, syscall.EAGAIN)
	_, want := net.Dial("unix", path)
	require.EqualError(t, err, want.Error())
}

// Nobody is there where a socket is connected to itself.
func TestConnectedToItself(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	sa, err := unix.Getsockname(fd)
	require.NoError(t, err)
	require.NoError(t, unix.Connect(fd, sa))
	own := addrOf(sa).(*net.TCPAddr)
	for _, to := range []netip.AddrPort{own.AddrPort(), netip.AddrPortFrom(netip.IPv4Unspecified(), own.AddrPort().Port())} {
		c := &Conn{network: "tcp", remote: net.TCPAddrFromAddrPort(to), fd: fd}
		require.Equal(t, errConnectedToItself, c.meet(to))
		require.ErrorIs(t, errConnectedToItself, syscall.ECONNREFUSED)
	}
}

// What fails leaves no descriptor behind.
func TestConnectClosesWhatFailed(t *testing.T) {
	_, address := busy(t)
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(list)
	}
	before := count()
	gone := errors.New("gone")
	for range 20 {
		_, err := Connect(address, time.Time{}, func(int, time.Time) error { return gone })
		require.ErrorIs(t, err, gone)
		_, err = Connect(netip.MustParseAddrPort("127.0.0.1:1"), time.Time{}, unexpected)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
	}
	require.Equal(t, before, count())
	lackFiles(t)
	_, err := Connect(address, time.Time{}, unexpected)
	require.ErrorIs(t, err, syscall.EMFILE)
	require.ErrorContains(t, err, "dial tcp "+address.String()+": socket: too many open files")
}
