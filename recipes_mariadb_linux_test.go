package tcplb

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMariaDBCountsNoDialogue has a server count bare connects as errors of their
// host until it refuses that, and not the example's dialogue.
func TestMariaDBCountsNoDialogue(t *testing.T) {
	requireMariaDB(t)
	s := newMariaDB(t, freeAddress(t), "--performance-schema=ON", "--max-connect-errors=10")
	s.start(t)
	s.query(t, checkUser)
	// The server never counts 127.0.0.1: it is to see another address.
	const host = "127.0.0.2"
	away := startServer(t, func(c *net.TCPConn) { passOn(c, host, s.address) })
	for range 3 {
		leaveUnsaid(t, away.address)
	}
	counted := func(column string) int {
		n, _ := strconv.Atoi(s.query(t, "select "+column+" from performance_schema.host_cache where ip = '"+host+"'"))
		return n
	}
	aborted := func() string {
		return s.query(t, "select sum(variable_value) from information_schema.global_status where variable_name in ('aborted_clients', 'aborted_connects')")
	}
	eventually(t, func() bool { return aborted() == "3" }, "%v", lazily(func() any { return aborted() }))
	if counted("sum_connect_errors") == 0 {
		skipWithout(t, "a name server that answers for "+host+", if only that it has no name: else MariaDB counts nothing")
	}

	lb := freeAddress(t)
	config := func(check string) string {
		return "{\nlayer4 {\n" + lb + " {\nroute {\ntcp_lb " + away.address + " {\nhealth_interval 10ms\nhealth_timeout 20s\nhealth_fast_interval 10ms\n" + check + "}\n}\n}\n}\n}\n"
	}
	passed := func() int { return int(metric(t, "health_checks_total", labels("status", "success"))) }
	passes := func(n int) {
		t.Helper()
		enough := passed() + n
		eventually(t, func() bool { return passed() >= enough }, "%d checks: %v", n, lazily(func() any { return lastErrors(defaultName) }))
	}
	client := mariaDBClient("-h", "127.0.0.1", "-P", portOf(lb), "-u", "tcplb_check", "-e", "select 1")

	t.Log("a bare connect")
	runSnippet(t, config(""))
	eventually(t, func() bool { return counted("count_host_blocked_errors") > 0 }, "blocked")
	out, err := client.begin(t).wait()
	require.Error(t, err)
	require.Contains(t, out, "is blocked because of many connection errors")
	awaitAvailable(t, defaultName, away.address)

	t.Log("dialogues that log in")
	login := snippetWith(t, fenced(t, "docs/databases.md", "caddyfile"), `health_send "\x01\x00\x00\x00\x01"`)
	reload(t, snippetConfig(t, config(login)))
	eventuallySays(t, defaultName, away.address, "is blocked because of many connection errors")
	s.query(t, "flush hosts")
	passes(20)
	eventually(t, func() bool {
		return s.query(t, "select count(*) from information_schema.processlist where user = 'unauthenticated user'") == "0"
	}, "the last of the bare connects is over")
	before, errorsBefore := aborted(), counted("count_handshake_errors")
	logged := readFile(t, s.running.output)
	for _, dialogue := range []string{login, dialogueOf(t, "mariadb-write")} {
		reload(t, snippetConfig(t, config(dialogue)))
		passes(200)
		require.Equal(t, before, aborted(), "no connection counts as aborted")
		require.Zero(t, counted("sum_connect_errors"))
		require.Equal(t, errorsBefore, counted("count_handshake_errors"))
		require.Zero(t, counted("count_authentication_errors"))
		client.run(t)
	}
	require.Equal(t, logged, readFile(t, s.running.output), "not a line in its log")

	t.Log("a user that there is not")
	reload(t, snippetConfig(t, config(strings.Replace(login, "tcplb_check", "tcplb_chekc", 1))))
	failed := metric(t, "health_checks_total", labels("status", "failure"))
	eventually(t, func() bool { return metric(t, "health_checks_total", labels("status", "failure")) > failed+20 }, "refused")
	eventuallySays(t, defaultName, away.address, "Access denied for user")
	require.NotEqual(t, before, aborted())
	require.Zero(t, counted("sum_connect_errors"))
	reload(t, snippetConfig(t, config(dialogueOf(t, "mariadb-write"))))
	passes(2)

	t.Log("clients that leave without a word are forgiven, as long as checks log in between")
	for i := range 5 {
		for range 5 {
			leaveUnsaid(t, lb)
		}
		eventually(t, func() bool { return counted("count_handshake_errors") == errorsBefore+5*(i+1) }, "counted")
		eventually(t, func() bool { return counted("sum_connect_errors") == 0 }, "forgiven")
	}
	client.run(t)

	t.Log("without names there is no count")
	_, err = s.running.end()
	require.NoError(t, err)
	s.command.args = append(s.command.args, "--skip-name-resolve")
	s.start(t)
	reload(t, snippetConfig(t, config("")))
	passes(50)
	require.Equal(t, "0", s.query(t, "select count(*) from performance_schema.host_cache"))
	client.run(t)
}

// TestMariaDBRoles has the example's dialogues find out which server is the
// primary, before and after a switch-over, and the connections follow.
func TestMariaDBRoles(t *testing.T) {
	requireMariaDB(t)
	var servers [2]*mariaDB
	for i := range servers {
		s := newMariaDB(t, freeAddress(t), "--log-bin", "--server-id="+strconv.Itoa(i+1), "--gtid-strict-mode=ON")
		s.start(t)
		servers[i] = s
	}
	primary, replica := servers[0], servers[1]
	primary.query(t, checkUser+"create user app@'%'; create user repl@'%'; grant replication slave on *.* to repl@'%'; create database d; create table d.writes (server int); grant all on d.* to app@'%'")
	replica.query(t, "set global read_only = 1")
	replica.follow(t, primary)
	at := runMariaDBExample(t, map[string]string{"10.0.6.1:3306": primary.address, "10.0.6.2:3306": replica.address})
	write := func() command { return mariaDBApp(at["3307"], "insert into d.writes values (@@server_id)") }
	awaitAvailable(t, "mariadb-write", primary.address)
	awaitAvailable(t, "mariadb-read", replica.address)
	for range 5 {
		write().run(t)
	}
	eventually(t, func() bool {
		return mariaDBApp(at["3308"], "select count(*), @@server_id from d.writes").run(t) == "5\t2\n"
	}, "the replica has it")
	held := mariaDBApp(at["3307"], "select sleep(600)").begin(t)
	eventually(t, func() bool {
		return primary.query(t, "select count(*) from information_schema.processlist where user = 'app'") == "1"
	}, "a connection that stays")

	t.Log("a replica that stands still is of no use")
	replica.query(t, "stop slave sql_thread")
	eventuallySays(t, "mariadb-read", replica.address, "replica OFF")
	replica.query(t, "start slave")
	awaitAvailable(t, "mariadb-read", replica.address)

	t.Log("a switch-over")
	primary.query(t, "set global read_only = 1")
	requireCut(t, held)
	waits := write().begin(t)
	replica.catchUp(t, primary)
	replica.query(t, "stop slave; reset slave all; set global read_only = 0")
	primary.follow(t, replica)
	primary, replica = replica, primary
	awaitAvailable(t, "mariadb-write", primary.address)
	awaitAvailable(t, "mariadb-read", replica.address)
	out, err := waits.wait()
	require.NoError(t, err, "who comes in between waits for the new primary: %s", out)
	for range 4 {
		write().run(t)
	}
	require.Equal(t, "5", primary.query(t, "select count(*) from d.writes where server = 2"))
	require.Equal(t, "5", primary.query(t, "select count(*) from d.writes where server = 1"), "the former primary took none")
	eventually(t, func() bool {
		return mariaDBApp(at["3308"], "select count(*), @@server_id from d.writes").run(t) == "10\t1\n"
	}, "and has them all")
}

// TestMariaDBGalera has the example ask clustercheck, and the documentation's
// dialogue the nodes themselves, whether they are in sync.
func TestMariaDBGalera(t *testing.T) {
	requireMariaDB(t)
	const provider = "/usr/lib/galera/libgalera_smm.so"
	if _, err := os.Stat(provider); err != nil {
		skipWithout(t, provider+" (Debian: apt-get install galera-4)")
	}
	_, port, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	_, checkPort, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	_, groupPort, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	var nodes [2]*mariaDB
	for i, host := range []string{"127.0.0.1", "127.0.0.2"} {
		// Each is a cluster by itself, and in sync until it is told that it is not.
		group := host + ":" + groupPort
		n := newMariaDB(t, host+":"+port, "--wsrep-on=ON", "--wsrep-provider="+provider, "--wsrep-cluster-address=gcomm://", "--wsrep-node-address="+group,
			"--wsrep-provider-options=gmcast.listen_addr=tcp://"+group+";gcache.size=1M", "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2")
		n.start(t)
		n.query(t, checkUser+"create user app@'%'")
		ln, err := net.Listen("tcp", host+":"+checkPort)
		require.NoError(t, err)
		startServerOn(t, ln, n.clustercheck)
		nodes[i] = n
	}
	at := runMariaDBExample(t, map[string]string{
		"10.0.5.1:3306": nodes[0].address, "10.0.5.2:3306": nodes[1].address, "10.0.5.3:3306": "127.0.0.3:" + port, "health_port 9200": "health_port " + checkPort,
	})
	serves := func(want ...*mariaDB) {
		t.Helper()
		up := make(map[string]bool)
		for _, n := range want {
			up[n.address] = true
		}
		eventually(t, func() bool {
			for _, m := range registry.newest("galera").members() {
				if m.Backend.Available() != up[m.Backend.address] {
					return false
				}
			}
			return true
		}, "galera has %v: %v", up, lazily(func() any { return lastErrors("galera") }))
	}
	// It has the same port on either: the processes tell them apart.
	who := func() string { return strings.TrimSpace(mariaDBApp(at["3306"], "select @@pid_file").run(t)) }
	first, second := nodes[0].query(t, "select @@pid_file"), nodes[1].query(t, "select @@pid_file")
	serves(nodes[0], nodes[1])
	require.Equal(t, first, who())
	held := mariaDBApp(at["3306"], "select sleep(600)").begin(t)
	eventually(t, func() bool {
		return nodes[0].query(t, "select count(*) from information_schema.processlist where user = 'app'") == "1"
	}, "a connection that stays")

	nodes[0].query(t, "set global wsrep_desync = 1")
	serves(nodes[1])
	eventuallySays(t, "galera", nodes[0].address, "HTTP 503, want 2xx")
	requireCut(t, held)
	require.Equal(t, second, who())
	nodes[0].query(t, "set global wsrep_desync = 0")
	serves(nodes[0], nodes[1])
	require.Equal(t, first, who())

	t.Log("asked themselves")
	nodes[1].query(t, "set global wsrep_desync = 1")
	dialogue := snippetWith(t, fenced(t, "docs/databases.md", "caddyfile"), "wsrep_local_state")
	reload(t, snippetConfig(t, "{\nlayer4 {\n"+at["3306"]+" {\nroute {\ntcp_lb "+nodes[0].address+" "+nodes[1].address+" {\nname galera\nhealth_interval 50ms\nhealth_timeout 20s\n"+dialogue+"}\n}\n}\n}\n}\n"))
	serves(nodes[0])
	eventuallySays(t, "galera", nodes[1].address, `\astate 2`)
}

// checkUser is as the example has it.
const checkUser = "create user tcplb_check@'%' with max_user_connections 10; "

// dialogueOf returns the dialogue of one of the example's pools.
func dialogueOf(t testing.TB, pool string) (lines string) {
	t.Helper()
	_, text, found := strings.Cut(readFile(t, "examples/mariadb/Caddyfile"), "name "+pool+"\n")
	require.True(t, found)
	text, _, _ = strings.Cut(text, "}")
	for _, line := range strings.Split(text, "\n") {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "health_send") || strings.HasPrefix(line, "health_expect") {
			lines += line + "\n"
		}
	}
	require.NotEmpty(t, lines)
	return lines
}

// runMariaDBExample runs the example and returns where its ports are. Of backends
// that are not named nobody is there.
func runMariaDBExample(t testing.TB, replacements map[string]string) (at map[string]string) {
	t.Helper()
	at = make(map[string]string)
	for _, port := range []string{"3306", "3307", "3308"} {
		at[port] = freeAddress(t)
		replacements["tcp_lb/:"+port] = "tcp_lb/" + at[port]
	}
	for _, address := range []string{"10.0.5.1:3306", "10.0.5.2:3306", "10.0.5.3:3306", "10.0.6.1:3306", "10.0.6.2:3306"} {
		if replacements[address] == "" {
			replacements[address] = freeAddress(t)
		}
	}
	if replacements["health_port 9200"] == "" {
		replacements["health_port 9200"] = "health_port " + portOf(freeAddress(t))
	}
	replacements["http://:9090"] = "http://:" + portOf(freeAddress(t))
	// Nothing is to be late here, however busy this machine is.
	for from, to := range map[string]string{"health_timeout 1s": "health_timeout 20s", "lb_try_duration 5s": "lb_try_duration 60s", "lb_try_duration 10s": "lb_try_duration 60s", "lb_try_duration 2s": "lb_try_duration 60s"} {
		replacements[from] = to
	}
	runRecipe(t, "examples/mariadb/Caddyfile", replacements)
	return at
}

func requireMariaDB(t testing.TB) {
	t.Helper()
	requirePrograms(t, "/usr/sbin", "mariadb-server", "mariadb-install-db", "mariadbd", "mariadb")
}

// mariaDB is a server with a socket for its administrator.
type mariaDB struct {
	realServer
	socket string
}

// newMariaDB makes a server's data directory and says how to run it.
func newMariaDB(t testing.TB, address string, args ...string) *mariaDB {
	t.Helper()
	as := unprivileged(t)
	dir := serverDir(t, as)
	command{name: "mariadb-install-db", dir: dir, as: as, args: []string{
		"--no-defaults", "--datadir=" + dir + "/data", "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve",
	}}.run(t)
	host, port, _ := strings.Cut(address, ":")
	s := &mariaDB{socket: dir + "/socket"}
	s.address = address
	s.command = command{name: "mariadbd", dir: dir, as: as, args: append([]string{
		"--no-defaults", "--datadir=" + dir + "/data", "--bind-address=" + host, "--port=" + port, "--socket=" + s.socket, "--pid-file=" + dir + "/pid",
		"--innodb-buffer-pool-size=8M", "--innodb-flush-log-at-trx-commit=0",
	}, args...)}
	s.ready = mariaDBClient("-u", "root", "-S", s.socket, "-e", "select 1")
	return s
}

// mariaDBClient is a client that is told everything by its arguments.
func mariaDBClient(args ...string) command {
	return command{name: "mariadb", args: append([]string{"--no-defaults", "-N", "-B"}, args...)}
}

// mariaDBApp is an application's client.
func mariaDBApp(address, statement string) command {
	host, port, _ := strings.Cut(address, ":")
	return mariaDBClient("-h", host, "-P", port, "-u", "app", "-e", statement)
}

// query asks the server for one value as its administrator.
func (s *mariaDB) query(t testing.TB, statement string) string {
	t.Helper()
	return strings.TrimSpace(mariaDBClient("-u", "root", "-S", s.socket, "-e", statement).run(t))
}

// follow has the server replicate another one.
func (s *mariaDB) follow(t testing.TB, primary *mariaDB) {
	t.Helper()
	s.query(t, "change master to master_host = '127.0.0.1', master_port = "+primary.port()+", master_user = 'repl', master_use_gtid = slave_pos, master_connect_retry = 1; start slave")
}

// catchUp waits until a replica has all that the primary has.
func (s *mariaDB) catchUp(t testing.TB, primary *mariaDB) {
	t.Helper()
	require.Equal(t, "0", s.query(t, "select master_gtid_wait('"+primary.query(t, "select @@gtid_binlog_pos")+"', 30)"))
}

// clustercheck answers as the script of that name does: whether the node is in
// sync, to whatever is asked, which it does not read.
func (s *mariaDB) clustercheck(c *net.TCPConn) {
	ctx, cancel := context.WithTimeout(context.Background(), hangTimeout)
	defer cancel()
	client := mariaDBClient("-u", "root", "-S", s.socket, "-e", "show status like 'wsrep_local_state'")
	out, err := exec.CommandContext(ctx, client.name, client.args...).Output()
	status, text := http.StatusServiceUnavailable, "Galera cluster node is not synced.\r\n"
	if err == nil && strings.TrimSpace(string(out)) == "wsrep_local_state\t4" {
		status, text = http.StatusOK, "Galera cluster node is synced.\r\n"
	}
	_, _ = io.WriteString(c, "HTTP/1.1 "+strconv.Itoa(status)+" "+http.StatusText(status)+"\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: "+strconv.Itoa(len(text))+"\r\n\r\n"+text)
}

// passOn relays a connection to the address, from another one of this machine.
func passOn(c *net.TCPConn, from, to string) {
	there, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: hangTimeout}).Dial("tcp", to)
	if err != nil {
		return
	}
	defer there.Close()
	answered := make(chan struct{})
	go func() { // ends with either side, which passOn waits for
		defer close(answered)
		_, _ = io.Copy(c, there)
		_ = c.CloseWrite()
	}()
	_, _ = io.Copy(there, c)
	_ = there.(*net.TCPConn).CloseWrite()
	<-answered
}

// leaveUnsaid connects and leaves without a word, as a port scan does.
func leaveUnsaid(t testing.TB, address string) {
	t.Helper()
	c := dialClient(t, address)
	_, err := io.ReadAtLeast(c, make([]byte, 1024), 5) // the greeting
	require.NoError(t, err)
	require.NoError(t, c.Close())
}
