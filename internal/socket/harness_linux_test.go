package socket

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// hangTimeout bounds every wait of the tests. It is no measure of speed.
const hangTimeout = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t testing.TB, address string) *Listener {
	t.Helper()
	l, err := Listen(t.Context(), address, net.ListenConfig{})
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// pair returns an accepted connection, which nobody has touched, and its peer.
func pair(t testing.TB) (c *Conn, peer *net.TCPConn) {
	t.Helper()
	l := listen(t, "127.0.0.1:0")
	defer l.Close()
	return join(t, l, l.Addr().String())
}

// join connects to the address and accepts that.
func join(t testing.TB, l *Listener, address string) (c *Conn, peer *net.TCPConn) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, hangTimeout)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(hangTimeout)))
	c, err = l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c, conn.(*net.TCPConn)
}

func write(t testing.TB, w io.Writer, s string) {
	t.Helper()
	_, err := io.WriteString(w, s)
	require.NoError(t, err)
}

func expect(t testing.TB, r io.Reader, s string) {
	t.Helper()
	b := make([]byte, len(s))
	_, err := io.ReadFull(r, b)
	require.NoError(t, err)
	require.Equal(t, s, string(b))
}

// polled reports whether a descriptor is in a poller of this process.
func polled(t testing.TB, fd int) bool {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	pollers := 0
	for _, f := range list {
		if to, _ := os.Readlink("/proc/self/fd/" + f.Name()); to != "anon_inode:[eventpoll]" {
			continue
		}
		pollers++
		info, err := os.ReadFile("/proc/self/fdinfo/" + f.Name())
		require.NoError(t, err)
		for line := range strings.Lines(string(info)) {
			var in int
			if _, err := fmt.Sscanf(line, "tfd: %d", &in); err == nil && in == fd {
				return true
			}
		}
	}
	require.Positive(t, pollers)
	return false
}

// descriptor is that of c, as it is.
func (c *Conn) descriptor(t testing.TB) (fd int) {
	t.Helper()
	if real := c.real.Load(); real != nil {
		return descriptorOf(t, *real)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	require.GreaterOrEqual(t, c.fd, 0)
	return c.fd
}

func descriptorOf(t testing.TB, conn net.Conn) (fd int) {
	t.Helper()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(s uintptr) { fd = int(s) }))
	return fd
}

func optionOf(t testing.TB, fd int, o Option) int {
	t.Helper()
	value, err := unix.GetsockoptInt(fd, o.Level, o.Name)
	require.NoError(t, err)
	return value
}

// lackFiles leaves the process without a file to spare, until the test's end.
func lackFiles(t testing.TB) (restore func()) {
	t.Helper()
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	restore = func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }
	t.Cleanup(restore)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}))
	return restore
}
