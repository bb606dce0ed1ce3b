//go:build linux

package tcplb

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const unitFile = "examples/systemd/caddy-tcp-lb.service"

// unitSetting returns the value of a setting that the unit has once.
func unitSetting(t testing.TB, name string) string {
	t.Helper()
	_, rest, ok := strings.Cut(readFile(t, unitFile), "\n"+name+"=")
	require.True(t, ok, name)
	require.NotContains(t, rest, "\n"+name+"=")
	value, _, _ := strings.Cut(rest, "\n")
	return value
}

// systemd knows all settings of the unit, and finds little to wish for.
func TestSystemdUnit(t *testing.T) {
	requirePrograms(t, "", "systemd", "systemd-analyze")
	text := readFile(t, unitFile)
	unit := filepath.Join(t.TempDir(), filepath.Base(unitFile))
	program, err := os.Executable()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(unit, []byte(strings.ReplaceAll(text, "/usr/bin/caddy", program)), 0o600))
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", unit).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, string(out), filepath.Base(unitFile), "a warning")
	out, err = exec.Command("systemd-analyze", "security", "--offline=yes", "--threshold=20", unit).CombinedOutput()
	require.NoError(t, err, "%s", out)

	// The relay's own calls; Caddy's are those of services in general.
	out, err = exec.Command("systemd-analyze", "syscall-filter", "@system-service", "@basic-io", "@io-event", "@ipc", "@network-io").Output()
	require.NoError(t, err)
	for _, call := range []string{"splice", "epoll_pwait", "eventfd2", "accept4", "pipe2"} {
		require.Contains(t, strings.Fields(string(out)), call)
	}
}

// The unit's commands start a balancer that tells systemd when it is ready, and
// reload it without a lost connection; a start with a wrong config fails in words.
func TestSystemdCommands(t *testing.T) {
	s, lb, admin, dir := echoServer(t), freeAddress(t), freeAddress(t), t.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	write := func(more string) {
		t.Helper()
		text := fmt.Sprintf("{\n\tadmin %s\n\tlayer4 {\n\t\ttcp_lb/%s {\n\t\t\troute {\n\t\t\t\ttcp_lb %s {\n\t\t\t\t\t%s\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n", admin, lb, s.address, more)
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	}
	notices, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	require.NoError(t, err)
	defer notices.Close()
	told := func(want string) {
		t.Helper()
		require.NoError(t, notices.SetReadDeadline(time.Now().Add(hangTimeout)))
		for b := make([]byte, 4096); ; {
			n, err := notices.Read(b)
			require.NoError(t, err, want)
			if strings.Contains(string(b[:n]), want) {
				return
			}
		}
	}
	command := func(setting string) *exec.Cmd {
		line := strings.ReplaceAll(unitSetting(t, setting), "/etc/caddy/Caddyfile", file)
		args := strings.Fields(line)
		require.Equal(t, "/usr/bin/caddy", args[0])
		c := exec.Command(os.Args[0], args[1:]...)
		c.Env = append(os.Environ(), childEnv+"=1", "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir, "HOME="+dir, "NOTIFY_SOCKET="+notices.LocalAddr().String())
		return c
	}
	write("max_connections 100")
	out, err := command("ExecStartPre").CombinedOutput()
	require.NoError(t, err, "%s", out)
	run := command("ExecStart")
	require.NoError(t, run.Start())
	t.Cleanup(func() {
		_ = run.Process.Kill()
		_ = run.Wait()
	})
	told("READY=1")
	c := hold(t, lb)
	write("max_connections 200")
	out, err = command("ExecReload").CombinedOutput()
	require.NoError(t, err, "%s", out)
	told("RELOADING=1")
	told("READY=1")
	write("max_connetions 200")
	for _, setting := range []string{"ExecReload", "ExecStartPre"} {
		out, err = command(setting).CombinedOutput()
		require.Error(t, err)
		require.Contains(t, string(out), "did you mean max_connections?", setting)
	}
	_, err = c.Write([]byte("y"))
	require.NoError(t, err)
	expect(t, c, "y")
}

// systemd must not kill the balancer while it drains.
func TestSystemdTimeout(t *testing.T) {
	stop, err := time.ParseDuration(unitSetting(t, "TimeoutStopSec"))
	require.NoError(t, err)
	require.GreaterOrEqual(t, stop, defaultDrainTimeout+exitMargin+10*time.Second)
}
