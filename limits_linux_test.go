package tcplb

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func (c *child) openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
	require.NoError(t, err)
	return len(list)
}

// crowd is many clients at once. Each sends a byte, and has it back or is
// refused; those who are served stay.
type crowd struct {
	mu      sync.Mutex
	served  []net.Conn
	refused int
	failed  []error
}

// gather opens n connections, so many at a time, and returns when all have an
// answer.
func gather(lb string, n, atATime int) *crowd {
	c := new(crowd)
	var wg sync.WaitGroup
	next := make(chan struct{}, n)
	for range n {
		next <- struct{}{}
	}
	close(next)
	for range atATime {
		wg.Go(func() {
			for range next {
				c.join(lb)
			}
		})
	}
	wg.Wait()
	return c
}

func (c *crowd) join(lb string) {
	conn, err := net.DialTimeout("tcp", lb, hangTimeout)
	if err == nil {
		_ = conn.SetDeadline(time.Now().Add(hangTimeout))
		_, err = io.WriteString(conn, "x")
	}
	if err == nil {
		_, err = io.ReadFull(conn, make([]byte, 1))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.served = append(c.served, conn)
		return
	case relay.IsReset(err) || err == io.EOF:
		c.refused++
	default:
		c.failed = append(c.failed, err)
	}
	closeConn(conn)
}

func (c *crowd) leave() {
	for _, conn := range c.served {
		_ = conn.Close()
	}
}

// passedProbes is the number of probes of the backend that succeeded. Once there
// is one, the child listens.
func passedProbes(t testing.TB, admin, backend string) float64 {
	t.Helper()
	return scrape(t, admin, fmt.Sprintf(`tcp_lb_health_checks_total{backend=%q,lb="web",status="success"}`, backend))
}

// A process with few files serves what it can, and refuses the rest.
func TestFileLimit(t *testing.T) {
	const limit, clients = 256, 2000
	for name, c := range map[string]struct {
		network string
		atATime int
	}{
		"all at once": {"tcp_lb/", clients},
		// It accepts as fast as it can, and must not overtake those that are
		// refused by more files than are in reserve.
		"on Caddy's listener, some at a time": {"", limit / 8},
	} {
		t.Run(name, func(t *testing.T) { testFileLimit(t, limit, clients, c.network, c.atATime) })
	}
}

func testFileLimit(t *testing.T, limit, clients int, network string, atATime int) {
	watchLeftovers(t)
	s := echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	c := startChildWithFiles(t, limit, strings.Replace(
		adminConfig(admin, web, network+lb, `"name":"web",`+fastChecks+","+backendsJSON(s.address)+"}"), `"PANIC"`, `"INFO"`, 1))
	eventually(t, func() bool { return listens(admin) && passedProbes(t, admin, s.address) > 0 }, "listening")
	before := c.openFiles(t)

	all := gather(lb, clients, atATime)
	defer all.leave()
	require.Empty(t, all.failed)
	want := int(files.New(files.Divide(uint64(limit))).Connections())
	require.Equal(t, want, len(all.served))
	require.Equal(t, clients-want, all.refused)
	require.EqualValues(t, clients-want, scrape(t, admin, `tcp_lb_connection_errors_total{backend="",error_type="max_connections",lb="web"}`))
	probed := passedProbes(t, admin, s.address)
	eventually(t, func() bool { return passedProbes(t, admin, s.address) > probed+2 }, "probes go on")
	for _, conn := range all.served {
		write(t, conn, "y")
		expect(t, conn, "y")
	}
	require.EqualValues(t, 1, scrape(t, admin, "tcp_lb_backend_healthy"))
	ofBackend := fmt.Sprintf(`{backend=%q,`, s.address)
	require.Zero(t, scrape(t, admin, "tcp_lb_health_checks_total"+ofBackend+`lb="web",status="failure"}`))
	for _, kind := range dialErrorNames {
		require.Zero(t, scrape(t, admin, "tcp_lb_connection_errors_total"+ofBackend+`error_type="`+kind+`"`))
	}

	all.leave()
	eventually(t, func() bool { return c.openFiles(t) <= before+2 }, "files are free again")
	again := gather(lb, want, want)
	defer again.leave()
	require.Equal(t, want, len(again.served), "and used again")
	c.line(t, "connection limit reached")
	c.mu.Lock()
	defer c.mu.Unlock()
	require.NotContains(t, strings.Join(c.log, "\n"), "too many open files")
}

// Many connections at once take two files each while idle, and all answer.
func TestManyConnections(t *testing.T) {
	const limit, connections = 20_000, 9_900
	var here unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &here))
	if here.Max < limit {
		t.Skipf("needs a limit of %d open files, here it is %d", limit, here.Max)
	}
	admin, web, lb, backend := freeAddress(t), freeAddress(t), freeAddress(t), freeAddress(t)
	startChildWithFiles(t, limit, layer4Config(fmt.Sprintf(`"echo":{"listen":[%q],"routes":[{"handle":[{"handler":"echo"}]}]}`, backend)))
	eventually(t, func() bool { return listens(backend) }, "the backend listens")
	c := startChildWithFiles(t, limit, adminConfig(admin, web, "tcp_lb/"+lb, `"name":"web",`+backendsJSON(backend)+"}"))
	eventually(t, func() bool { return listens(admin) && passedProbes(t, admin, backend) > 0 }, "listening")
	before := c.openFiles(t)

	all := gather(lb, connections, 100)
	defer all.leave()
	require.Empty(t, all.failed)
	require.Zero(t, all.refused)
	require.EqualValues(t, connections, scrape(t, admin, "tcp_lb_connections_active"))
	const loops = 2 // files of each event loop
	eventually(t, func() bool {
		return c.openFiles(t) <= before+files.PerConnection*connections+loops*max(1, runtime.GOMAXPROCS(0)/2)
	}, "two files each: %v", lazily(func() any { return c.openFiles(t) - before }))
	require.Less(t, goroutines(t, admin), connections/10, "those that event loops relay have none")
	for _, conn := range all.served {
		require.NoError(t, conn.SetDeadline(time.Now().Add(hangTimeout)))
		write(t, conn, "y")
	}
	for _, conn := range all.served {
		expect(t, conn, "y")
	}
	all.leave()
	eventually(t, func() bool { return c.openFiles(t) <= before+2 }, "all files are free again")
}

// Clients who say nothing cost no goroutine when they have their backend, either,
// and are served when they begin to speak.
func TestSilentServedConnectionsCostLittle(t *testing.T) {
	watchLeftovers(t)
	const clients = 500
	s := echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	startChild(t, adminConfig(admin, web, "tcp_lb/"+lb, `"name":"web",`+backendsJSON(s.address)+"}"))
	eventually(t, func() bool { return listens(admin) && passedProbes(t, admin, s.address) > 0 }, "listening")
	before := goroutines(t, admin)
	conns := make([]net.Conn, clients)
	for i := range conns {
		conns[i] = dialClient(t, lb)
	}
	eventually(t, func() bool { return scrape(t, admin, "tcp_lb_connections_active") == clients }, "all have their backend")
	eventually(t, func() bool { return goroutines(t, admin) < before+clients/10 }, "no goroutines: %v", lazily(func() any { return goroutines(t, admin) - before }))
	for _, c := range conns {
		write(t, c, "x")
		expect(t, c, "x")
	}
}

// goroutines returns how many the process of an admin endpoint has.
func goroutines(t testing.TB, admin string) (n int) {
	t.Helper()
	_, text := request(t, http.MethodGet, "http://"+admin+"/debug/pprof/goroutine?debug=1", "")
	_, err := fmt.Sscanf(text, "goroutine profile: total %d", &n)
	require.NoError(t, err, "%.100q", text)
	return n
}
