//go:build unix

package tcplb

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// requireServersEnv makes a missing server program a failure, where it would
// else skip the test.
const requireServersEnv = "TCPLB_REQUIRE_SERVERS"

func TestRedisPair(t *testing.T) {
	path := requirePrograms(t, "", "apt-get install redis-server redis-tools", "redis-server", "redis-cli", "redis-benchmark")
	cli := func(port string, args ...string) command {
		return command{path: path["redis-cli"], args: append([]string{"-h", "127.0.0.1", "-p", port}, args...)}
	}
	p := newPair(t, func(s *realServer) {
		s.command = command{path: path["redis-server"], args: []string{
			"--bind", "127.0.0.1", "--port", s.port(), "--dir", t.TempDir(), "--save", "", "--appendonly", "no",
		}}
		s.ready = cli(s.port(), "ping")
	})
	accepted := func(s *realServer) int { return redisAccepted(t, cli(s.port(), "info", "stats")) }
	// -k 1 keeps its connections, -k 0 makes one for each request.
	bench := func(keep, requests string) command {
		return command{path: path["redis-benchmark"], args: []string{
			"-h", "127.0.0.1", "-p", portOf(p.lb), "--csv", "-c", "50", "-t", "ping_mbulk,set,get", "-k", keep, "-n", requests,
		}}
	}
	newEach, kept := bench("0", "2000"), bench("1", "10000")
	work := func() {
		requireBenchmark(t, newEach.begin(t))
		requireBenchmark(t, kept.begin(t))
	}

	before := []int{accepted(p.servers[0]), accepted(p.servers[1])}
	p.requireBoth(work)
	for i, s := range p.servers {
		asked := 0 // each question is a connection, too
		eventually(t, func() bool {
			asked++
			return accepted(s)-before[i] == int(s.connections(t))+asked
		}, "redis at %s and the balancer count the same connections", s.address)
	}

	p.requireOutage(work, func() {
		running := newEach.begin(t)
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
	for _, test := range []string{"PING_MBULK", "SET", "GET"} {
		require.Contains(t, out, `"`+test+`","`)
	}
	require.NotContains(t, strings.ToLower(out), "error")
}

var redisAcceptedLine = regexp.MustCompile(`total_connections_received:(\d+)`)

// redisAccepted returns how many connections a server says it accepted.
func redisAccepted(t testing.TB, info command) int {
	t.Helper()
	out := info.run(t)
	m := redisAcceptedLine.FindStringSubmatch(out)
	require.NotNil(t, m, out)
	n, err := strconv.Atoi(m[1])
	require.NoError(t, err)
	return n
}

func TestPostgreSQLPair(t *testing.T) {
	path := requirePrograms(t, "/usr/lib/postgresql/*/bin", "apt-get install postgresql postgresql-contrib",
		"initdb", "postgres", "pgbench", "psql")
	pg := postgres{path: path, as: unprivileged(t)}
	p := newPair(t, func(s *realServer) { pg.prepare(t, s) })
	for _, s := range p.servers {
		pg.client("pgbench", s.port(), "-i", "-q").run(t)
	}
	port, only := portOf(p.lb), p.servers[0].port()
	both := []string{only, p.servers[1].port()}
	work := func() {
		pg.requireBench(t, port, 60, "-C") // a new connection for each transaction
		pg.requireBench(t, port, 500)
	}

	p.requireBoth(work)
	require.ElementsMatch(t, both, pg.whoAnswers(t, port, 2))
	// PostgreSQL listens some time before it serves, so it comes back to no load.
	p.requireOutage(work, func() { p.servers[1].start(t) })
	require.ElementsMatch(t, both, pg.whoAnswers(t, port, 2))

	// A transaction dies with its server, and pgbench's client with it, but new
	// connections are served as soon as the server no longer listens.
	served := p.servers[1].connections(t)
	running := pg.client("pgbench", port, "-n", "-S", "-C", "-c", "8", "-T", "3").begin(t)
	eventually(t, func() bool { return p.servers[1].connections(t) > served+20 }, "load")
	p.servers[1].stop(t)
	require.Equal(t, []string{only, only, only, only}, pg.whoAnswers(t, port, 4))
	out, err := running.wait()
	t.Logf("pgbench over the stop: %v\n%s", err, out)
	p.eventuallyHealthy(p.servers[1], false)
	work()
	p.requireBooks()
}

// postgres makes servers and clients of it.
type postgres struct {
	path map[string]string
	as   *syscall.Credential // nil: who runs the test
}

func (pg postgres) prepare(t testing.TB, s *realServer) {
	t.Helper()
	dir := ownedDir(t, pg.as)
	initdb := command{path: pg.path["initdb"], dir: dir, as: pg.as, args: []string{
		"-D", dir + "/data", "-U", "postgres", "-A", "trust", "-N", "--locale=C", "-E", "UTF8",
	}}
	initdb.run(t)
	s.command = command{path: pg.path["postgres"], dir: dir, as: pg.as, args: []string{
		"-D", dir + "/data", "-p", s.port(), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off",
	}}
	s.command.stop = syscall.SIGINT // "fast": ends the sessions
	s.ready = pg.client("psql", s.port(), "-c", "select 1")
}

func (pg postgres) client(program, port string, args ...string) command {
	return command{
		path: pg.path[program],
		args: append(args, "-h", "127.0.0.1", "-p", port, "-U", "postgres", "postgres"),
		env:  []string{"PGSSLMODE=disable", "PGGSSENCMODE=disable"},
	}
}

// requireBench runs pgbench with 8 clients of so many transactions each, and
// checks that all were served.
func (pg postgres) requireBench(t testing.TB, port string, each int, args ...string) {
	t.Helper()
	out := pg.client("pgbench", port, append(args, "-n", "-S", "-c", "8", "-t", strconv.Itoa(each))...).run(t)
	require.Contains(t, out, fmt.Sprintf("actually processed: %d/%d\n", 8*each, 8*each))
	require.NotContains(t, strings.ToLower(out), "error")
}

// whoAnswers connects n times and returns the ports of the servers it met.
func (pg postgres) whoAnswers(t testing.TB, port string, n int) []string {
	t.Helper()
	var ports []string
	for range n {
		ports = append(ports, strings.TrimSpace(pg.client("psql", port, "-A", "-t", "-X", "-c", "select inet_server_port()").run(t)))
	}
	return ports
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
	var gotA, gotB float64
	eventually(p.t, func() bool {
		gotA, gotB = p.servers[0].connections(p.t)-a, p.servers[1].connections(p.t)-b
		return gotA > 100 && gotA-gotB <= 1 && gotB-gotA <= 1
	}, "an even share for both")
	p.t.Logf("connections: %v and %v", gotA, gotB)
}

// requireOutage stops the second server while nothing is open, so that nothing
// is lost by nature, does the work without it, has it brought back and
// does the work on both.
func (p *pair) requireOutage(work, back func()) {
	t, left, lost := p.t, p.servers[0], p.servers[1]
	t.Helper()
	p.eventuallyIdle()
	lost.stop(t)
	require.EqualValues(t, 1, metric(t, "backend_healthy", labels("backend", lost.address)), "nobody knows yet")
	a, b := left.connections(t), lost.connections(t)
	work()
	p.eventuallyHealthy(lost, false)
	require.Equal(t, b, lost.connections(t), "a stopped server gets no connection")
	require.Greater(t, left.connections(t), a+100, "the other takes all")
	require.NotZero(t, metric(t, "connection_errors_total", labels("backend", lost.address, "error_type", "dial_refused")))
	require.NotZero(t, metric(t, "retries_total", labels("backend", lost.address)))
	require.EqualValues(t, 1, metric(t, "health_transitions_total", labels("backend", lost.address, "to", "down")))

	reload(t, p.config("100ms"))
	back()
	p.eventuallyHealthy(lost, true)
	p.eventuallyIdle()
	require.EqualValues(t, 1, metric(t, "health_transitions_total", labels("backend", lost.address, "to", "up")))
	p.requireBoth(work)
}

func (p *pair) eventuallyHealthy(s *realServer, want bool) {
	p.t.Helper()
	eventually(p.t, func() bool {
		return (metric(p.t, "backend_healthy", labels("backend", s.address)) == 1) == want
	}, "%s healthy: %v", s.address, want)
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
		opened, of := s.connections(t), labels("backend", s.address)
		require.Equal(t, opened, metric(t, "connections_closed_total", of)+metric(t, "connections_active", of))
		require.Equal(t, opened, metric(t, "connection_duration_seconds", of))
		require.Equal(t, opened, metric(t, "dial_duration_seconds", of))
		require.NotZero(t, metric(t, "received_bytes_total", of))
		require.NotZero(t, metric(t, "sent_bytes_total", of))
	}
	require.Zero(t, metric(t, "connection_errors_total", labels("backend", "")), "turned away")
	require.Zero(t, metric(t, "connections_closed_total", labels("reason", "error")))
	require.EqualValues(t, 1, metric(t, "backend_healthy", labels("backend", p.servers[0].address)))
	require.Zero(t, metric(t, "health_transitions_total", labels("backend", p.servers[0].address)), "it was never down")
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

// connections returns how many the balancer has opened to the server.
func (s *realServer) connections(t testing.TB) float64 {
	t.Helper()
	return metric(t, "connections_total", labels("backend", s.address))
}

func (s *realServer) start(t testing.TB) {
	t.Helper()
	s.running = s.command.begin(t)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(s.running.output)
			t.Logf("%s:\n%s", s.running, b)
		}
	})
	eventually(t, func() bool {
		_, err := s.ready.begin(t).wait()
		return err == nil
	}, "%s at %s serves", filepath.Base(s.command.path), s.address)
}

func (s *realServer) stop(t testing.TB) {
	t.Helper()
	out, err := s.running.end()
	require.NoError(t, err, out)
}

// command is a program to run.
type command struct {
	path string
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
	p := &process{Cmd: exec.Command(c.path, c.args...), stop: c.stop, output: out.Name()}
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

// requirePrograms finds the programs in the last directory that the pattern
// matches, or in the PATH. Without them it skips the test.
func requirePrograms(t testing.TB, pattern, install string, names ...string) map[string]string {
	t.Helper()
	dirs, _ := filepath.Glob(pattern)
	path := make(map[string]string)
	for _, name := range names {
		file, err := exec.LookPath(name)
		for _, dir := range dirs {
			if found, inDirErr := exec.LookPath(filepath.Join(dir, name)); inDirErr == nil {
				file, err = found, nil
			}
		}
		if err != nil {
			skipWithout(t, name+" (Debian: "+install+")")
		}
		path[name] = file
	}
	return path
}

func skipWithout(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(requireServersEnv) != "" {
		t.Fatalf("%s is set, but this is missing: %s", requireServersEnv, what)
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
			uid, uidErr := strconv.ParseUint(u.Uid, 10, 32)
			gid, gidErr := strconv.ParseUint(u.Gid, 10, 32)
			require.NoError(t, errors.Join(uidErr, gidErr))
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	skipWithout(t, "a user postgres or nobody, as the server doesn't run as root")
	return nil
}

// ownedDir makes a directory that the user owns and can reach.
func ownedDir(t testing.TB, as *syscall.Credential) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tcplb")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	if as != nil {
		require.NoError(t, os.Chown(dir, int(as.Uid), int(as.Gid)))
	}
	return dir
}
