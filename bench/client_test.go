//go:build linux

package main

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func testClient(t *testing.T, ln net.Listener) *client {
	t.Helper()
	to := netip.MustParseAddrPort(ln.Addr().String())
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Close(epoll) })
	return &client{to: unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}, epoll: epoll}
}

func listenLoopback(t *testing.T) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	return ln.(*net.TCPListener)
}

// A balancer that stalls can't hide it: connections begin all the same, and
// each counts from the moment when it was due.
func TestPaceCountsAStall(t *testing.T) {
	const rate, length, stall = 200, 100 * time.Millisecond, 400 * time.Millisecond
	ln := listenLoopback(t)
	began := time.Now()
	time.AfterFunc(stall, func() { echoes(ln) })
	c := testClient(t, ln)
	require.NoError(t, c.pace(rate, began, length))
	require.Zero(t, c.failed)
	require.Len(t, c.times, 20, "one each 5 ms, while none is answered")
	require.GreaterOrEqual(t, percentile(c.times, 0), (stall-length).Seconds()*1000)
	require.GreaterOrEqual(t, percentile(c.times, 100), stall.Seconds()*1000, "the first was due at once")
}

func TestSaturateCountsEachConnection(t *testing.T) {
	ln := listenLoopback(t)
	go echoes(ln)
	c := testClient(t, ln)
	require.NoError(t, c.saturate(8, time.Now().Add(50*time.Millisecond)))
	require.Zero(t, c.failed)
	require.GreaterOrEqual(t, len(c.times), 8)
	require.Zero(t, c.open)
}

// A connection that ends without its answer is a failure, and has its time.
func TestClientCountsFailures(t *testing.T) {
	ln := listenLoopback(t)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	c := testClient(t, ln)
	require.NoError(t, c.pace(100, time.Now(), 100*time.Millisecond))
	require.Equal(t, 10, c.failed)
	require.Len(t, c.times, 10)
}
