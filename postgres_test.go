//go:build unix

package tcplb

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// preparePostgres makes a server's data directory and says how to run it.
func preparePostgres(t testing.TB, s *realServer, as *syscall.Credential) {
	t.Helper()
	dir := serverDir(t, as)
	command{name: "initdb", dir: dir, as: as, args: []string{
		"-D", dir + "/data", "-U", "postgres", "-A", "trust", "-N", "--locale=C", "-E", "UTF8",
	}}.run(t)
	s.command = postgresCommand(s.address, dir, as)
	s.ready = pgClientAt("psql", s.address, "-c", "select 1")
}

// serverDir is a directory for a server that may run as somebody else; t.TempDir
// is for the test's user only.
func serverDir(t testing.TB, as *syscall.Credential) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tcplb")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	if as != nil {
		require.NoError(t, os.Chown(dir, int(as.Uid), int(as.Gid)))
	}
	return dir
}

// postgresCommand runs a server whose data is in the directory.
func postgresCommand(address, dir string, as *syscall.Credential) command {
	host, port, _ := strings.Cut(address, ":")
	return command{name: "postgres", dir: dir, as: as, args: []string{
		"-D", dir + "/data", "-p", port, "-c", "listen_addresses=" + host, "-c", "unix_socket_directories=", "-c", "fsync=off",
	}, stop: syscall.SIGINT} // "fast": ends the sessions
}

func pgClient(program, port string, args ...string) command {
	return pgClientAt(program, "127.0.0.1:"+port, args...)
}

func pgClientAt(program, address string, args ...string) command {
	host, port, _ := strings.Cut(address, ":")
	return command{
		name: program,
		args: append(args, "-h", host, "-p", port, "-U", "postgres", "postgres"),
		env:  []string{"PGSSLMODE=disable", "PGGSSENCMODE=disable"},
	}
}

// requirePgbench runs pgbench with 8 clients of so many transactions each, and
// checks that all were served.
func requirePgbench(t testing.TB, port string, each int, args ...string) {
	t.Helper()
	out := pgClient("pgbench", port, append(args, "-n", "-S", "-c", "8", "-t", strconv.Itoa(each))...).run(t)
	require.Contains(t, out, fmt.Sprintf("actually processed: %d/%d\n", 8*each, 8*each))
	require.NotContains(t, strings.ToLower(out), "error")
}

// whoAnswers connects n times and returns the ports of the servers it met.
func whoAnswers(t testing.TB, port string, n int) []string {
	t.Helper()
	var ports []string
	for range n {
		ports = append(ports, strings.TrimSpace(pgClient("psql", port, "-A", "-t", "-X", "-c", "select inet_server_port()").run(t)))
	}
	return ports
}
