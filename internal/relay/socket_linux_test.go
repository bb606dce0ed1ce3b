package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// multipathPair is tcpPair over MPTCP.
func multipathPair(t testing.TB) (far *net.TCPConn, near net.Conn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(true)
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	var d net.Dialer
	d.SetMultipathTCP(true)
	c, err := d.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	near, err = ln.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = near.Close() })
	if is, _ := c.(*net.TCPConn).MultipathTCP(); !is {
		_ = c.Close()
		t.Skip("this kernel has no MPTCP")
	}
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c.(*net.TCPConn), near
}

func startRelayBetween(t testing.TB, client, backend net.Conn) (r *Pair, why chan Reason) {
	t.Helper()
	var count atomic.Uint64
	r = New(client, backend, Options{Up: &count, Down: &count})
	why = make(chan Reason, 1)
	r.Start(func() {
		_ = client.Close()
		_ = backend.Close()
		why <- r.Reason()
	})
	return r, why
}

// A client that speaks MPTCP ends in order, is reset and is cut like any other.
func TestRelayMultipathClient(t *testing.T) {
	start := func(t *testing.T) (client, backend *net.TCPConn, r *Pair, why chan Reason) {
		client, nearClient := multipathPair(t)
		backend, nearBackend := tcpPair(t)
		t.Cleanup(func() { _ = client.Close(); _ = backend.Close() })
		r, why = startRelayBetween(t, nearClient, nearBackend)
		write(t, client, "question")
		expect(t, backend, "question")
		return client, backend, r, why
	}
	t.Run("half-close", func(t *testing.T) {
		client, backend, _, why := start(t)
		require.NoError(t, client.CloseWrite())
		expectEOF(t, backend)
		write(t, backend, "answer")
		require.NoError(t, backend.Close())
		expect(t, client, "answer")
		expectEOF(t, client)
		require.Equal(t, ClientClosed, <-why)
	})
	t.Run("close", func(t *testing.T) {
		client, backend, _, why := start(t)
		require.NoError(t, client.Close())
		expectEOF(t, backend)
		require.NoError(t, backend.Close())
		require.Equal(t, ClientClosed, <-why)
	})
	t.Run("reset", func(t *testing.T) {
		client, backend, _, why := start(t)
		require.NoError(t, client.SetLinger(0))
		require.NoError(t, client.Close())
		expectReset(t, backend)
		require.Equal(t, ClientReset, <-why)
	})
	t.Run("cut", func(t *testing.T) {
		client, backend, r, why := start(t)
		r.Cut(drained)
		expectReset(t, client)
		expectReset(t, backend)
		require.Equal(t, drained, <-why)
	})
	t.Run("bulk", func(t *testing.T) {
		client, backend, _, why := start(t)
		data := make([]byte, 20<<20)
		fill(data)
		for _, c := range [][2]*net.TCPConn{{backend, client}, {client, backend}} {
			from, to := c[0], c[1]
			go func() {
				_, _ = from.Write(data)
				_ = from.CloseWrite()
			}()
			got, err := io.ReadAll(to)
			require.NoError(t, err)
			require.True(t, bytes.Equal(data, got))
		}
		require.Equal(t, BackendClosed, <-why)
	})
	t.Run("stalled download", func(t *testing.T) {
		client, backend, r, why := start(t)
		flood(t, backend)
		r.Cut(IdleTimeout)
		expectReset(t, client)
		expectReset(t, backend)
		require.Equal(t, IdleTimeout, <-why)
	})
}

// That a socket was closed altogether is asked of the connection, not of a
// subflow: it is what the poller is told, too.
func TestWasReset(t *testing.T) {
	for name, pair := range map[string]func(testing.TB) (*net.TCPConn, net.Conn){"TCP": tcpPair, "MPTCP": multipathPair} {
		t.Run(name, func(t *testing.T) {
			for _, reset := range []bool{false, true} {
				far, near := pair(t)
				require.False(t, wasReset(near))
				if reset {
					require.NoError(t, far.SetLinger(0))
				}
				require.NoError(t, far.Close())
				if reset { // the writer takes the error
					eventually(t, func() bool { _, err := near.Write([]byte("x")); return err != nil }, "a failing write")
				}
				_, err := near.Read(make([]byte, 1))
				require.Equal(t, io.EOF, err)
				require.Equal(t, reset, wasReset(near))
				require.NoError(t, near.Close())
				require.False(t, wasReset(near), "nothing is known of one that is closed here")
			}
		})
	}
	far, near := unixPair(t)
	require.NoError(t, far.Close())
	require.False(t, wasReset(near))
}

func TestHasFailed(t *testing.T) {
	far, near := tcpPair(t)
	defer near.Close()
	write(t, far, "unread")
	require.NoError(t, far.CloseWrite())
	require.NoError(t, near.(*net.TCPConn).CloseWrite())
	expectEOF(t, far)
	eventually(t, func() bool { return wasReset(near) }, "both ends of file")
	require.False(t, hasFailed(near), "an end in order")

	far, near = tcpPair(t)
	require.False(t, hasFailed(near))
	require.NoError(t, far.SetLinger(0))
	require.NoError(t, far.Close())
	eventually(t, func() bool { return hasFailed(near) }, "a reset")
	require.False(t, hasFailed(opaque{near}))
	require.NoError(t, near.Close())
	require.False(t, hasFailed(near), "nothing is known of one that is closed here")

	for _, taken := range []bool{true, false} {
		far, near := unixPair(t)
		write(t, near, "x")
		if taken {
			expect(t, far, "x")
		}
		require.NoError(t, far.Close())
		require.Equal(t, !taken, hasFailed(near), "a Unix socket's end is an error where something was lost")
	}
}

// An MPTCP connection outlives its first subflow, and then ends in order.
func TestWasResetWithoutTheFirstSubflow(t *testing.T) {
	var skip string
	inOwnNetwork(func(run func(command string) error) {
		if run("ip link set lo up") != nil {
			skip = "needs the right to make a network of its own, and ip(8)"
			return
		}
		far, near := multipathPair(t)
		defer far.Close()
		assert.NoError(t, far.CloseWrite())
		_, err := near.Read(make([]byte, 1))
		assert.Equal(t, io.EOF, err)
		if run("ip mptcp endpoint delete id 0 127.0.0.1") != nil {
			skip = "this kernel or its ip(8) can't remove a subflow"
			return
		}
		gone := func() (state int) {
			_ = control(near, func(fd int) (err error) {
				state, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
				return err
			})
			return state & 0xff
		}
		for deadline := time.Now().Add(hangTimeout); gone() != unix.BPF_TCP_CLOSE && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		assert.Equal(t, unix.BPF_TCP_CLOSE, gone(), "the first subflow is closed")
		if _, err := near.Write([]byte("x")); err != nil {
			skip = "this kernel has ended the connection with its last subflow"
			return
		}
		assert.False(t, wasReset(near))
	})
	if skip != "" {
		t.Skip(skip)
	}
}

// inOwnNetwork calls f in a thread with a network namespace of its own, where
// that is allowed; commands that it runs are in there, too.
func inOwnNetwork(f func(run func(command string) error)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		allowed := unix.Unshare(unix.CLONE_NEWNET)
		f(func(command string) error {
			words := strings.Fields(command)
			return errors.Join(allowed, exec.Command(words[0], words[1:]...).Run())
		})
	}()
	<-done
}

// unixPair returns both ends of a connection over a Unix socket.
func unixPair(t testing.TB) (far *net.UnixConn, near net.Conn) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	defer ln.Close()
	near, err = net.Dial("unix", ln.Addr().String())
	require.NoError(t, err)
	c, err := ln.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = near.Close(); _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c.(*net.UnixConn), near
}

// fillWay writes until all buffers on the way are full, those behind the relay
// too: a busy one may not have had its turn when a write gives up. The last ones
// are small, so that room which the kernel makes later is not enough for the rest.
func fillWay(t testing.TB, from *net.UnixConn, last *net.TCPConn) {
	t.Helper()
	require.NoError(t, last.SetWriteBuffer(4<<10))
	raw, err := last.SyscallConn()
	require.NoError(t, err)
	full := func() (is bool) {
		require.NoError(t, raw.Control(func(fd uintptr) { is = poll(int(fd), unix.POLLOUT) == 0 }))
		return is
	}
	eventually(t, func() bool {
		was := full()
		require.NoError(t, from.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
		n, err := from.Write(make([]byte, 1<<20))
		return was && n == 0 && err != nil && full()
	}, "nothing more can be written")
}

// What a Unix socket's peer sees of a cut depends on whether it had sent
// something that was not taken.
func TestRelayCutsUnixSockets(t *testing.T) {
	for name, c := range map[string]struct {
		stalled bool
		want    error
	}{
		"stalled":          {true, syscall.ECONNRESET},
		"all it sent read": {false, nil}, // an end of file: it has no reset
	} {
		t.Run(name, func(t *testing.T) {
			client, nearClient := tcpPair(t)
			defer client.Close()
			backend, nearBackend := unixPair(t)
			r, why := startRelayBetween(t, nearClient, nearBackend)
			if c.stalled {
				require.NoError(t, client.SetReadBuffer(4<<10))
				fillWay(t, backend, nearClient.(*net.TCPConn))
			} else {
				write(t, backend, "x")
				expect(t, client, "x")
			}
			r.Cut(drained)
			expectReset(t, client)
			_, err := io.ReadAll(backend)
			require.ErrorIs(t, err, c.want)
			require.Equal(t, drained, <-why)
		})
	}
}

// A Unix socket's peer that leaves without having read everything has reset.
func TestRelayPassesAUnixResetOn(t *testing.T) {
	client, nearClient := tcpPair(t)
	defer client.Close()
	backend, nearBackend := unixPair(t)
	_, why := startRelayBetween(t, nearClient, nearBackend)
	write(t, client, "nobody reads this")
	raw, err := backend.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Read(func(fd uintptr) bool { return poll(int(fd), unix.POLLIN) != 0 }))
	require.NoError(t, backend.Close())
	expectReset(t, client)
	require.Equal(t, BackendReset, <-why)
}

func TestSendRoom(t *testing.T) {
	far, near := tcpPair(t)
	defer far.Close()
	defer near.Close()
	room := func() (n int, enough bool) {
		require.NoError(t, control(near, func(fd int) error {
			n, enough = sendRoom(fd)
			return nil
		}))
		return n, enough
	}
	n, enough := room()
	require.True(t, enough)
	require.Greater(t, n, 4<<10)
	flood(t, near.(*net.TCPConn))
	n, enough = room()
	require.False(t, enough)
	require.Less(t, n, 1<<20)
	_, _ = sendRoom(-1)
	n, enough = sendRoom(-1)
	require.True(t, enough, "unknown")
	require.Equal(t, spliceMax, n)
}

// Unix sockets have another idea of room, and of when there is enough of it.
func TestRelayUnixBulk(t *testing.T) {
	client, nearClient := tcpPair(t)
	defer client.Close()
	backend, nearBackend := unixPair(t)
	_, why := startRelayBetween(t, nearClient, nearBackend)
	data := make([]byte, 20<<20)
	fill(data)
	for _, way := range [][2]net.Conn{{client, backend}, {backend, client}} {
		from, to := way[0], way[1]
		go func() {
			_, _ = from.Write(data)
			_ = from.(writeCloser).CloseWrite()
		}()
		got, err := io.ReadAll(to)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	}
	require.Equal(t, ClientClosed, <-why)
}
