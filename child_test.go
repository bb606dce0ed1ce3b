package tcplb

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// childEnv makes the test binary a Caddy with this module, for tests that need
// a process of its own: signals, exit, file limits.
const childEnv = "TCPLB_TEST_CHILD"

const terminate = syscall.SIGTERM

// runChild is that Caddy; its arguments are Caddy's.
func runChild() { caddycmd.Main() }

// child is a Caddy in a process of its own.
type child struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has exited and its log is read

	mu  sync.Mutex
	log []string
}

// startChild runs the config, in JSON; the test's end kills the process if it
// is still there.
func startChild(t *testing.T, config string) *child {
	t.Helper()
	return startChildUnder(t, nil, config)
}

// startChildWithFiles is startChild with a limit of open files.
func startChildWithFiles(t *testing.T, files int, config string) *child {
	t.Helper()
	return startChildUnder(t, []string{"sh", "-c", `ulimit -n "$1" && shift && exec "$@"`, "sh", strconv.Itoa(files)}, config)
}

// startChildUnder is startChild through a command that becomes what its last
// arguments say.
func startChildUnder(t *testing.T, wrapper []string, config string) *child {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "caddy.json")
	require.NoError(t, os.WriteFile(file, []byte(config), 0o600))
	command := append(slices.Clone(wrapper), os.Args[0], "run", "--config", file)
	c := &child{cmd: exec.Command(command[0], command[1:]...), done: make(chan struct{})}
	c.cmd.Env = append(os.Environ(), childEnv+"=1", "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	out, err := c.cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, c.cmd.Start())
	go func() {
		defer close(c.done)
		scanJSON(out, func(line string) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.log = append(c.log, line)
		})
		_ = c.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-c.done
		if t.Failed() {
			t.Log(strings.Join(c.log, "\n"))
		}
	})
	return c
}

func (c *child) signal(t *testing.T, s os.Signal) {
	t.Helper()
	require.NoError(t, c.cmd.Process.Signal(s))
}

// stopByAdmin does what caddy stop does. The answer comes when draining is over.
func (c *child) stopByAdmin(t *testing.T, admin string) {
	t.Helper()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		if r, err := send(http.MethodPost, "http://"+admin+"/stop", ""); err == nil {
			_ = r.Body.Close()
		}
	}()
	t.Cleanup(func() { <-answered })
}

// wait returns the exit code.
func (c *child) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-c.done:
		return c.cmd.ProcessState.ExitCode()
	case <-time.After(hangTimeout):
		require.FailNow(t, "the process does not exit")
		return -1
	}
}

// line waits for a line of the log that has the text.
func (c *child) line(t *testing.T, text string) (fields map[string]any) {
	t.Helper()
	eventually(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, l := range c.log {
			if strings.Contains(l, text) {
				return json.Unmarshal([]byte(l), &fields) == nil
			}
		}
		return false
	}, "a line with %q", text)
	return fields
}

// layer4Connection is what caddy-l4 makes of an accepted connection.
func layer4Connection(c net.Conn) *layer4.Connection {
	return layer4.WrapConnection(c, make([]byte, 0, 2048), zap.NewNop())
}

// scrape returns the value of the series that begins so, from a child's admin
// endpoint.
func scrape(t testing.TB, admin, series string) float64 {
	t.Helper()
	status, body := request(t, http.MethodGet, "http://"+admin+"/metrics", "")
	require.Equal(t, 200, status)
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + `\S* (\S+)$`).FindStringSubmatch(body)
	if m == nil {
		return 0
	}
	v, err := strconv.ParseFloat(m[1], 64)
	require.NoError(t, err)
	return v
}
