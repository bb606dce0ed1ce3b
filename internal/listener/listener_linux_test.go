package listener

import (
	"context"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"
)

// listenAs opens the address as a config does, which ends with the returned
// function.
func listenAs(t testing.TB, address string) (net.Listener, context.CancelFunc) {
	t.Helper()
	return listenLogging(t, address, quiet)
}

func listenLogging(t testing.TB, address string, log func() *zap.Logger) (net.Listener, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := Listen(ctx, address, net.ListenConfig{}, Arrivals{Files: files.PerConnection}, log)
	require.NoError(t, err)
	t.Cleanup(func() { cancel(); _ = ln.Close() })
	return ln, cancel
}

// listenCovered opens a free address as a config does whose connections there
// all lead to tcp_lb, within the limit.
func listenCovered(t testing.TB, limit time.Duration) (ln net.Listener, lines *observer.ObservedLogs, address string) {
	t.Helper()
	address = freeAddress(t)
	log, lines := observed()
	w := NewWaitingList(limit)
	ln, err := Listen(t.Context(), address, net.ListenConfig{}, Arrivals{Waiting: w}, log)
	require.NoError(t, err)
	t.Cleanup(func() { _ = ln.Close(); w.Close() })
	return ln, lines, address
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

func openSockets() int { return len(Entrances()) }

func TestSharedListener(t *testing.T) {
	address := freeAddress(t)
	old, _ := listenAs(t, address)
	// A connection that waits in the queue while one config follows another.
	waiting := dialClient(t, address)
	write(t, waiting, "hello")
	next, _ := listenAs(t, address)
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
		ln, _ := listenAs(t, address)
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
	ln, cancel := listenAs(t, freeAddress(t))
	_, failed := accepting(ln)
	cancel()
	require.ErrorIs(t, <-failed, net.ErrClosed)
	eventually(t, func() bool { return openSockets() == 0 }, "closed")
}

func says(lines *observer.ObservedLogs, message string) func() bool {
	return func() bool { return lines.FilterMessage(message).Len() == 1 }
}

const (
	slowly  = "no files are left, accepting slowly"
	failing = "accepting fails, trying again"
)

// useFiles takes all files of the budget, and of the reserve for connections
// that are to be refused. The former are given back by free, or at the end.
func useFiles(t testing.TB) (free func()) {
	t.Helper()
	free = useAllFiles(t)
	for files.Process.AcquireOverflow() {
		t.Cleanup(files.Process.ReleaseOverflow)
	}
	return free
}

// While there is no file for another connection, it is kept back.
func TestAcceptWaitsForFiles(t *testing.T) {
	watchLeftovers(t)
	ln, lines, address := listenCovered(t, 0)
	free := useFiles(t)
	reserve := files.Process.Overflow()
	files.Process.ReleaseOverflow()
	t.Cleanup(func() { require.True(t, files.Process.AcquireOverflow()) })
	conns, failed := accepting(ln)

	first := dialClient(t, address)
	over := (<-conns).(*Conn)
	require.True(t, over.Arrive())
	require.False(t, over.Admit(), "over the limit, to be refused")
	second := dialClient(t, address)
	eventually(t, says(lines, slowly), "it says that it waits")
	require.Empty(t, conns)

	require.NoError(t, over.Close())
	expectEOF(t, first)
	next := (<-conns).(*Conn)
	free()
	require.True(t, next.Arrive())
	require.True(t, next.Admit(), "now there is room")
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
	ln, lines, address := listenCovered(t, 0)
	useFiles(t)
	conns, failed := accepting(ln)
	c := dialClient(t, address)
	eventually(t, says(lines, slowly), "it says that it waits")
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
	log, lines := observed()
	ln, _ := listenLogging(t, address, log)
	c := dialClient(t, address)
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	restore := func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }
	t.Cleanup(restore)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}))
	conns, failed := accepting(ln)
	eventually(t, says(lines, failing), "it says that it fails")
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

// A connection whose descriptor an event loop has got keeps its files until its
// end, and its end leaves the descriptor alone.
func TestDetachedConnectionGivesFilesBack(t *testing.T) {
	watchLeftovers(t)
	ln, _, address := listenCovered(t, time.Hour)
	peer := dialClient(t, address)
	conn, err := ln.Accept()
	require.NoError(t, err)
	c := conn.(*Conn)
	require.True(t, c.Arrive())
	require.True(t, c.Admit())
	c.TakeOver()
	fd, ok := c.Detach()
	require.True(t, ok)
	require.NoError(t, c.Close(), "caddy-l4's, which does nothing")
	require.EqualValues(t, files.PerConnection, files.Process.Used())
	_, err = unix.Write(fd, []byte("x"))
	require.NoError(t, err)
	expect(t, peer, "x")

	require.NoError(t, unix.Close(fd))
	expectEOF(t, peer)
	require.NoError(t, c.End())
	require.Zero(t, files.Process.Used())
	require.NoError(t, c.End())
	require.Zero(t, files.Process.Used(), "once")
}

// One that is cut while its handler takes the descriptor is closed by one of
// both, and its files come back once.
func TestCutWhileItIsDetached(t *testing.T) {
	watchLeftovers(t)
	ln, _, address := listenCovered(t, time.Hour)
	for range 200 {
		peer := dialClient(t, address)
		conn, err := ln.Accept()
		require.NoError(t, err)
		c := conn.(*Conn)
		c.wait(2 * grace)
		var wg sync.WaitGroup
		wg.Go(func() {
			if held := evictLongest(pairHolder); held == holdsPair {
				files.Process.ReleasePair()
			}
		})
		wg.Go(func() {
			if !c.Arrive() {
				return
			}
			if fd, ok := c.Detach(); assert.True(t, ok, "nobody cuts what has arrived") {
				assert.NoError(t, unix.Close(fd))
			}
		})
		wg.Wait()
		_, err = peer.Read(make([]byte, 1))
		require.Error(t, err)
		_ = c.End()
		require.Zero(t, files.Process.Used())
		_ = peer.Close()
	}
}

// Those who connect and say nothing cost a descriptor and a few hundred bytes:
// no goroutine, and no place in Go's poller.
func TestSilentConnectionsCostLittle(t *testing.T) {
	watchLeftovers(t)
	const clients = 1000
	ln, _, address := listenCovered(t, time.Hour)
	to := ln.Addr().(*net.TCPAddr)
	goroutines, polled := runtime.NumGoroutine(), polledFiles(t)
	accepted := make([]net.Conn, clients)
	for i := range accepted {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		t.Cleanup(func() { _ = unix.Close(fd) })
		require.NoError(t, unix.Connect(fd, &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte{127, 0, 0, 1}}))
		accepted[i], err = ln.Accept()
		require.NoError(t, err)
		// As caddy-l4 does before it calls a handler.
		require.NoError(t, accepted[i].SetReadDeadline(time.Now().Add(time.Hour)))
		require.NoError(t, accepted[i].SetReadDeadline(time.Time{}))
		require.Equal(t, address, accepted[i].LocalAddr().String())
	}
	require.LessOrEqual(t, runtime.NumGoroutine(), goroutines)
	require.LessOrEqual(t, polledFiles(t), polled)
	require.Equal(t, clients, onTheirWay())
	for _, c := range accepted {
		require.NoError(t, c.Close())
	}
}

// polledFiles counts the descriptors that are in the process's pollers.
func polledFiles(t testing.TB) (n int) {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fdinfo")
	require.NoError(t, err)
	for _, f := range list {
		info, _ := os.ReadFile("/proc/self/fdinfo/" + f.Name()) // one may be closed by now
		n += strings.Count(string(info), "tfd:")
	}
	require.Positive(t, n)
	return n
}
