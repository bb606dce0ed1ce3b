//go:build unix

package tcplb

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestRedisRoles has the example's checks find out which server is the primary,
// before and after a switch-over, and the connections follow.
func TestRedisRoles(t *testing.T) {
	requirePrograms(t, "", "redis-server redis-tools", "redis-server", "redis-cli")
	cli := func(port string, args ...string) command {
		return command{name: "redis-cli", args: append([]string{"-h", "127.0.0.1", "-p", port}, args...)}
	}
	var servers [2]*realServer
	for i := range servers {
		s := &realServer{address: freeAddress(t)}
		s.command = command{name: "redis-server", args: []string{
			"--bind", "127.0.0.1", "--port", s.port(), "--dir", t.TempDir(), "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0",
		}}
		s.ready = cli(s.port(), "ping")
		s.start(t)
		servers[i] = s
	}
	primary, replica := servers[0], servers[1]
	cli(replica.port(), "replicaof", "127.0.0.1", primary.port()).run(t)

	example, err := adapt(t, readFile(t, "examples/redis/Caddyfile"))
	require.NoError(t, err)
	write, read := freeAddress(t), freeAddress(t)
	for from, to := range map[string]string{
		"tcp_lb/:6379": "tcp_lb/" + write, "tcp_lb/:6380": "tcp_lb/" + read,
		"10.0.4.1:6379": primary.address, "10.0.4.2:6379": replica.address, "10.0.4.3:6379": freeAddress(t),
		"127.0.0.1:9090": freeAddress(t),
	} {
		require.Contains(t, example, from)
		example = strings.ReplaceAll(example, from, to)
	}
	noPoolsYet(t)
	runCaddy(t, strings.Replace(example, "{", `{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"ERROR"}}},`, 1))
	serves := func(pool string, s *realServer) {
		t.Helper()
		eventually(t, func() bool {
			for _, m := range registry.newest(pool).members() {
				if m.Backend.Available() != (m.Backend.address == s.address) {
					return false
				}
			}
			return true
		}, "%s has %s alone", pool, s.address)
	}
	serves("redis-write", primary)
	serves("redis-read", replica)
	require.Contains(t, cli(portOf(write), "set", "key", "one").run(t), "OK")
	require.Contains(t, cli(portOf(read), "config", "get", "port").run(t), replica.port())
	held := dialClient(t, write)
	talk(t, held, "SET key two\r\n", "+OK\r\n")

	cli(primary.port(), "replicaof", "127.0.0.1", replica.port()).run(t)
	cli(replica.port(), "replicaof", "no", "one").run(t)
	primary, replica = replica, primary
	_, err = io.Copy(io.Discard, held)
	require.Error(t, err, "cut, so that its client looks for the new primary")
	serves("redis-write", primary)
	for range 5 {
		require.Contains(t, cli(portOf(write), "set", "key", "three").run(t), "OK")
		require.Contains(t, cli(portOf(write), "config", "get", "port").run(t), primary.port())
	}
	serves("redis-read", replica)
	eventually(t, func() bool { return strings.Contains(cli(portOf(read), "get", "key").run(t), "three") }, "the replica has it")
}

// talk sends a command and wants its answer.
func talk(t testing.TB, c io.ReadWriter, command, answer string) {
	t.Helper()
	_, err := io.WriteString(c, command)
	require.NoError(t, err)
	got := make([]byte, len(answer))
	_, err = io.ReadFull(c, got)
	require.NoError(t, err)
	require.Equal(t, answer, string(got))
}
