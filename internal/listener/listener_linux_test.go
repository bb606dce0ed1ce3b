package listener

import (
	"context"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
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
