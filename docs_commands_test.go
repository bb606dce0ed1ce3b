//go:build unix

package tcplb

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Programs that documentation may name. Those that are not here are not found:
// the first are the system's own, the others do nothing.
var (
	realPrograms  = []string{"grep", "head", "sed", "seq", "sort", "uniq"}
	emptyPrograms = []string{"docker-compose", "ip", "make", "nc", "ssh", "systemctl", "unshare", "xcaddy"}
)

// In place of caddy: the test binary, which asks the balancer of the test, and
// once more where Caddy's admin endpoint was being replaced by the next config's.
// A config that would be run is validated.
const caddyScript = `#!/bin/sh
[ "$1" != run ] || { shift; set -- validate "$@"; }
case $1 in tcp-lb | reload) set -- "$@" --address %[1]s ;; esac
for try in 1 2 3; do
	%[2]s=1 %[3]s "$@" 2>said && exit
	code=$?
	grep -q -e EOF -e 'reset by peer' -e 'connection refused' said || break
done
while read -r line; do echo "$line" >&2; done <said
exit $code
`

const curlScript = `#!/bin/sh
for try in 1 2 3; do
	%s --silent --show-error --fail-with-body --noproxy '*' --max-time 20 "$@"
	code=$?
	case $code in 7 | 52 | 56) ;; *) break ;; esac
done
exit $code
`

const goScript = `#!/bin/sh
[ "$1 $2" != "run ./cmd/caddy" ] || { shift 2; exec caddy "$@"; }
`

// reader is a place where the commands of a document can be run, as somebody
// does who reads it.
type reader struct {
	t              testing.TB
	dir            string // a copy of the checkout
	admin, lb, web string
	backends       [2]*server
	clients        []net.Conn
	caddyfile      string
}

// httpEcho answers HTTP, and sends all else back.
func httpEcho(c *net.TCPConn) {
	b := make([]byte, 512)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if strings.HasPrefix(string(b[:n]), "GET ") {
			_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nhi\n"))
			return
		}
		_, _ = c.Write(b[:n])
	}
}

func newReader(t *testing.T) *reader {
	r := &reader{t: t, dir: t.TempDir(), admin: freeAddress(t), lb: freeAddress(t), web: freeAddress(t)}
	for i := range r.backends {
		r.backends[i] = startServer(t, httpEcho)
	}
	r.caddyfile = fmt.Sprintf("{\n\tadmin %s\n\tpersist_config off\n\tauto_https off\n\tlog {\n\t\tlevel ERROR\n\t}\n\tlayer4 {\n\t\ttcp_lb/%s {\n\t\t\troute {\n\t\t\t\ttcp_lb %s %s {\n\t\t\t\t\tname web\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n\nhttp://%s {\n\tmetrics /metrics\n\ttcp_lb_health /health\n}\n",
		r.admin, r.lb, r.backends[0].address, r.backends[1].address, r.web)
	entries, err := os.ReadDir(".")
	require.NoError(t, err)
	here, err := os.Getwd()
	require.NoError(t, err)
	for _, e := range entries {
		if e.Name() != "bin" {
			require.NoError(t, os.Symlink(filepath.Join(here, e.Name()), filepath.Join(r.dir, e.Name())))
		}
	}
	require.NoError(t, os.Mkdir(filepath.Join(r.dir, "bin"), 0o700))
	for _, name := range realPrograms {
		path, err := exec.LookPath(name)
		require.NoError(t, err)
		require.NoError(t, os.Symlink(path, filepath.Join(r.dir, "bin", name)))
	}
	for _, name := range emptyPrograms {
		r.write("bin/"+name, "#!/bin/sh\n")
	}
	curl, err := exec.LookPath("curl")
	require.NoError(t, err)
	r.write("bin/curl", fmt.Sprintf(curlScript, curl))
	r.write("bin/go", goScript)
	for _, name := range []string{"bin/caddy", "bin/caddy-custom"} {
		r.write(name, fmt.Sprintf(caddyScript, r.admin, childEnv, os.Args[0]))
	}
	r.write("Caddyfile.documented", r.caddyfile)
	return r
}

func (r *reader) write(file, text string) {
	require.NoError(r.t, os.WriteFile(filepath.Join(r.dir, file), []byte(text), 0o700))
}

// prepare has the balancer as a document finds it: each backend is in use, unless
// the command waits for the end of that.
func (r *reader) prepare(waits bool) {
	r.release()
	patch(r.t, r.admin, "lb=web", `{"state":"ready","weight":null}`)
	for range 4 {
		if !waits {
			r.clients = append(r.clients, hold(r.t, r.lb))
		}
	}
}

func (r *reader) release() {
	for _, c := range r.clients {
		_ = c.Close()
	}
	r.clients = nil
	eventually(r.t, func() bool { return open.n.Load() == 0 }, "nobody is there")
}

// here is a command with the test's addresses in place of the document's.
func (r *reader) here(command string) string {
	client := "127.0.0.1:1"
	if len(r.clients) > 0 {
		client = r.clients[0].LocalAddr().String()
	}
	return strings.NewReplacer(
		"http://localhost:2019", "http://"+r.admin, "localhost:2019", r.admin, "localhost:8080", r.lb, "localhost:9090", r.web,
		"10.0.0.1:5432", r.backends[0].address, "10.0.0.2:5432", r.backends[1].address, "127.0.0.1:3002", r.backends[1].address,
		"192.0.2.7:51312", client, "192.0.2.7", "127.0.0.1", "192.0.2.0/24", "127.0.0.0/8",
		"servers/web/", "servers/srv0/", "/etc/caddy/Caddyfile", "Caddyfile.documented", "examples/json/caddy.json http", "now.json http", "seq 300", "seq 3",
	).Replace(command)
}

// run runs a command as a shell does in the copy, with the programs there.
func (r *reader) run(command string) (string, error) {
	sh, err := exec.LookPath("sh")
	require.NoError(r.t, err)
	cmd := exec.CommandContext(r.t.Context(), sh, "-ec", r.here(command))
	cmd.Dir = r.dir
	// The race detector would have each process rest for a second at its end.
	cmd.Env = []string{"GORACE=atexit_sleep_ms=0", "PATH=" + filepath.Join(r.dir, "bin"), "HOME=" + r.dir, "XDG_CONFIG_HOME=" + r.dir, "XDG_DATA_HOME=" + r.dir}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// commands are those of a block, each with what the document says it prints.
func commands(t testing.TB, b excerpt) (list [][2]string) {
	t.Helper()
	text := strings.ReplaceAll(b.text, "\\\n", " ")
	for line := range strings.Lines(text) {
		command := strings.TrimSpace(line)
		if b.language == "console" {
			var prompt bool
			if command, prompt = strings.CutPrefix(command, "$ "); !prompt {
				require.NotEmpty(t, list, "%s: no command", b.place)
				list[len(list)-1][1] += line
				continue
			}
		}
		list = append(list, [2]string{command})
	}
	return list
}

// Every command of the documentation works, and one of which it shows a refusal
// is refused. Those of other programs than caddy and curl only have to be known.
func TestDocumentedCommands(t *testing.T) {
	requirePrograms(t, "", "curl", "curl")
	watchLeftovers(t)
	r := newReader(t)
	config, err := adapt(t, r.caddyfile)
	require.NoError(t, err)
	r.write("now.json", config)
	runWithAdmin(t, config)
	defer r.release()
	seen := make(map[string]int)
	for _, file := range documents(t) {
		blocks, _ := split(t, file)
		for _, b := range blocks {
			if b.language != "sh" && b.language != "console" {
				continue
			}
			for _, c := range commands(t, b) {
				r.prepare(strings.Contains(c[0], "--wait"))
				out, err := r.run(c[0])
				if strings.HasPrefix(c[1], `{"error"`) {
					require.Error(t, err, "%s: %s\n%s", b.place, c[0], out)
				} else {
					require.NoError(t, err, "%s: %s\n%s", b.place, c[0], out)
					require.False(t, out == "" && regexp.MustCompile(`caddy .* \| `).MatchString(c[0]), "%s: what is piped on is something: %s", b.place, c[0])
				}
				for _, m := range regexp.MustCompile(`\b(caddy|curl) `).FindAllStringSubmatch(c[0], -1) {
					seen[m[1]]++
				}
			}
		}
		status, body := request(t, http.MethodPost, "http://"+r.admin+"/load", config)
		require.Equal(t, 200, status, body)
	}
	bodies := regexp.MustCompile("(?m)^\\| `({.*})` \\|").FindAllStringSubmatch(readFile(t, "docs/api.md"), -1)
	require.Greater(t, len(bodies), 3)
	for _, m := range bodies {
		status, _, text := patch(t, r.admin, "lb=web", m[1])
		require.Equal(t, 200, status, "%s: %s", m[1], text)
	}
	require.Greater(t, seen["caddy"], 20)
	require.Greater(t, seen["curl"], 15)
}
