//go:build linux

package tcplb

import (
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

// systemd must not kill the balancer while it drains.
func TestSystemdTimeout(t *testing.T) {
	stop, err := time.ParseDuration(unitSetting(t, "TimeoutStopSec"))
	require.NoError(t, err)
	require.GreaterOrEqual(t, stop, defaultDrainTimeout+exitMargin+10*time.Second)
}
