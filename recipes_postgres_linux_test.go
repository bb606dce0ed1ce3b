package tcplb

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPostgreSQLRoles has the example's checks ask a role endpoint as Patroni has
// who is the primary, over two switch-overs under writes: one where the former
// primary is stopped first, and one where it goes on and would take writes.
func TestPostgreSQLRoles(t *testing.T) {
	requirePrograms(t, "/usr/lib/postgresql/*/bin", "postgresql postgresql-contrib", "initdb", "postgres", "pgbench", "psql", "pg_basebackup")
	primary, replica := newPostgresNodes(t)
	write, read := freeAddress(t), freeAddress(t)
	runRecipe(t, "examples/postgresql/Caddyfile", map[string]string{
		"tcp_lb/:5432": "tcp_lb/" + write, "tcp_lb/:5433": "tcp_lb/" + read,
		"10.0.3.1:5432": primary.address, "10.0.3.2:5432": replica.address, "10.0.3.3:5432": "127.0.0.3:" + primary.port(),
		"health_port 8008": "health_port " + portOf(primary.role), "http://:9090": "http://:" + portOf(freeAddress(t)),
		// Nothing is to be late here, however busy this machine is.
		"health_timeout 1s": "health_timeout 20s", "lb_try_duration 10s": "lb_try_duration 60s", "lb_try_duration 2s": "lb_try_duration 60s",
	})
	awaitAvailable(t, "postgres-write", primary.address)
	awaitAvailable(t, "postgres-read", replica.address)
	requireWrites(t, write, primary)
	require.Equal(t, replica.host(), ask1(t, read, "select host(inet_server_addr())"))

	t.Log("a switch-over: the primary is stopped, and the replica becomes it")
	running := insertingPgbench(t, write, "-C", "-c", "4", "-T", "3").begin(t)
	opened := primary.connections(t)
	eventually(t, func() bool { return primary.connections(t) > opened+20 }, "load")
	_, err := primary.running.end()
	require.NoError(t, err)
	waits := pgClientAt("psql", write, "-c", insert).begin(t)
	replica.promote(t)
	promoted := ask1(t, replica.address, "select clock_timestamp()")
	out, err := waits.wait()
	require.NoError(t, err, "who comes in between waits for the new primary: %s", out)
	primary.follow(t, replica)
	primary, replica = replica, primary
	awaitAvailable(t, "postgres-write", primary.address)
	awaitAvailable(t, "postgres-read", replica.address)
	out, err = running.wait()
	t.Logf("pgbench over the switch-over: %v\n%s", err, out)
	requireWrites(t, write, primary)
	require.Equal(t, "0", ask1(t, primary.address, "select count(*) from writes where at > '"+promoted+"' and server <> '"+primary.host()+"'"))
	rows := ask1(t, primary.address, "select count(*) from writes")
	eventually(t, func() bool { return ask1(t, replica.address, "select count(*) from writes") == rows }, "the former primary has what the new one has")

	t.Log("one where the primary knows no better: it lost its place, and takes writes on")
	const sessions = "select count(*) from pg_stat_activity where application_name in ('pgbench', 'late')"
	holdLock(t, primary)
	stay := insertingPgbench(t, write, "-c", "4", "-T", "600").begin(t)
	comeAndGo := insertingPgbench(t, write, "-C", "-c", "4", "-T", "600").begin(t)
	late := pgClientAt("psql", write, "-c", "select pg_advisory_lock(1); "+insert)
	late.env = append(late.env, "PGAPPNAME=late")
	inQuery := late.begin(t)
	eventually(t, func() bool {
		return ask1(t, primary.address, "select count(*) from pg_stat_activity where application_name = 'late' and wait_event = 'advisory'") == "1"
	}, "a statement that waits within the server")
	primary.demoted.Store(true)
	eventually(t, func() bool { return ask1(t, primary.address, sessions) == "0" }, "the former primary is left alone, also by the statement that waits")
	left := ask1(t, primary.address, "select count(*) from writes")
	replica.promote(t)
	former, primary := primary, replica
	awaitAvailable(t, "postgres-write", primary.address)
	requireCut(t, stay)
	requireCut(t, inQuery)
	requireWrites(t, write, primary)
	out, _ = comeAndGo.end()
	t.Logf("pgbench with a connection for each write: %s", out)
	require.Equal(t, left, ask1(t, former.address, "select count(*) from writes"), "no write reached the former primary")
	require.Equal(t, "0", ask1(t, former.address, sessions))
	require.GreaterOrEqual(t, former.metric(t, "connections_closed_total", "reason", "backend_down"), 5.0)
	pgClientAt("psql", former.address, "-c", insert).run(t) // which it would have taken
}

// TestPostgreSQLRolesByDialogue has a server itself tell its role, by the dialogue
// that the documentation has.
func TestPostgreSQLRolesByDialogue(t *testing.T) {
	requirePrograms(t, "/usr/lib/postgresql/*/bin", "postgresql postgresql-contrib", "initdb", "postgres", "psql")
	s := &postgresNode{as: unprivileged(t)}
	s.address = freeAddress(t)
	preparePostgres(t, &s.realServer, s.as)
	s.start(t)
	dialogue := snippetWith(t, fenced(t, "docs/databases.md", "caddyfile"), "pg_is_in_recovery")
	pools := ""
	for _, role := range []string{"primary", "replica"} {
		pools += freeAddress(t) + " {\nroute {\ntcp_lb " + s.address + " {\nname " + role + "\nhealth_interval 50ms\nhealth_timeout 60s\nhealth_fails 1\n" +
			replaceOnce(t, dialogue, `\x07primary`, `\x07`+role) + "}\n}\n}\n"
	}
	runSnippet(t, "{\nlayer4 {\n"+pools+"}\n}\n")
	eventuallySays(t, "primary", s.address, `role \"tcplb_check\" does not exist`)
	pgClientAt("psql", s.address, "-c", snippetWith(t, fenced(t, "docs/databases.md", "sql"), "create role")).run(t)
	awaitAvailable(t, "primary", s.address)
	eventuallySays(t, "replica", s.address, `\aprimary`)

	_, err := s.running.end()
	require.NoError(t, err)
	s.standBy(t)
	s.start(t)
	awaitAvailable(t, "replica", s.address)
	awaitAvailable(t, "primary", "")
	eventuallySays(t, "primary", s.address, `\areplica`)
}

// insert tells who has taken it, and when.
const insert = "insert into writes default values"

// postgresNode is a server with the endpoint that tells its role.
type postgresNode struct {
	realServer
	role    string // the endpoint's address
	as      *syscall.Credential
	demoted atomic.Bool // by the cluster, whatever the server itself says
}

// newPostgresNodes starts a primary and its replica.
func newPostgresNodes(t testing.TB) (primary, replica *postgresNode) {
	t.Helper()
	as := unprivileged(t)
	_, port, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	_, rolePort, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	node := func(host string) *postgresNode {
		n := &postgresNode{role: host + ":" + rolePort, as: as}
		n.address = host + ":" + port
		ln, err := net.Listen("tcp", n.role)
		require.NoError(t, err)
		endpoint := httptest.NewUnstartedServer(n)
		require.NoError(t, endpoint.Listener.Close())
		endpoint.Listener = ln
		endpoint.Start()
		t.Cleanup(endpoint.Close)
		return n
	}
	primary, replica = node("127.0.0.1"), node("127.0.0.2")
	preparePostgres(t, &primary.realServer, as)
	primary.settle()
	primary.start(t)
	pgClientAt("psql", primary.address, "-c", "create table writes (server text not null default host(inet_server_addr()), at timestamptz not null default clock_timestamp())").run(t)

	dir := serverDir(t, as)
	command{name: "pg_basebackup", dir: dir, as: as, args: []string{
		"-h", primary.host(), "-p", primary.port(), "-U", "postgres", "-D", dir + "/data", "-X", "stream", "-c", "fast", "-R",
	}}.run(t)
	replica.command = postgresCommand(replica.address, dir, as)
	replica.ready = pgClientAt("psql", replica.address, "-c", "select 1")
	replica.settle()
	replica.start(t)
	return primary, replica
}

func (n *postgresNode) host() string {
	host, _, _ := strings.Cut(n.address, ":")
	return host
}

// settle has the server as a cluster's: it keeps what a replica may have missed,
// and ends a statement whose client is gone, as the documentation advises.
func (n *postgresNode) settle() {
	n.command.args = append(n.command.args, "-c", "wal_keep_size=64MB", "-c", "shared_buffers=16MB", "-c", "client_connection_check_interval=100ms")
}

// ServeHTTP is the role endpoint: /primary and /replica answer 200 for who is it.
func (n *postgresNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	psql := pgClientAt("psql", n.address, "-A", "-t", "-X", "-c", "select pg_is_in_recovery()")
	cmd := exec.CommandContext(r.Context(), psql.name, psql.args...)
	cmd.Env = append(os.Environ(), psql.env...)
	recovers, err := cmd.Output()
	role := map[string]string{"f": "/primary", "t": "/replica"}[strings.TrimSpace(string(recovers))]
	if err != nil || role != r.URL.Path || role == "/primary" && n.demoted.Load() {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

func (n *postgresNode) promote(t testing.TB) {
	t.Helper()
	require.Equal(t, "t", ask1(t, n.address, "select pg_promote()"))
}

// standBy has the server come back as a replica.
func (n *postgresNode) standBy(t testing.TB) {
	t.Helper()
	signal := n.command.dir + "/data/standby.signal"
	require.NoError(t, os.WriteFile(signal, nil, 0o600))
	if n.as != nil {
		require.NoError(t, os.Chown(signal, int(n.as.Uid), int(n.as.Gid)))
	}
}

// follow starts a former primary as the replica of the new one.
func (n *postgresNode) follow(t testing.TB, primary *postgresNode) {
	t.Helper()
	n.standBy(t)
	n.command.args = append(n.command.args, "-c", "primary_conninfo=host="+primary.host()+" port="+primary.port()+" user=postgres")
	n.start(t)
}

// ask1 asks a server for one value.
func ask1(t testing.TB, address, query string) string {
	t.Helper()
	return strings.TrimSpace(pgClientAt("psql", address, "-A", "-t", "-X", "-c", query).run(t))
}

// insertingPgbench has clients of pgbench insert row after row.
func insertingPgbench(t testing.TB, address string, args ...string) command {
	t.Helper()
	script := t.TempDir() + "/insert.sql"
	require.NoError(t, os.WriteFile(script, []byte(insert+";\n"), 0o600))
	return pgClientAt("pgbench", address, append(args, "-n", "-f", script)...)
}

// requireWrites has a hundred writes go to the primary without an error.
func requireWrites(t testing.TB, address string, primary *postgresNode) {
	t.Helper()
	count := func() int {
		n, err := strconv.Atoi(ask1(t, primary.address, "select count(*) from writes where server = '"+primary.host()+"'"))
		require.NoError(t, err)
		return n
	}
	before := count()
	for _, args := range [][]string{{"-C", "-t", "10"}, {"-t", "15"}} {
		out := insertingPgbench(t, address, append(args, "-c", "4")...).run(t)
		require.NotContains(t, strings.ToLower(out), "error")
	}
	require.GreaterOrEqual(t, count()-before, 100)
}

// holdLock holds an advisory lock of the server for as long as the test runs.
func holdLock(t testing.TB, n *postgresNode) {
	t.Helper()
	pgClientAt("psql", n.address, "-c", "select pg_advisory_lock(1)", "-c", "select pg_sleep(600)").begin(t)
	eventually(t, func() bool {
		return ask1(t, n.address, "select count(*) from pg_locks where locktype = 'advisory'") == "1"
	}, "the lock is held")
}
