package tcplb

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

// adminConfig has the admin endpoint on, and the HTTP endpoints of the examples.
func adminConfig(admin, web, lb, handler string) string {
	return fmt.Sprintf(`{"admin":{"listen":%q,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"PANIC"}}},
		"apps":{"layer4":{"servers":{"srv":{"listen":[%q],"routes":[{"handle":[%s]}]}}},
		"http":{"servers":{"web":{"listen":[%q],"protocols":["h1"],"automatic_https":{"disable":true},"routes":[
			{"match":[{"path":["/metrics"]}],"handle":[{"handler":"metrics"}]},
			{"match":[{"path":["/health"]}],"handle":[{"handler":"tcp_lb_health"}]}]}}}}}`,
		admin, lb, withHandler(handler), web)
}

// runWithAdmin runs the config, and takes the admin endpoint away at the end.
func runWithAdmin(t *testing.T, config string) {
	t.Helper()
	noPoolsYet(t)
	require.NoError(t, caddy.Load([]byte(config), true))
	t.Cleanup(func() {
		require.NoError(t, caddy.Load([]byte(`{"admin":{"disabled":true,"config":{"persist":false}}}`), true))
		require.NoError(t, caddy.Stop())
	})
}

// request returns status and body.
func request(t testing.TB, method, url, body string) (int, string) {
	t.Helper()
	resp, err := send(method, url, body)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(b)
}

// send sends a request, again where it was not read or the connection reset: Caddy's
// admin endpoint does that to one that comes just when the next config's takes its place.
func send(method, url, body string) (*http.Response, error) {
	client := &http.Client{Timeout: hangTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	for tries := 1; ; tries++ {
		r, err := http.NewRequest(method, url, strings.NewReader(body))
		if err != nil {
			return nil, err
		}
		r.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(r)
		if tries == 3 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			return resp, err
		}
	}
}

func TestAdminAPI(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	runWithAdmin(t, adminConfig(admin, web, lb, fmt.Sprintf(`"name":"web","backends":[{"address":%q,"weight":1},{"address":%q,"weight":1}]}`, a.address, b.address)))
	weights := "http://" + admin + "/config/apps/layer4/servers/srv/routes/0/handle/0/backends/0/weight"

	status, body := request(t, http.MethodPatch, weights, "3")
	require.Equal(t, 200, status, body)
	got := ""
	for range 4 {
		name, err := ask(lb)
		require.NoError(t, err)
		got += name
	}
	require.Equal(t, 3, strings.Count(got, "a"), got)

	status, body = request(t, http.MethodPatch, weights, "257")
	require.GreaterOrEqual(t, status, 400)
	require.Contains(t, body, "weight 257: want a number from 0 to 256")

	status, body = request(t, http.MethodGet, "http://"+admin+"/tcp_lb/backends", "")
	require.Equal(t, 200, status)
	var list []map[string]any
	require.NoError(t, json.Unmarshal([]byte(body), &list))
	require.Len(t, list, 2)
	require.Subset(t, keys(list[0]), []string{"lb", "address", "weight", "healthy", "active", "connections_total",
		"errors_total", "received_bytes", "sent_bytes", "last_check", "last_error"})
	for _, each := range list {
		require.Equal(t, "web", each["lb"])
		if each["address"] == a.address {
			require.EqualValues(t, 3, each["weight"])
			require.EqualValues(t, 3, each["connections_total"])
		}
	}
	status, _ = request(t, http.MethodPost, "http://"+admin+"/tcp_lb/backends", "")
	require.Equal(t, 405, status)

	// The metrics are on the admin endpoint and on the metrics handler, and still
	// there after the failed load above.
	for _, url := range []string{"http://" + admin + "/metrics", "http://" + web + "/metrics"} {
		status, body = request(t, http.MethodGet, url, "")
		require.Equal(t, 200, status, body)
		require.Contains(t, body, fmt.Sprintf(`tcp_lb_connections_total{backend=%q,lb="web"} 3`, a.address), url)
		require.Contains(t, body, fmt.Sprintf(`tcp_lb_backend_weight{backend=%q,lb="web"} 3`, a.address), url)
	}
}

func keys(m map[string]any) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	return list
}

func TestHealthEndpoint(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	runWithAdmin(t, adminConfig(admin, web, lb, `"name":"web",`+fastChecks+","+backendsJSON(a.address, b.address)+"}"))
	url := "http://" + web + "/health"
	is := func(wantStatus int, wantBody string) bool {
		status, body := request(t, http.MethodGet, url, "")
		return status == wantStatus && strings.TrimSpace(body) == wantBody
	}
	eventually(t, func() bool {
		return is(200, `{"status":"ok","pools":[{"name":"web","available":2,"total":2}]}`)
	}, "both checked")
	a.kill()
	eventually(t, func() bool {
		return is(200, `{"status":"degraded","pools":[{"name":"web","available":1,"total":2}]}`)
	}, "degraded")
	b.kill()
	eventually(t, func() bool {
		return is(503, `{"status":"unavailable","pools":[{"name":"web","available":0,"total":2}]}`)
	}, "unavailable")
	a.start()
	eventually(t, func() bool {
		return is(200, `{"status":"degraded","pools":[{"name":"web","available":1,"total":2}]}`)
	}, "serving again")
}

func TestAccessLog(t *testing.T) {
	s := namedServer(t, "hello")
	dead := freeAddress(t)
	lb := freeAddress(t)
	file := filepath.Join(t.TempDir(), "access.log")
	config := lbConfig(lb, `"name":"web","access_log":true,"health_checks":{"active":{"disabled":true}},`+backendsJSON(dead, s.address)+"}")
	config = strings.Replace(config, `"default":{"level":"ERROR"}`, fmt.Sprintf(
		`"default":{"level":"ERROR"},"access":{"include":["layer4.handlers.tcp_lb.access"],"writer":{"output":"file","filename":%q}}`, file), 1)
	runCaddy(t, config)
	c := dialClient(t, lb)
	client := c.LocalAddr().String()
	expect(t, c, "hello")
	expectEOF(t, c)
	require.NoError(t, c.Close())
	requireBooksBalance(t, 1)

	var line map[string]any
	eventually(t, func() bool {
		b, _ := os.ReadFile(file)
		return strings.HasSuffix(string(b), "\n") && json.Unmarshal(b, &line) == nil
	}, "one line")
	for key, want := range map[string]any{
		"level": "info", "logger": "layer4.handlers.tcp_lb.access.web", "lb": "web", "client": client, "backend": s.address,
		"attempts": 2.0, "received_bytes": 0.0, "sent_bytes": 5.0, "reason": "backend_closed",
	} {
		require.Equal(t, want, line[key], key)
	}
	require.Positive(t, line["duration"])
	require.Positive(t, line["dial_time"])
}

// A client that is turned away at the limit has its line, with its address.
func TestAccessLogOfRefusedClients(t *testing.T) {
	s := echoServer(t)
	lb := freeAddress(t)
	file := filepath.Join(t.TempDir(), "access.log")
	config := lbConfig(lb, `"name":"web","access_log":true,"max_connections":1,`+backendsJSON(s.address)+"}")
	config = strings.Replace(config, `"default":{"level":"ERROR"}`, fmt.Sprintf(
		`"default":{"level":"ERROR"},"access":{"include":["layer4.handlers.tcp_lb.access"],"writer":{"output":"file","filename":%q}}`, file), 1)
	runCaddy(t, config)
	first := dialClient(t, lb)
	write(t, first, "x")
	expect(t, first, "x")
	refused := dialClient(t, lb)
	_, err := io.ReadAll(refused)
	require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err)
	var line map[string]any
	eventually(t, func() bool {
		b, _ := os.ReadFile(file)
		return strings.HasSuffix(string(b), "\n") && json.Unmarshal(b, &line) == nil
	}, "one line")
	require.Equal(t, "max_connections", line["reason"])
	require.Equal(t, refused.LocalAddr().String(), line["client"])
	require.NotContains(t, line, "clientError")
}

// eventRecorder is an event handler module that keeps what it sees.
type eventRecorder struct{}

var recordedEvents struct {
	sync.Mutex
	list []string
}

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.tcp_lb_test", New: func() caddy.Module { return new(eventRecorder) }}
}

func (eventRecorder) Handle(_ context.Context, e caddy.Event) error {
	recordedEvents.Lock()
	defer recordedEvents.Unlock()
	recordedEvents.list = append(recordedEvents.list, fmt.Sprintf("%s %s %v", e.Name(), e.Data["lb"], e.Data["backend"]))
	return nil
}

func init() { caddy.RegisterModule(eventRecorder{}) }

func TestEvents(t *testing.T) {
	s := namedServer(t, "a")
	config := lbConfig(freeAddress(t), fastChecks+","+backendsJSON(s.address)+"}")
	runCaddy(t, strings.Replace(config, `"apps":{`,
		`"apps":{"events":{"subscriptions":[{"modules":["layer4.handlers.tcp_lb"],"handlers":[{"handler":"tcp_lb_test"}]}]},`, 1))
	checked(t)
	seen := func(n int) func() bool {
		return func() bool {
			recordedEvents.Lock()
			defer recordedEvents.Unlock()
			return len(recordedEvents.list) == n
		}
	}
	s.kill()
	eventually(t, seen(1), "one event")
	s.start()
	eventually(t, seen(2), "another")
	require.Equal(t, []string{"unhealthy tcp_lb " + s.address, "healthy tcp_lb " + s.address}, recordedEvents.list)
}

func TestCollectorIsSound(t *testing.T) {
	s := namedServer(t, "a")
	lb := startLB(t, "", s.address)
	_, err := ask(lb)
	require.NoError(t, err)
	requireBooksBalance(t, 1)
	problems, err := testutil.GatherAndLint(gathererOf(collector{}))
	require.NoError(t, err)
	require.Empty(t, problems)
}

func gathererOf(c prometheus.Collector) prometheus.Gatherer {
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(c)
	return r
}

// At every moment what was opened is what was closed and what is active.
func TestBooksBalanceAtEveryScrape(t *testing.T) {
	s := namedServer(t, "a")
	lb := startLB(t, "", s.address)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_, _ = ask(lb)
				}
			}
		})
	}
	last := 0.0
	for range 100 {
		families, err := gathererOf(collector{}).Gather()
		require.NoError(t, err)
		var opened, active, closed float64
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if !hasLabels(m, labels("backend", s.address)) {
					continue
				}
				switch f.GetName() {
				case "tcp_lb_connections_total":
					opened += m.GetCounter().GetValue()
				case "tcp_lb_connections_active":
					active += m.GetGauge().GetValue()
				case "tcp_lb_connections_closed_total":
					closed += m.GetCounter().GetValue()
				}
			}
		}
		require.Equal(t, opened, active+closed)
		require.GreaterOrEqual(t, active, 0.0)
		require.GreaterOrEqual(t, opened, last)
		last = opened
	}
	close(stop)
	wg.Wait()
}

func closeConn(c net.Conn) {
	if c != nil {
		_ = c.Close()
	}
}

// scanJSON sends every line to found until the stream ends.
func scanJSON(r io.Reader, found func(string)) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		found(lines.Text())
	}
}
