//go:build unix

package tcplb

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRedisPair(t *testing.T) {
	requirePrograms(t, "", "redis-server redis-tools", "redis-server", "redis-cli", "redis-benchmark")
	cli := func(port string, args ...string) command {
		return command{name: "redis-cli", args: append([]string{"-h", "127.0.0.1", "-p", port}, args...)}
	}
	p := newPair(t, func(s *realServer) {
		s.command = command{name: "redis-server", args: []string{
			"--bind", "127.0.0.1", "--port", s.port(), "--dir", t.TempDir(), "--save", "", "--appendonly", "no",
		}}
		s.ready = cli(s.port(), "ping")
	})
	// accepted asks a server how many connections that was, this one included.
	accepted := func(s *realServer) (n int) {
		_, after, _ := strings.Cut(cli(s.port(), "info", "stats").run(t), "total_connections_received:")
		_, err := fmt.Sscan(after, &n)
		require.NoError(t, err)
		return n
	}
	// -k 1 keeps its connections, -k 0 makes one for each request.
	bench := func(keep, requests string) command {
		return command{name: "redis-benchmark", args: []string{
			"-h", "127.0.0.1", "-p", portOf(p.lb), "--csv", "-c", "50", "-t", "ping_mbulk,set,get", "-k", keep, "-n", requests,
		}}
	}
	work := func() {
		requireBenchmark(t, bench("0", "2000").begin(t))
		requireBenchmark(t, bench("1", "10000").begin(t))
	}

	before := []int{accepted(p.servers[0]), accepted(p.servers[1])}
	p.requireBoth(work)
	for i, s := range p.servers {
		asked := 0
		eventually(t, func() bool {
			asked++
			return accepted(s)-before[i] == int(s.connections(t))+asked
		}, "redis at %s and the balancer count the same connections", s.address)
	}

	p.requireOutage(work, func() {
		running := bench("0", "2000").begin(t)
		opened := metric(t, "connections_total", nil)
		eventually(t, func() bool { return metric(t, "connections_total", nil) > opened+100 }, "load")
		p.servers[1].start(t) // under load
		requireBenchmark(t, running)
	})
	require.Greater(t, accepted(p.servers[1]), 3000, "it was started anew and served")
	p.requireBooks()
}

// requireBenchmark waits for a redis-benchmark, which ends at its first
// error, and checks that it did all of its work.
func requireBenchmark(t testing.TB, running *process) {
	t.Helper()
	out, err := running.wait()
	require.NoError(t, err, out)
	require.Regexp(t, `(?s)"PING_MBULK",".*"SET",".*"GET","`, out)
	require.NotContains(t, strings.ToLower(out), "error")
}

func TestPostgreSQLPair(t *testing.T) {
	requirePrograms(t, "/usr/lib/postgresql/*/bin", "postgresql postgresql-contrib", "initdb", "postgres", "pgbench", "psql")
	as := unprivileged(t)
	p := newPair(t, func(s *realServer) { preparePostgres(t, s, as) })
	for _, s := range p.servers {
		pgClient("pgbench", s.port(), "-i", "-q").run(t)
	}
	port, only := portOf(p.lb), p.servers[0].port()
	both := []string{only, p.servers[1].port()}
	work := func() {
		requirePgbench(t, port, 60, "-C") // a new connection for each transaction
		requirePgbench(t, port, 500)
	}

	p.requireBoth(work)
	require.ElementsMatch(t, both, whoAnswers(t, port, 2))
	// PostgreSQL listens some time before it serves, so it comes back to no load.
	p.requireOutage(work, func() { p.servers[1].start(t) })
	require.ElementsMatch(t, both, whoAnswers(t, port, 2))

	// A transaction dies with its server, and pgbench's client with it, but new
	// connections are served as soon as the server no longer listens.
	served := p.servers[1].connections(t)
	running := pgClient("pgbench", port, "-n", "-S", "-C", "-c", "8", "-T", "3").begin(t)
	eventually(t, func() bool { return p.servers[1].connections(t) > served+10 }, "load")
	_, err := p.servers[1].running.end()
	require.NoError(t, err)
	require.Equal(t, []string{only, only, only, only}, whoAnswers(t, port, 4))
	out, err := running.wait()
	t.Logf("pgbench over the stop: %v\n%s", err, out)
	p.eventuallyHealthy(p.servers[1], 0)
	work()
	p.requireBooks()
}

// pair is two servers with the balancer in front.
type pair struct {
	t       testing.TB
	lb      string
	servers [2]*realServer
}

// noChecks puts checks so far apart that only a failed connect causes one.
const noChecks = "24h"

func newPair(t testing.TB, prepare func(*realServer)) *pair {
	t.Helper()
	p := &pair{t: t, lb: freeAddress(t)}
	for i := range p.servers {
		s := &realServer{address: freeAddress(t)}
		prepare(s)
		s.start(t)
		p.servers[i] = s
	}
	runCaddy(t, p.config(noChecks))
	checked(t)
	return p
}

func (p *pair) config(interval string) string {
	return lbConfig(p.lb, backendsJSON(p.servers[0].address, p.servers[1].address)+
		fmt.Sprintf(`,"health_checks":{"active":{"interval":%q,"fast_interval":"50ms"}}}`, interval))
}

// requireBoth checks that the work's connections are shared evenly.
func (p *pair) requireBoth(work func()) {
	p.t.Helper()
	a, b := p.servers[0].connections(p.t), p.servers[1].connections(p.t)
	work()
	eventually(p.t, func() bool {
		gotA, gotB := p.servers[0].connections(p.t)-a, p.servers[1].connections(p.t)-b
		return gotA > 100 && gotA-gotB <= 1 && gotB-gotA <= 1
	}, "an even share for both")
}

// requireOutage stops the second server while nothing is open, so that nothing
// is lost by nature, does the work without it, has it brought back and
// does the work on both.
func (p *pair) requireOutage(work, back func()) {
	t, left, lost := p.t, p.servers[0], p.servers[1]
	t.Helper()
	p.eventuallyIdle()
	_, err := lost.running.end()
	require.NoError(t, err)
	require.EqualValues(t, 1, lost.metric(t, "backend_healthy"), "nobody knows yet")
	a, b := left.connections(t), lost.connections(t)
	work()
	p.eventuallyHealthy(lost, 0)
	require.Equal(t, b, lost.connections(t), "a stopped server gets no connection")
	require.Greater(t, left.connections(t), a+100, "the other takes all")
	require.NotZero(t, lost.metric(t, "connection_errors_total", "error_type", "dial_refused"))
	require.NotZero(t, lost.metric(t, "retries_total"))
	require.EqualValues(t, 1, lost.metric(t, "health_transitions_total", "to", "down"))

	reload(t, p.config("100ms"))
	back()
	p.eventuallyHealthy(lost, 1)
	p.eventuallyIdle()
	require.EqualValues(t, 1, lost.metric(t, "health_transitions_total", "to", "up"))
	p.requireBoth(work)
}

func (p *pair) eventuallyHealthy(s *realServer, want float64) {
	p.t.Helper()
	eventually(p.t, func() bool { return s.metric(p.t, "backend_healthy") == want }, "%s healthy: %v", s.address, want)
}

// eventuallyIdle waits until no connection is being handled.
func (p *pair) eventuallyIdle() {
	p.t.Helper()
	eventually(p.t, func() bool { return metric(p.t, "connections_active", nil) == 0 && open.n.Load() == 0 }, "all connections ended")
}

// requireBooks checks that every connection was counted once, at its begin and
// at its end, and that no client was turned away.
func (p *pair) requireBooks() {
	t := p.t
	t.Helper()
	p.eventuallyIdle()
	for _, s := range p.servers {
		opened := s.connections(t)
		require.Equal(t, opened, s.metric(t, "connections_closed_total")+s.metric(t, "connections_active"))
		require.Equal(t, opened, s.metric(t, "connection_duration_seconds"))
		require.Equal(t, opened, s.metric(t, "dial_duration_seconds"))
		require.NotZero(t, s.metric(t, "received_bytes_total"))
		require.NotZero(t, s.metric(t, "sent_bytes_total"))
	}
	require.Zero(t, metric(t, "connection_errors_total", labels("backend", "")), "turned away")
	require.Zero(t, metric(t, "connections_closed_total", labels("reason", "error")))
	require.Zero(t, p.servers[0].metric(t, "health_transitions_total"), "it was never down")
}

// realServer is a server program at an address.
type realServer struct {
	address string
	command command
	ready   command // succeeds once the server serves
	running *process
}

func (s *realServer) port() string { return portOf(s.address) }
func portOf(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }

// metric returns what the balancer says of the server.
func (s *realServer) metric(t testing.TB, name string, pairs ...string) float64 {
	t.Helper()
	return metric(t, name, labels(append(pairs, "backend", s.address)...))
}

// connections returns how many the balancer has opened to the server.
func (s *realServer) connections(t testing.TB) float64 { return s.metric(t, "connections_total") }

func (s *realServer) start(t testing.TB) {
	t.Helper()
	running := s.command.begin(t)
	s.running = running
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(running.output)
			t.Logf("%s:\n%s", running, b)
		}
	})
	eventually(t, func() bool {
		_, err := s.ready.begin(t).wait()
		return err == nil
	}, "%s at %s serves", s.command.name, s.address)
}

// command is a program to run.
type command struct {
	name string
	args []string
	dir  string
	env  []string            // more of it
	as   *syscall.Credential // nil: who runs the test
	stop syscall.Signal      // asks it to end; 0 = SIGTERM
}

// process is a running command. Its output is a file, so that no goroutine is
// needed to read it.
type process struct {
	*exec.Cmd
	stop   syscall.Signal
	output string
}

// begin starts the command, which ends with the test at the latest.
func (c command) begin(t testing.TB) *process {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "output"))
	require.NoError(t, err)
	defer out.Close()
	p := &process{Cmd: exec.Command(c.name, c.args...), stop: c.stop, output: out.Name()}
	setDefault(&p.stop, syscall.SIGTERM)
	p.Dir, p.Env, p.Stdout, p.Stderr = c.dir, append(os.Environ(), c.env...), out, out
	p.SysProcAttr = &syscall.SysProcAttr{Credential: c.as}
	require.NoError(t, p.Start())
	t.Cleanup(func() {
		if p.ProcessState == nil {
			_, _ = p.end()
		}
	})
	return p
}

// run runs the command to its end, which must be a good one.
func (c command) run(t testing.TB) (output string) {
	t.Helper()
	out, err := c.begin(t).wait()
	require.NoError(t, err, out)
	return out
}

// end asks the process to end and waits for it.
func (p *process) end() (output string, err error) {
	_ = p.Process.Signal(p.stop)
	return p.wait()
}

// wait waits for the process, which is killed if it hangs.
func (p *process) wait() (output string, err error) {
	kill := time.AfterFunc(hangTimeout, func() { _ = p.Process.Kill() })
	err = p.Wait()
	if !kill.Stop() {
		err = errors.Join(err, fmt.Errorf("%s hung", p))
	}
	b, readErr := os.ReadFile(p.output)
	return string(b), errors.Join(err, readErr)
}

// requirePrograms puts the directories that the pattern matches, the newest
// first, before the PATH, and skips the test where a program is in none.
func requirePrograms(t testing.TB, pattern, packages string, names ...string) {
	t.Helper()
	dirs, _ := filepath.Glob(pattern)
	slices.Reverse(dirs)
	t.Setenv("PATH", strings.Join(append(dirs, os.Getenv("PATH")), string(filepath.ListSeparator)))
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			skipWithout(t, name+" (Debian: apt-get install "+packages+")")
		}
	}
}

func skipWithout(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("TCPLB_REQUIRE_SERVERS") != "" {
		t.Fatalf("TCPLB_REQUIRE_SERVERS is set, but this is missing: %s", what)
	}
	t.Skipf("not checked with real servers, as this is missing: %s", what)
}

// unprivileged returns who is to run a server that refuses to run as root, or
// nil where the test doesn't.
func unprivileged(t testing.TB) *syscall.Credential {
	t.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			c := new(syscall.Credential)
			_, err := fmt.Sscan(u.Uid+" "+u.Gid, &c.Uid, &c.Gid)
			require.NoError(t, err)
			return c
		}
	}
	skipWithout(t, "a user postgres or nobody, as the server doesn't run as root")
	return nil
}
