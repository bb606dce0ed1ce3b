package listener

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// hangTimeout bounds every wait of the tests. It is no measure of speed.
const hangTimeout = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quiet is a log that nobody reads.
func quiet() *zap.Logger { return zap.NewNop() }

func testEntrance() *Entrance { return &Entrance{address: "test", log: quiet} }

// observed is a log that a test reads.
func observed() (log func() *zap.Logger, lines *observer.ObservedLogs) {
	core, lines := observer.New(zap.DebugLevel)
	logger := zap.New(core)
	return func() *zap.Logger { return logger }, lines
}

// freeAddress returns a loopback address nobody listens on, outside the range
// that the kernel gives to connections.
func freeAddress(t testing.TB) string {
	t.Helper()
	for range 1000 {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 12_000+rand.IntN(20_000)))
		if err == nil {
			defer ln.Close()
			return ln.Addr().String()
		}
	}
	require.FailNow(t, "no free port")
	return ""
}

func dialClient(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, hangTimeout)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c.(*net.TCPConn)
}

func write(t testing.TB, c net.Conn, s string) {
	t.Helper()
	_, err := io.WriteString(c, s)
	require.NoError(t, err)
}

func expect(t testing.TB, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, s, string(b))
}

func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.Equal(t, io.EOF, err)
}

// eventually waits for cond, as long as a hang would take to notice.
func eventually(t testing.TB, cond func() bool, what string, args ...any) {
	t.Helper()
	deadline := time.Now().Add(hangTimeout)
	for !cond() {
		if time.Now().After(deadline) {
			require.FailNow(t, "never happened: "+fmt.Sprintf(what, args...))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// openFiles counts this process's, where that can be told.
func openFiles() int {
	list, _ := os.ReadDir("/proc/self/fd")
	return len(list)
}

// watchLeftovers checks, when all other clean-up of the test is done, that
// goroutines, files and the budget are where they were.
func watchLeftovers(t testing.TB) {
	t.Helper()
	goroutines, before := goleak.IgnoreCurrent(), openFiles()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		eventually(t, func() bool { return goleak.Find(goroutines) == nil }, "no goroutine left")
		eventually(t, func() bool { return openFiles() <= before }, "%d files open again, now %d", before, openFiles())
		b := files.Process
		eventually(t, func() bool { return b.Used() == 0 && b.Overflow() == 0 && b.Guests() == 0 }, "the budget is free again")
		eventually(t, func() bool { n, pairs := OnTheirWay(); return n == 0 && pairs == 0 }, "no connection is on its way")
	})
}

// useAllFiles takes all files of the budget, which are given back by free, or at
// the end.
func useAllFiles(t testing.TB) (free func()) {
	t.Helper()
	rest := files.Process.Limit() - files.Process.Used()
	require.True(t, files.Process.Acquire(rest))
	free = sync.OnceFunc(func() { files.Process.Release(rest) })
	t.Cleanup(free)
	return free
}
