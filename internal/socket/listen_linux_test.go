package socket

import (
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Connections have from the listening socket what Go would set on each.
func TestOptionsAreInherited(t *testing.T) {
	c, _ := pair(t)
	for range 2 { // as it came, and as a socket of Go's
		for _, o := range inherited {
			require.Equal(t, o.Value, optionOf(t, c.descriptor(t), o), "option %d of level %d", o.Name, o.Level)
		}
		_, err := c.Real()
		require.NoError(t, err)
	}
	require.Equal(t, KeepAlive, net.KeepAliveConfig{
		Enable:   KeepAliveOptions[0].Value == 1,
		Idle:     time.Duration(KeepAliveOptions[1].Value) * time.Second,
		Interval: time.Duration(KeepAliveOptions[2].Value) * time.Second,
		Count:    KeepAliveOptions[3].Value,
	})
}

// Who has wishes of his own gets Go's connections.
func TestListenerWithKeepAliveOfItsOwn(t *testing.T) {
	for name, config := range map[string]net.ListenConfig{
		"other times": {KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 77 * time.Second}},
		"none":        {KeepAlive: -1},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := Listen(t.Context(), "127.0.0.1:0", config)
			require.NoError(t, err)
			defer l.Close()
			c, peer := join(t, l, l.Addr().String())
			require.NotNil(t, c.real.Load())
			fd := c.descriptor(t)
			if config.KeepAlive < 0 {
				require.Zero(t, optionOf(t, fd, KeepAliveOptions[0]))
			} else {
				require.Equal(t, 77, optionOf(t, fd, KeepAliveOptions[1]))
			}
			require.Equal(t, peer.RemoteAddr().String(), c.LocalAddr().String())
			write(t, c, "x")
			expect(t, peer, "x")
			require.NoError(t, l.SetDeadline(time.Unix(1, 0)))
			_, err = l.Accept()
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.NoError(t, l.Close())
			_, err = l.Accept()
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

// A config's control function is called, and may refuse.
func TestListenerControl(t *testing.T) {
	refused, called := errors.New("refused"), 0
	config := net.ListenConfig{Control: func(string, string, syscall.RawConn) error {
		if called++; called > 1 {
			return refused
		}
		return nil
	}}
	l, err := Listen(t.Context(), "127.0.0.1:0", config)
	require.NoError(t, err)
	require.NoError(t, l.Close())
	_, err = Listen(t.Context(), "127.0.0.1:0", config)
	require.ErrorIs(t, err, refused)
}

func TestAcceptEnds(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	failed := make(chan error)
	accept := func() { // ends with the receive below
		_, err := l.Accept()
		failed <- err
	}
	go accept()
	require.NoError(t, l.SetDeadline(time.Unix(1, 0)))
	err := <-failed
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout())
	require.NoError(t, l.SetDeadline(time.Time{}))
	join(t, l, l.Addr().String())

	go accept()
	require.NoError(t, l.Close())
	require.ErrorIs(t, <-failed, net.ErrClosed)
	_, err = l.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = net.Dial("tcp", l.Addr().String())
	require.ErrorIs(t, err, syscall.ECONNREFUSED, "no copy of the socket listens")
}

func TestAcceptWithoutAFile(t *testing.T) {
	l := listen(t, "127.0.0.1:0")
	peer, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	defer peer.Close()
	restore := lackFiles(t)
	_, err = l.Accept()
	require.ErrorIs(t, err, syscall.EMFILE)
	require.ErrorContains(t, err, "accept tcp "+l.Addr().String()+": accept4: too many open files")
	restore()
	c, err := l.Accept()
	require.NoError(t, err, "it is still there")
	require.Equal(t, peer.LocalAddr().String(), c.RemoteAddr().String())
	require.NoError(t, c.Close())
}

// Addresses are as Go has them, whatever the listener's is.
func TestAddresses(t *testing.T) {
	for _, c := range []struct{ listen, dial string }{
		{"127.0.0.1:0", "127.0.0.1"},
		{"0.0.0.0:0", "127.0.0.2"},
		{"[::1]:0", "::1"},
		{"[::]:0", "::1"},
		{"[::]:0", "127.0.0.3"}, // which the kernel has as IPv6
	} {
		t.Run(c.listen+" "+c.dial, func(t *testing.T) {
			l := listen(t, c.listen)
			accepted, peer := join(t, l, net.JoinHostPort(c.dial, portOf(l.Addr())))
			local, remote := accepted.LocalAddr(), accepted.RemoteAddr()
			require.Equal(t, peer.RemoteAddr().String(), local.String())
			require.Equal(t, peer.LocalAddr().String(), remote.String())
			require.Equal(t, "tcp", local.Network())
			conn, err := accepted.Real()
			require.NoError(t, err)
			require.Equal(t, conn.LocalAddr(), local)
			require.Equal(t, conn.RemoteAddr(), remote)
		})
	}
}

// An address that counts within one network only says in which.
func TestZones(t *testing.T) {
	lo, err := net.InterfaceByName("lo")
	require.NoError(t, err)
	a := addrOf(&unix.SockaddrInet6{Addr: [16]byte{0: 0xfe, 1: 0x80, 15: 1}, Port: 80, ZoneId: uint32(lo.Index)})
	require.Equal(t, "[fe80::1%lo]:80", a.String())
	require.Equal(t, uint32(lo.Index), zones.id("lo"))
	require.Equal(t, uint32(4_000_000), zones.id("4000000"))
	require.Equal(t, "4000000", zones.name(4_000_000))
	require.Zero(t, zones.id(""))
	require.Empty(t, zones.name(0))
	require.Zero(t, zones.id("no such interface"))

	// What is not known is asked for again, but not each time.
	z := new(zoneCache)
	require.Equal(t, "lo", z.name(uint32(lo.Index)))
	z.byID = nil
	require.NotEqual(t, "lo", z.name(uint32(lo.Index)), "asked just now")
	z.asked = time.Now().Add(-2 * time.Second)
	require.Equal(t, "lo", z.name(uint32(lo.Index)))
}

// BenchmarkAccept is what it costs to accept a connection and close it, in the
// way of this package and of Go's listener. The clients' part is in both. The
// processor's time is what counts on a machine that does something else, too.
func BenchmarkAccept(b *testing.B) {
	used := func(b *testing.B) time.Duration {
		var u unix.Rusage
		require.NoError(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	connect := func(b *testing.B, to net.Addr) int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(b, err)
		require.NoError(b, unix.Connect(fd, &unix.SockaddrInet4{Port: to.(*net.TCPAddr).Port, Addr: [4]byte{127, 0, 0, 1}}))
		return fd
	}
	leave := func(fd int) { // at once, and without a port's rest
		_ = setLinger(fd, 0)
		_ = unix.Close(fd)
	}
	for name, real := range map[string]bool{"raw": false, "raw and made real": true} {
		b.Run(name, func(b *testing.B) {
			l := listen(b, "127.0.0.1:0")
			b.ReportAllocs()
			before := used(b)
			for b.Loop() {
				peer := connect(b, l.Addr())
				c, err := l.Accept()
				require.NoError(b, err)
				_, _ = c.LocalAddr(), c.RemoteAddr()
				if real {
					_, err = c.Real()
					require.NoError(b, err)
				}
				leave(peer)
				_ = c.Close()
			}
			b.ReportMetric(float64(used(b)-before)/float64(b.N), "cpu-ns/op")
		})
	}
	b.Run("Go", func(b *testing.B) {
		config := net.ListenConfig{KeepAlive: -1}
		ln, err := config.Listen(b.Context(), "tcp", "127.0.0.1:0")
		require.NoError(b, err)
		defer ln.Close()
		b.ReportAllocs()
		before := used(b)
		for b.Loop() {
			peer := connect(b, ln.Addr())
			c, err := ln.Accept()
			require.NoError(b, err)
			_, _ = c.LocalAddr(), c.RemoteAddr()
			leave(peer)
			_ = c.Close()
		}
		b.ReportMetric(float64(used(b)-before)/float64(b.N), "cpu-ns/op")
	})
}
