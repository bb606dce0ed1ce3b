package tcplb

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// tcpLB runs caddy tcp-lb in a process of its own.
func tcpLB(t testing.TB, args ...string) (out, note string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"tcp-lb"}, args...)...)
	dir := t.TempDir()
	cmd.Env = append(os.Environ(), childEnv+"=1", "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		require.True(t, errors.As(err, &exit), "%v", err)
		code = exit.ExitCode()
	}
	return stdout.String(), stderr.String(), code
}

// squeezed is a table without what aligns it.
func squeezed(table string) string {
	return regexp.MustCompile(`  +`).ReplaceAllString(strings.TrimSpace(table), "  ")
}

func TestCommand(t *testing.T) {
	watchLeftovers(t)
	a, b := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	runWithAdmin(t, adminConfig(admin, web, lb, `"name":"web",`+checksDisabled+","+backendsJSON(a.address, b.address)+"}"))
	defer patch(t, admin, "lb=web", `{"state":"ready","weight":null}`)
	run := func(want int, args string) (out string) {
		t.Helper()
		out, note, code := tcpLB(t, append(strings.Fields(args), "--address", admin)...)
		require.Equal(t, want, code, "%s: %s", args, note)
		return out
	}
	first, second := hold(t, lb), hold(t, lb) // to a and b
	eventually(t, func() bool { return metric(t, "sent_bytes_total", nil) == 2 }, "counted")

	low, high := a.address, b.address
	if low > high {
		low, high = high, low
	}
	require.Equal(t, fmt.Sprintf(strings.TrimSpace(`
LB  AVAILABLE  OPEN  WAITING  TOTAL  ERRORS  RETRIES  TURNED AWAY  RECEIVED  SENT
web  2 of 2  2  0  2  0  0  0  2 B  2 B

LB  BACKEND  HEALTH  STATE  WEIGHT  OPEN  TOTAL  ERRORS  RECEIVED  SENT  LAST ERROR
web  %s  unchecked  ready  1  1  1  0  1 B  1 B
web  %s  unchecked  ready  1  1  1  0  1 B  1 B`), low, high), squeezed(run(0, "status")))
	require.Contains(t, squeezed(run(0, "connections "+a.address)), fmt.Sprintf("\nweb  %s  %s  ", first.LocalAddr(), a.address))
	require.Contains(t, squeezed(run(0, "weight 3 --lb web")), a.address+"  unchecked  ready  3 (1)  1")

	// The wait ends with the last connection, and says if it does not.
	out := run(5, "drain "+a.address+" --wait 300ms")
	require.Contains(t, squeezed(out), a.address+"  unchecked  drain  1  1")
	done := make(chan string)
	go func() {
		out, note, code := tcpLB(t, "drain", a.address, "--wait", "30s", "--json", "--address", admin)
		done <- fmt.Sprint(code, " ", note, out)
	}()
	write(t, first, "y")
	expect(t, first, "y")
	require.NoError(t, first.Close())
	said := <-done
	require.True(t, strings.HasPrefix(said, "0 "), said)
	var list []backendStatus
	require.NoError(t, json.Unmarshal([]byte(said[strings.Index(said, "["):]), &list))
	require.Len(t, list, 1)
	require.Zero(t, list[0].Active)

	require.Contains(t, run(0, "kill --client "+second.LocalAddr().String()), "\n1 connection is cut\n")
	requireReset(t, second)
	eventually(t, func() bool { return open.n.Load() == 0 }, "gone")
	run(4, "ready 10.0.0.1:1")
	run(0, "maint --lb web")
	run(5, "status")
	run(1, "drian "+a.address)
}

// Caddy's checks of host and origin let the command through on a socket, too.
func TestCommandOverAUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "") // t.TempDir's may be too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	config := adminConfig("unix/"+filepath.Join(dir, "s")+"|0600", freeAddress(t), freeAddress(t), `"name":"web",`+checksDisabled+","+backendsJSON(freeAddress(t))+"}")
	runWithAdmin(t, config)
	file := filepath.Join(dir, "caddy.json")
	require.NoError(t, os.WriteFile(file, []byte(config), 0o600))
	for _, where := range [][]string{{"--config", file}, {"--address", "unix/" + filepath.Join(dir, "s")}} {
		out, note, code := tcpLB(t, append([]string{"status", "--json"}, where...)...)
		require.Zero(t, code, note)
		var both struct {
			Pools    []poolSummary
			Backends []backendStatus
		}
		require.NoError(t, json.Unmarshal([]byte(out), &both))
		require.Equal(t, "web", both.Pools[0].LB)
		require.Len(t, both.Backends, 1)
	}
}
