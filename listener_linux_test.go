package tcplb

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// listenAs opens the address as a config does, which ends with the returned
// function.
func listenAs(t testing.TB, address string) (net.Listener, context.CancelFunc) {
	t.Helper()
	na, err := caddy.ParseNetworkAddress(address)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := na.Listen(ctx, 0, net.ListenConfig{})
	require.NoError(t, err)
	t.Cleanup(func() { cancel(); _ = ln.(net.Listener).Close() })
	return ln.(net.Listener), cancel
}

// listenCovered opens a free address as a config does whose connections there
// all lead to tcp_lb, within the limit.
func listenCovered(t testing.TB, limit time.Duration) (ln *listener, w *waitingList, address string) {
	t.Helper()
	address = freeAddress(t)
	na, err := caddy.ParseNetworkAddress(address)
	require.NoError(t, err)
	w = newWaitingList(limit)
	l, err := listenShared(t.Context(), na, net.ListenConfig{}, arrivals{waiting: w})
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.(*listener).Close(); w.close() })
	return l.(*listener), w, address
}

// accepting calls Accept until it fails; the error ends the returned channel's
// connections.
func accepting(ln net.Listener) (conns chan net.Conn, failed chan error) {
	conns, failed = make(chan net.Conn, 100), make(chan error, 1)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				failed <- err
				return
			}
			conns <- c
		}
	}()
	return conns, failed
}

func openSockets() int {
	sockets.mu.Lock()
	defer sockets.mu.Unlock()
	return len(sockets.by)
}

func TestSharedListener(t *testing.T) {
	address := freeAddress(t)
	old, _ := listenAs(t, "tcp_lb/"+address)
	// A connection that waits in the queue while one config follows another.
	waiting := dialClient(t, address)
	write(t, waiting, "hello")
	next, _ := listenAs(t, "tcp_lb/"+address)
	require.Equal(t, 1, openSockets())
	require.Equal(t, address, next.Addr().String())
	require.NoError(t, old.Close())
	require.NoError(t, old.Close(), "again")
	_, err := old.Accept()
	require.ErrorIs(t, err, net.ErrClosed)

	c, err := next.Accept()
	require.NoError(t, err)
	defer c.Close()
	expect(t, c, "hello")

	require.NoError(t, next.Close())
	require.Zero(t, openSockets())
	_, err = net.Dial("tcp", address)
	require.ErrorIs(t, err, syscall.ECONNREFUSED, "closed with its last listener")
}

// Each ends when it is closed, whichever of them is accepting, and those that
// are left go on.
func TestSharedListenersEndOneByOne(t *testing.T) {
	address := freeAddress(t)
	type share struct {
		ln     net.Listener
		conns  chan net.Conn
		failed chan error
	}
	var open []share
	for range 8 {
		ln, _ := listenAs(t, "tcp_lb/"+address)
		conns, failed := accepting(ln)
		open = append(open, share{ln, conns, failed})
	}
	for i := range open {
		c := dialClient(t, address)
		var accepted net.Conn
		eventually(t, func() bool {
			for _, o := range open {
				select {
				case accepted = <-o.conns:
					return true
				default:
				}
			}
			return false
		}, "accepted by one of %d", len(open)-i)
		_, _ = io.WriteString(accepted, "x")
		expect(t, c, "x")
		require.NoError(t, accepted.Close())
		require.NoError(t, open[i].ln.Close())
		require.ErrorIs(t, <-open[i].failed, net.ErrClosed)
	}
	require.Zero(t, openSockets())
}

func TestSharedListenerEndsWithItsConfig(t *testing.T) {
	ln, cancel := listenAs(t, "tcp_lb/"+freeAddress(t))
	_, failed := accepting(ln)
	cancel()
	require.ErrorIs(t, <-failed, net.ErrClosed)
	eventually(t, func() bool { return openSockets() == 0 }, "closed")
}

func TestListenAddresses(t *testing.T) {
	port := portOf(freeAddress(t))
	for address, want := range map[string]string{
		"tcp_lb/127.0.0.1:" + port:              "127.0.0.1:" + port,
		"tcp_lb/:" + port:                       "[::]:" + port,
		"TCP_LB/localhost:" + port:              "127.0.0.1:" + port,
		"tcp_lb/127.0.0.1:" + port + "-" + port: "127.0.0.1:" + port,
	} {
		ln, _ := listenAs(t, address)
		require.Equal(t, want, ln.Addr().String(), address)
		require.NoError(t, ln.Close())
	}
	held := listen(t) // without SO_REUSEPORT
	defer held.Close()
	na, err := caddy.ParseNetworkAddress("tcp_lb/" + held.Addr().String())
	require.NoError(t, err)
	_, err = na.Listen(t.Context(), 0, net.ListenConfig{})
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.ErrorContains(t, err, held.Addr().String())

	na, err = caddy.ParseNetworkAddress("tcp_lb/127.0.0.1:14000-14001")
	require.NoError(t, err)
	all, err := na.ListenAll(t.Context(), net.ListenConfig{})
	require.NoError(t, err)
	for i, ln := range all {
		require.True(t, strings.HasSuffix(ln.(net.Listener).Addr().String(), []string{":14000", ":14001"}[i]))
		require.NoError(t, ln.(net.Listener).Close())
	}
}

// A config may change from Caddy's listener to the shared one, and back.
func TestSharedListenerBesideCaddys(t *testing.T) {
	address := freeAddress(t)
	caddys, _ := listenAs(t, address)
	shared, _ := listenAs(t, "tcp_lb/"+address)
	require.NoError(t, caddys.Close())
	again, _ := listenAs(t, address)
	require.NoError(t, shared.Close())
	require.NoError(t, again.Close())
}

func TestAcceptedConnectionsKeepAlive(t *testing.T) {
	address := freeAddress(t)
	ln, _ := listenAs(t, "tcp_lb/"+address)
	dialClient(t, address)
	c, err := ln.Accept()
	require.NoError(t, err)
	defer c.Close()
	for _, o := range append([]socketOption{{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}}, keepAliveOptions...) {
		require.Equal(t, o.value, socketOptionOf(t, c.(*acceptedConn).TCPConn, o), "option %d of level %d", o.name, o.level)
	}
}

func saysItWaits(ln net.Listener) func() bool {
	return func() bool {
		l := ln.(*listener)
		l.mu.Lock()
		defer l.mu.Unlock()
		return !l.nextNotice.IsZero()
	}
}

// useFiles takes all files of the budget, and of the reserve for connections
// that are to be refused. The former are given back by free, or at the end.
func useFiles(t testing.TB) (free func()) {
	t.Helper()
	rest := files.Process.Limit() - files.Process.Used()
	require.True(t, files.Process.Acquire(rest), "all are in use")
	for files.Process.AcquireOverflow() {
		t.Cleanup(files.Process.ReleaseOverflow)
	}
	free = sync.OnceFunc(func() { files.Process.Release(rest) })
	t.Cleanup(free)
	return free
}

// While there is no file for another connection, it is kept back.
func TestAcceptWaitsForFiles(t *testing.T) {
	watchLeftovers(t)
	ln, _, address := listenCovered(t, 0)
	free := useFiles(t)
	reserve := files.Process.Overflow()
	files.Process.ReleaseOverflow()
	t.Cleanup(func() { require.True(t, files.Process.AcquireOverflow()) })
	conns, failed := accepting(ln)

	first := dialClient(t, address)
	over := (<-conns).(*acceptedConn)
	require.True(t, over.arrive())
	require.False(t, over.admit(), "over the limit, to be refused")
	second := dialClient(t, address)
	eventually(t, saysItWaits(ln), "it says that it waits")
	require.Empty(t, conns)

	require.NoError(t, over.Close())
	expectEOF(t, first)
	next := (<-conns).(*acceptedConn)
	free()
	require.True(t, next.arrive())
	require.True(t, next.admit(), "now there is room")
	require.Equal(t, reserve-1, files.Process.Overflow())
	_, _ = io.WriteString(next, "x")
	expect(t, second, "x")
	require.NoError(t, next.Close())
	require.NoError(t, ln.Close())
	require.ErrorIs(t, <-failed, net.ErrClosed)
}

// A listener that is closed while it waits for files hands over what it has.
func TestCloseWhileAcceptWaitsForFiles(t *testing.T) {
	watchLeftovers(t)
	ln, _, address := listenCovered(t, 0)
	useFiles(t)
	conns, failed := accepting(ln)
	c := dialClient(t, address)
	eventually(t, saysItWaits(ln), "it says that it waits")
	require.NoError(t, ln.Close())
	require.ErrorIs(t, <-failed, net.ErrClosed)
	held := <-conns
	require.NoError(t, held.Close())
	expectEOF(t, c)
}

// Accept outlasts a process without a file to spare, and goes on after it.
func TestAcceptSurvivesLackOfFiles(t *testing.T) {
	watchLeftovers(t)
	address := freeAddress(t)
	ln, _ := listenAs(t, "tcp_lb/"+address)
	c := dialClient(t, address)
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	restore := func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }
	t.Cleanup(restore)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}))
	conns, failed := accepting(ln)
	eventually(t, saysItWaits(ln), "it says that it fails")
	require.Empty(t, conns)
	require.Empty(t, failed)

	restore()
	accepted := <-conns
	_, _ = io.WriteString(accepted, "x")
	expect(t, c, "x")
	require.NoError(t, accepted.Close())
	require.NoError(t, ln.Close())
	require.ErrorIs(t, <-failed, net.ErrClosed)
}

func socketOptionOf(t testing.TB, c *net.TCPConn, o socketOption) (value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	cerr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), o.level, o.name) })
	require.NoError(t, cerr)
	require.NoError(t, err)
	return value
}
