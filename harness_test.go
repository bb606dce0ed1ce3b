package tcplb

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	_ "github.com/caddy-tcp-lb/caddy-tcp-lb/internal/demo"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	_ "github.com/mholt/caddy-l4"
	"github.com/prometheus/client_golang/prometheus"
)

// hangTimeout bounds every wait of the tests. It is no measure of speed.
const hangTimeout = 30 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		runChild()
		return
	}
	goleak.VerifyTestMain(m, caddysGoroutines...)
}

// runCaddy loads the config, in JSON, into this process's Caddy and stops it
// with the test.
func runCaddy(t testing.TB, config string) {
	t.Helper()
	noPoolsYet(t)
	require.NoError(t, caddy.Load([]byte(config), true))
	t.Cleanup(func() { require.NoError(t, caddy.Stop()) })
}

// loadOnce loads the config and stops it again, if it could be loaded.
func loadOnce(config string) error {
	if err := caddy.Load([]byte(config), true); err != nil {
		return err
	}
	return caddy.Stop()
}

// reload replaces the config that runCaddy loaded.
func reload(t testing.TB, config string) {
	t.Helper()
	require.NoError(t, caddy.Load([]byte(config), true))
}

// lbConfig is a config with one layer4 server and one tcp_lb handler, whose JSON
// is given without its name of handler.
func lbConfig(listen, handler string) string {
	return layer4Config(fmt.Sprintf(`"srv":{"listen":[%q],"routes":[{"handle":[%s]}]}`, listen, withHandler(handler)))
}

func withHandler(options string) string {
	return `{"handler":"tcp_lb",` + strings.TrimPrefix(strings.TrimSpace(options), "{")
}

func layer4Config(servers string) string {
	return `{"admin":{"disabled":true,"config":{"persist":false}},` +
		`"logging":{"logs":{"default":{"level":"ERROR"}}},` +
		`"apps":{"layer4":{"servers":{` + servers + `}}}}`
}

// backendsJSON is a list of backends of weight 1.
func backendsJSON(addresses ...string) string {
	var list []BackendConfig
	for _, a := range addresses {
		list = append(list, BackendConfig{Address: a})
	}
	b, _ := json.Marshal(list)
	return `"backends":` + string(b)
}

// adapt turns a Caddyfile into JSON.
func adapt(t testing.TB, caddyfile string) (string, error) {
	t.Helper()
	out, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err == nil {
		for _, w := range warnings {
			require.NotContains(t, w.Message, "not formatted", "the test's Caddyfile")
		}
	}
	return string(out), err
}

// listen listens on a loopback port outside the range that the kernel gives to
// connections, which a test with many of them can use up.
func listen(t testing.TB) net.Listener {
	t.Helper()
	for range 1000 {
		port := 12_000 + rand.IntN(20_000)
		if _, promised := promisedPorts.Load(port); promised {
			continue
		}
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return ln
		}
	}
	require.FailNow(t, "no free port")
	return nil
}

// promisedPorts are those that some test was given to listen on later. Tests that
// run side by side must not get the same one, on which both could listen.
var promisedPorts sync.Map

// freeAddress returns a loopback address nobody listens on.
func freeAddress(t testing.TB) string {
	t.Helper()
	for {
		ln := listen(t)
		_ = ln.Close()
		address := ln.Addr().(*net.TCPAddr)
		if _, promised := promisedPorts.LoadOrStore(address.Port, true); !promised {
			return address.String()
		}
	}
}

// server is a backend under test's control: each connection goes to handle, in
// a goroutine of its own.
type server struct {
	t       testing.TB
	address string
	handle  func(*net.TCPConn)

	mu       sync.Mutex
	ln       net.Listener
	conns    map[*net.TCPConn]bool
	accepted int
	wg       sync.WaitGroup
}

// startServer listens on a free address.
func startServer(t testing.TB, handle func(*net.TCPConn)) *server {
	t.Helper()
	return startServerOn(t, listen(t), handle)
}

func startServerOn(t testing.TB, ln net.Listener, handle func(*net.TCPConn)) *server {
	t.Helper()
	s := &server{t: t, address: ln.Addr().String(), handle: handle, conns: make(map[*net.TCPConn]bool)}
	s.startOn(ln)
	t.Cleanup(s.kill)
	return s
}

func (s *server) start() {
	s.t.Helper()
	ln, err := net.Listen("tcp", s.address)
	require.NoError(s.t, err)
	s.startOn(ln)
}

func (s *server) startOn(ln net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ln = ln
	s.wg.Add(1)
	go s.serve(ln)
}

func (s *server) serve(ln net.Listener) {
	defer s.wg.Done()
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.accepted++
		s.conns[c.(*net.TCPConn)] = true
		s.wg.Add(1)
		s.mu.Unlock()
		go s.serveConn(c.(*net.TCPConn))
	}
}

func (s *server) serveConn(c *net.TCPConn) {
	defer s.wg.Done()
	defer func() {
		_ = c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	s.handle(c)
}

// kill stops listening, resets every connection and waits for the handlers.
func (s *server) kill() {
	s.mu.Lock()
	_ = s.ln.Close()
	for c := range s.conns {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *server) acceptedCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted
}

// echoServer sends everything back and passes a half-close on.
func echoServer(t testing.TB) *server {
	t.Helper()
	return startServer(t, func(c *net.TCPConn) { echo(c) })
}

// echo sends back what comes. It does not splice(2), for which Go would keep
// pipes that look like leftovers of the balancer's.
func echo(c net.Conn) { _, _ = io.Copy(struct{ io.Writer }{c}, c) }

// namedServer sends its name to every client and closes.
func namedServer(t testing.TB, name string) *server {
	t.Helper()
	return startServer(t, func(c *net.TCPConn) { _, _ = io.WriteString(c, name) })
}

// dialClient connects to the balancer.
func dialClient(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, hangTimeout)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c.(*net.TCPConn)
}

// listens reports whether someone accepts connections.
func listens(address string) bool {
	c, err := net.Dial("tcp", address)
	closeConn(c)
	return err == nil
}

// ask connects and returns all that the backend says.
func ask(address string) (string, error) {
	c, err := net.DialTimeout("tcp", address, hangTimeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(hangTimeout))
	b, err := io.ReadAll(c)
	return string(b), err
}

// echoed connects, sends n bytes, gets them back, and ends the connection.
func echoed(t testing.TB, lb string, n int) {
	t.Helper()
	c := dialClient(t, lb)
	defer c.Close()
	write(t, c, strings.Repeat("x", n))
	require.NoError(t, c.CloseWrite())
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Len(t, b, n)
}

// hold opens a connection that lasts.
func hold(t testing.TB, lb string) *net.TCPConn {
	t.Helper()
	c := dialClient(t, lb)
	write(t, c, "x")
	expect(t, c, "x")
	return c
}

// refused connects and is turned away.
func refused(t testing.TB, lb string) {
	t.Helper()
	c := dialClient(t, lb)
	defer c.Close()
	_, err := c.Read(make([]byte, 1))
	require.Error(t, err)
}

// eventually waits for cond, as long as a hang would take to notice.
func eventually(t testing.TB, cond func() bool, what string, args ...any) {
	t.Helper()
	deadline := time.Now().Add(hangTimeout)
	for !cond() {
		if time.Now().After(deadline) {
			require.FailNow(t, "never happened: "+fmt.Sprintf(what, args...))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// metric returns the value of one series of the running config's collector, or
// the sum of all series that have the labels; a histogram counts its
// observations.
func metric(t testing.TB, name string, labels map[string]string) float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	require.NoError(t, r.Register(collector{}))
	families, err := r.Gather()
	require.NoError(t, err)
	sum := 0.0
	for _, f := range families {
		if f.GetName() != "tcp_lb_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			if hasLabels(m, labels) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func hasLabels(m *dto.Metric, want map[string]string) bool {
	for k, v := range want {
		if labelValue(m, k) != v {
			return false
		}
	}
	return true
}

// labels makes a map of pairs.
func labels(pairs ...string) map[string]string {
	m := make(map[string]string)
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}

// backendStatuses is what GET /tcp_lb/backends answers.
func backendStatuses(t testing.TB) map[string]backendStatus {
	t.Helper()
	w := httptest.NewRecorder()
	require.NoError(t, serveBackends(w, httptest.NewRequest(http.MethodGet, "/tcp_lb/backends", nil)))
	var list []backendStatus
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &list))
	byAddress := make(map[string]backendStatus, len(list))
	for _, s := range list {
		byAddress[s.Address] = s
	}
	return maps.Clone(byAddress)
}

// checked waits until every backend of the pool had its first check.
func checked(t testing.TB) {
	t.Helper()
	eventually(t, func() bool {
		all := backendStatuses(t)
		for _, s := range all {
			if s.LastCheck == nil {
				return false
			}
		}
		return len(all) > 0
	}, "a first check of every backend")
}
