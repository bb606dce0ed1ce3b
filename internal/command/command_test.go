package command

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"),
		goleak.IgnoreAnyFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// adminEndpoint is one under test's control: it keeps requests, and answers what
// reply says.
type adminEndpoint struct {
	address string
	mu      sync.Mutex
	asked   []string
}

func startAdmin(t *testing.T, reply func(w http.ResponseWriter, r *http.Request)) *adminEndpoint {
	t.Helper()
	a := new(adminEndpoint)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		a.mu.Lock()
		a.asked = append(a.asked, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body)))
		a.mu.Unlock()
		reply(w, r)
	}))
	t.Cleanup(s.Close)
	a.address = s.Listener.Addr().String()
	return a
}

// answers replies to each path with a body, or a status in front of one.
func answers(bodies map[string]string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		body, ok := bodies[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		var status int
		if n, _ := fmt.Sscanf(body, "%d {", &status); n == 1 {
			w.WriteHeader(status)
			_, body, _ = strings.Cut(body, " ")
		}
		_, _ = io.WriteString(w, body+"\n")
	}
}

func (a *adminEndpoint) requests() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked
}

// caddyRun runs caddy with the arguments, and returns what it writes, its exit
// code and its error.
func caddyRun(t *testing.T, args ...string) (out string, code int, err error) {
	t.Helper()
	root := &cobra.Command{Use: "caddy", SilenceUsage: true, SilenceErrors: true}
	cmd := &cobra.Command{Use: "tcp-lb"}
	setUp(cmd)
	root.AddCommand(cmd)
	var b bytes.Buffer
	root.SetOut(&b)
	root.SetErr(io.Discard)
	root.SetArgs(append([]string{"tcp-lb"}, args...))
	if err = root.ExecuteContext(t.Context()); err == nil {
		return b.String(), 0, nil
	}
	if v := reflect.Indirect(reflect.ValueOf(err)); v.Kind() == reflect.Struct && v.FieldByName("ExitCode").IsValid() {
		return b.String(), int(v.FieldByName("ExitCode").Int()), err
	}
	return b.String(), 1, err
}

const somePools = `[
	{"lb":"db","backends":1,"available":0,"draining":0,"active":0,"waiting":3,"connections_total":0,"errors_total":12,"retries_total":0,"no_backend":4,"max_connections":1,"max_connections_per_client":2,"received_bytes":0,"sent_bytes":0},
	{"lb":"web","backends":3,"available":2,"draining":1,"active":1200,"waiting":0,"connections_total":1234567,"errors_total":3,"retries_total":3,"no_backend":0,"max_connections":0,"received_bytes":123456789,"sent_bytes":98765432101}]`

const someBackends = `[
	{"lb":"db","address":"10.0.1.1:5432","configured":true,"weight":1,"effective_weight":1,"state":"ready","health":"down","active":0,"connections_total":0,"errors_total":12,"received_bytes":0,"sent_bytes":0,"last_error":"dial tcp 10.0.1.1:5432: connect: connection refused","last_connect_error":"dial tcp 10.0.1.1:5432: connect: connection refused"},
	{"lb":"web","address":"10.0.0.1:3001","configured":true,"weight":1,"effective_weight":3,"state":"ready","health":"up","active":1000,"connections_total":1234000,"errors_total":3,"received_bytes":123456789,"sent_bytes":98765432101,"last_error":"","last_connect_error":"TLS handshake: tls: failed to verify certificate: x509: certificate is valid for db.internal, not web.internal"},
	{"lb":"web","address":"[2001:db8::1234:5678]:3001","configured":false,"weight":0,"effective_weight":0,"state":"ready","health":"unchecked","active":200,"connections_total":567,"errors_total":0,"received_bytes":999,"sent_bytes":1000,"last_error":"","last_connect_error":"refused\u001b[31m"}]`

func TestStatus(t *testing.T) {
	a := startAdmin(t, answers(map[string]string{"/tcp_lb/pools": somePools, "/tcp_lb/backends": someBackends}))
	out, code, err := caddyRun(t, "status", "--address", a.address)
	require.EqualError(t, err, "no backend is available: db")
	require.Equal(t, exitNotReady, code)
	require.Equal(t, strings.TrimPrefix(`
LB   AVAILABLE  OPEN  WAITING  TOTAL  ERRORS  RETRIES  TURNED AWAY  RECEIVED   SENT
db   0 of 1        0        3      0      12        0            7       0 B    0 B
web  2 of 3     1200        0   1.2M       3        3            0    123 MB  99 GB

LB   BACKEND                     HEALTH     STATE  WEIGHT  OPEN  TOTAL  ERRORS  RECEIVED    SENT  LAST ERROR
db   10.0.1.1:5432               down       ready       1     0      0      12       0 B     0 B  connect: connection refused
web  10.0.0.1:3001               up         ready   3 (1)  1000   1.2M       3    123 MB   99 GB  TLS handshake: certificate is valid for db.internal, not web.internal
web  [2001:db8::1234:5678]:3001  unchecked  left        0   200    567       0     999 B  1.0 kB  refused�[31m
`, "\n"), out)
	require.Equal(t, []string{"GET /tcp_lb/pools?", "GET /tcp_lb/backends?"}, a.requests())

	out, code, err = caddyRun(t, "status", "--json", "--lb", "web", "--address", a.address)
	require.Error(t, err)
	require.Equal(t, exitNotReady, code)
	require.JSONEq(t, `{"pools":`+somePools+`,"backends":`+someBackends+`}`, out)
	require.Contains(t, a.requests(), "GET /tcp_lb/pools?lb=web")

	none := startAdmin(t, answers(map[string]string{"/tcp_lb/pools": "[]", "/tcp_lb/backends": "[]"}))
	for want, args := range map[string][]string{
		`there is no pool: the config has no tcp_lb handler`: nil,
		`there is no pool "web"`:                             {"--lb", "web"},
	} {
		out, code, err = caddyRun(t, append(args, "status", "--address", none.address)...)
		require.EqualError(t, err, want)
		require.Equal(t, exitNoneMatched, code)
		require.Empty(t, out)
	}
}

// A pool that has left the config takes no connections, as is right. One that waits
// for its source to find backends is not there yet.
func TestStatusOfPoolsWithoutBackends(t *testing.T) {
	for pools, want := range map[string]int{
		`[{"lb":"old","backends":0,"available":0,"draining":1,"active":3}]`:                0,
		`[{"lb":"new","backends":0,"available":0,"sources":[{"source":"a db.internal"}]}]`: exitNotReady,
	} {
		a := startAdmin(t, answers(map[string]string{"/tcp_lb/pools": pools, "/tcp_lb/backends": "[]"}))
		_, code, _ := caddyRun(t, "status", "--address", a.address)
		require.Equal(t, want, code, pools)
	}
}

const someConnections = `[
	{"lb":"web","client":"192.0.2.7:51312","backend":"10.0.0.1:3001","since":"2026-11-24T12:00:05Z","age":93784.5,"idle":61.2,"received_bytes":517,"sent_bytes":48112},
	{"lb":"web","client":"[2001:db8::7]:40000","backend":"unix//run/a.sock","since":"2026-11-24T12:00:05Z","age":3.25,"idle":0,"received_bytes":0,"sent_bytes":0}]`

func TestConnections(t *testing.T) {
	a := startAdmin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Total-Count", "9900")
		_, _ = io.WriteString(w, someConnections)
	})
	table := strings.TrimPrefix(`
LB   CLIENT               BACKEND             AGE   IDLE  RECEIVED   SENT
web  192.0.2.7:51312      10.0.0.1:3001     1d02h  1m01s     517 B  48 kB
web  [2001:db8::7]:40000  unix//run/a.sock   3.2s   0.0s       0 B    0 B
`, "\n")
	out, code, err := caddyRun(t, "connections", "10.0.0.1:3001", "--lb", "web", "--client", "192.0.2.0/24", "--sort", "idle", "--limit", "2", "--address", a.address)
	require.NoError(t, err)
	require.Zero(t, code)
	require.Equal(t, table+"2 of 9900, --limit 0 shows all\n", out)
	out, _, err = caddyRun(t, "connections", "--json", "--address", a.address)
	require.NoError(t, err)
	require.Equal(t, someConnections, out, "as it is")

	out, code, err = caddyRun(t, "kill", "--client", "192.0.2.7", "--address", a.address)
	require.NoError(t, err)
	require.Zero(t, code)
	require.Equal(t, table+"2 connections are cut\n", out)
	require.Equal(t, []string{
		"GET /tcp_lb/connections?address=10.0.0.1%3A3001&client=192.0.2.0%2F24&lb=web&limit=2&sort=idle",
		"GET /tcp_lb/connections?",
		"DELETE /tcp_lb/connections?client=192.0.2.7",
	}, a.requests())
}

func TestChanges(t *testing.T) {
	a := startAdmin(t, answers(map[string]string{"/tcp_lb/backends": `[{"lb":"web","address":"10.0.0.1:3001","configured":true,"weight":1,"effective_weight":0,"state":"drain","health":"up","active":2}]`}))
	for _, c := range []struct{ args, want string }{
		{"drain 10.0.0.1:3001", `PATCH /tcp_lb/backends?address=10.0.0.1%3A3001 {"state":"drain"}`},
		{"maint --lb web", `PATCH /tcp_lb/backends?lb=web {"state":"maint"}`},
		{"ready 10.0.0.1:3001 --lb web", `PATCH /tcp_lb/backends?address=10.0.0.1%3A3001&lb=web {"state":"ready"}`},
		{"weight 10.0.0.1:3001 0", `PATCH /tcp_lb/backends?address=10.0.0.1%3A3001 {"weight":0}`},
		{"weight 256 --lb web", `PATCH /tcp_lb/backends?lb=web {"weight":256}`},
		{"weight 10.0.0.1:3001 config", `PATCH /tcp_lb/backends?address=10.0.0.1%3A3001 {"weight":null}`},
	} {
		out, code, err := caddyRun(t, append(strings.Fields(c.args), "--address", a.address)...)
		require.NoError(t, err, c.args)
		require.Zero(t, code)
		require.Equal(t, strings.TrimPrefix(`
LB   BACKEND        HEALTH  STATE  WEIGHT  OPEN  TOTAL  ERRORS  RECEIVED  SENT  LAST ERROR
web  10.0.0.1:3001  up      drain       1     2      0       0       0 B   0 B
`, "\n"), out)
		asked := a.requests()
		require.Equal(t, c.want, asked[len(asked)-1])
	}
}

// What is wrong is refused before anything is asked.
func TestMistakes(t *testing.T) {
	a := startAdmin(t, answers(nil))
	for args, want := range map[string]string{
		"stauts":                            `unknown command "stauts" for "caddy tcp-lb": did you mean status?`,
		"drain":                             "which backend? Give its address, --lb or both",
		"drain a:1 b:1":                     "accepts at most 1 arg(s), received 2",
		"drain EMPTY":                       "the backend's address is empty: leave it out for all",
		"drain a:1 --lb EMPTY":              "--lb is empty: leave it out for all",
		"drain a:1 --wait soon":             "--wait soon: want a duration such as 5m",
		"drain a:1 --wait -1s":              "--wait -1s: want a duration such as 5m",
		"ready a:1 --wait 1s":               "unknown flag: --wait",
		"weight a:1 257":                    `weight "257": want a number from 0 to 256, or config`,
		"weight a:1 -1":                     "unknown shorthand flag: '1' in -1",
		"weight a:1 heavy":                  `weight "heavy": want a number from 0 to 256, or config`,
		"weight 3":                          "which backend? Give its address, --lb or both",
		"kill":                              "which connections? Give a backend, --lb or --client",
		"kill --limit 3":                    "which connections? Give a backend, --lb or --client",
		"kill --client EMPTY":               "--client is empty: leave it out for all",
		"status web":                        `unknown command "web" for "caddy tcp-lb status"`,
		"status --address localhost:1-3":    `admin endpoint "localhost:1-3": want one port`,
		"status --address fd/3":             `admin endpoint "fd/3" is a file of that process: give its address with --address`,
		"status --address {env.NO_SUCH_V}x": `admin endpoint "{env.NO_SUCH_V}x": `,
	} {
		list := strings.Fields(args)
		for i := range list {
			list[i] = strings.TrimPrefix(list[i], "EMPTY")
		}
		if !strings.Contains(args, "--address") {
			list = append(list, "--address", a.address)
		}
		_, code, err := caddyRun(t, list...)
		require.ErrorContains(t, err, want, args)
		require.Equal(t, 1, code, args)
	}
	require.Empty(t, a.requests())
}

// An endpoint may refuse, say what is no answer, or nothing, or not be there.
func TestTrouble(t *testing.T) {
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, gone.Close())
	_, code, err := caddyRun(t, "status", "--address", gone.Addr().String())
	require.ErrorContains(t, err, "no Caddy has its admin endpoint at "+gone.Addr().String()+", --address and --config say where it is: dial tcp")
	require.Equal(t, 1, code)

	for body, c := range map[string]struct {
		want string
		code int
	}{
		`404 {"error":"there is no such backend"}`: {"there is no such backend", exitNoneMatched},
		`400 {"error":"address \"a\": want host"}`: {`address "a": want host`, 1},
		`500 {}`:         {"answers with status 500", 1},
		`404 {}`:         {"has no tcp_lb, or one of another version", 1},
		`<html>`:         {"answers what is no list, is it a Caddy?", 1},
		`{"error":"no"}`: {"answers what is no list, is it a Caddy?", 1},
		`[{"lb":3}]`:     {"answers what is no list, is it a Caddy?", 1},
	} {
		a := startAdmin(t, answers(map[string]string{"/tcp_lb/backends": body}))
		out, code, err := caddyRun(t, "drain", "a:1", "--address", a.address)
		require.ErrorContains(t, err, c.want)
		require.Equal(t, c.code, code, body)
		require.Empty(t, out)
	}
	other := startAdmin(t, answers(nil))
	_, code, err = caddyRun(t, "status", "--address", other.address)
	require.ErrorContains(t, err, "the Caddy at "+other.address+" has no tcp_lb, or one of another version")
	require.Equal(t, 1, code)
}

// The endpoint hangs up on the first request, as on a reload. Only what may be
// done twice is asked again.
func TestEndpointGivesWay(t *testing.T) {
	var mu sync.Mutex
	hungUp := false
	a := startAdmin(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if hungUp = !hungUp; hungUp {
			c, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_ = c.Close()
			}
			return
		}
		_, _ = io.WriteString(w, "[]")
	})
	_, _, err := caddyRun(t, "drain", "a:1", "--address", a.address)
	require.NoError(t, err)
	_, code, err := caddyRun(t, "kill", "a:1", "--address", a.address)
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, 1, code)
	require.Len(t, a.requests(), 3)
}

func TestSilentEndpoint(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, nobody reads
	require.NoError(t, err)
	defer ln.Close()
	in, err := instanceAt(ln.Addr().String())
	require.NoError(t, err)
	in.timeout = 50 * time.Millisecond
	_, err = in.ask(t.Context(), http.MethodGet, "/tcp_lb/pools", nil, nil)
	require.ErrorContains(t, err, "no answer from the admin endpoint at "+ln.Addr().String())
	_, code, err := caddyRun(t, "drain", "a:1", "--wait", "1ms", "--address", freshDrain(t))
	require.Error(t, err)
	require.Equal(t, exitNotReady, code)
}

// freshDrain is the address of an endpoint that answers the change only.
func freshDrain(t *testing.T) string {
	ctx := t.Context()
	return startAdmin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			select {
			case <-ctx.Done():
			case <-r.Context().Done():
			}
		}
		_, _ = io.WriteString(w, `[{"lb":"web","address":"a:1","state":"drain","active":1}]`)
	}).address
}

func TestEndpointOnAUnixSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "") // t.TempDir's may be too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	reply := answers(map[string]string{"/tcp_lb/connections": "[]"})
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") != "" || r.Host != "127.0.0.1" { // which Caddy refuses
			w.WriteHeader(http.StatusForbidden)
			return
		}
		reply(w, r)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(ln) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	config := filepath.Join(dir, "caddy.json")
	require.NoError(t, os.WriteFile(config, []byte(fmt.Sprintf(`{"admin":{"listen":"unix/%s|0600"}}`, filepath.ToSlash(path))), 0o600))
	for _, where := range [][]string{{"--address", "unix/" + path}, {"--config", config}} {
		out, code, err := caddyRun(t, append(where, "connections")...)
		require.NoError(t, err)
		require.Zero(t, code)
		require.Equal(t, "LB  CLIENT  BACKEND  AGE  IDLE  RECEIVED  SENT\n", out)
	}
}

func TestEndpointOfTheConfig(t *testing.T) {
	a := startAdmin(t, answers(map[string]string{"/tcp_lb/connections": "[]"}))
	dir := t.TempDir()
	for name, c := range map[string]struct{ content, want string }{
		"caddy.json":    {fmt.Sprintf(`{"admin":{"listen":%q}}`, a.address), ""},
		"Caddyfile":     {fmt.Sprintf("{\n\tadmin %s\n}\n", a.address), ""},
		"off.caddyfile": {"{\n\tadmin off\n}\n", "turns the admin endpoint off, without which nothing can be asked or changed"},
		"bad.json":      {"{", "unexpected end of JSON input"},
	} {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, []byte(c.content), 0o600))
		_, code, err := caddyRun(t, "connections", "--config", file)
		if c.want == "" {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, err, c.want, name)
		require.Equal(t, 1, code)
	}
	require.Len(t, a.requests(), 2)
	in, err := findInstance("", "", "")
	require.NoError(t, err)
	require.Equal(t, caddy.DefaultAdminListen, in.name, "nothing is said")
}
