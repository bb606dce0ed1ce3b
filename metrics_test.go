package tcplb

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
)

// labelValue returns the value of the metric's label, "" if it has none.
func labelValue(m *dto.Metric, name string) string {
	for _, l := range m.GetLabel() {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

func readFile(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(b)
}

// exposition is what a scrape of the collector alone returns.
func exposition(t testing.TB) string {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(gathererOf(collector{}), promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, w.Code)
	return w.Body.String()
}

// The reference in docs/metrics.md names every metric, with its type and labels,
// and every reason.
func TestMetricsReference(t *testing.T) {
	lb := freeAddress(t)
	find()
	runCaddy(t, lbConfig("tcp_lb/"+lb, backendsJSON(namedServer(t, "a").address)+`,"dynamic_backends":[{"source":"tcp_lb_test"}],"health_checks":{"passive":{"fail_duration":"10s"}}}`))
	_, err := ask(lb)
	require.NoError(t, err)
	requireBooksBalance(t, 1)
	families, err := gathererOf(collector{}).Gather()
	require.NoError(t, err)
	want := len(allDescriptions)
	if runtime.GOOS != "linux" {
		want-- // there tcp_lb listeners are Caddy's, and have no books
	}
	require.Len(t, families, want)

	text, documented := readFile(t, "docs/metrics.md"), make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `(tcp_lb_[a-z_]+)` \\| (.*)$").FindAllStringSubmatch(text, -1) {
		require.NotContains(t, documented, row[1], "documented twice")
		documented[row[1]] = row[2]
	}
	for _, f := range families {
		row := documented[f.GetName()]
		require.NotEmpty(t, row, "%s is not documented", f.GetName())
		require.True(t, strings.HasPrefix(row, strings.ToLower(f.GetType().String())+" |"), "%s: %s", f.GetName(), row)
		for _, l := range f.GetMetric()[0].GetLabel() {
			require.Contains(t, strings.Split(row, "|")[1], "`"+l.GetName()+"`", f.GetName())
		}
		delete(documented, f.GetName())
	}
	require.Empty(t, documented, "documented, but not there")
	for _, name := range reasonNames[1:] {
		require.Contains(t, text, "\n| `"+name+"` |")
	}
}

func TestPoolConnectionsAndLimit(t *testing.T) {
	a := echoServer(t)
	lb := freeAddress(t)
	config := func(limit string) string {
		return lbConfig(lb, `"name":"web","max_connections":`+limit+`,`+backendsJSON(a.address)+"}")
	}
	runCaddy(t, config("3"))
	web := labels("lb", "web")
	require.EqualValues(t, 3, metric(t, "pool_max_connections", web))
	require.Zero(t, metric(t, "pool_connections", web))
	require.EqualValues(t, files.Process.Limit(), metric(t, "max_open_files", nil))
	free := metric(t, "open_files", nil)

	first, second := dialClient(t, lb), dialClient(t, lb)
	for _, c := range []*net.TCPConn{first, second} {
		write(t, c, "x")
		expect(t, c, "x")
	}
	require.EqualValues(t, 2, metric(t, "pool_connections", web))
	require.EqualValues(t, free+2*files.PerConnection, metric(t, "open_files", nil))

	reload(t, config("0"))
	require.EqualValues(t, files.Process.Limit()/files.PerConnection, metric(t, "pool_max_connections", web), "what the files allow")
	require.EqualValues(t, 2, metric(t, "pool_connections", web), "over the reload")
	reload(t, config("2000000000"))
	require.LessOrEqual(t, metric(t, "pool_max_connections", web), float64(files.Process.Limit()), "the process's bound always holds")

	require.NoError(t, first.Close())
	require.NoError(t, second.Close())
	eventually(t, func() bool { return metric(t, "pool_connections", web) == 0 && metric(t, "open_files", nil) == free }, "both are given back")
}

func TestLastTransition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList("a:1") })
		g.start()
		defer g.stop()
		at := func() time.Time {
			return time.Unix(0, int64(metric(t, "health_last_transition_timestamp_seconds", labels("backend", "a:1"))*1e9))
		}
		synctest.Wait()
		time.Sleep(time.Minute)
		require.Zero(t, at().UnixNano(), "none yet")
		f.fail("a:1", errRefused)
		began := time.Now()
		time.Sleep(time.Minute)
		require.WithinRange(t, at(), began, began.Add(20*time.Second))
		down := at()
		f.fail("a:1", nil)
		began = time.Now()
		time.Sleep(time.Minute)
		require.WithinRange(t, at(), began, began.Add(20*time.Second))
		require.NotEqual(t, down, at())
	})
}

// The bytes that are counted are those that clients sent and got, to the last.
func TestBytesAddUp(t *testing.T) {
	s := echoServer(t)
	lb := startLB(t, "", s.address)
	const clients = 20
	var sent, got [clients]int
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			c, err := net.Dial("tcp", lb)
			if err != nil {
				return
			}
			defer c.Close()
			payload := make([]byte, 1+i*7919) // up to 150 KB, from one read to many
			done := make(chan struct{})
			go func() {
				defer close(done)
				sent[i], _ = c.Write(payload)
				_ = c.(*net.TCPConn).CloseWrite()
			}()
			n, _ := io.Copy(io.Discard, c)
			got[i] = int(n)
			<-done
		})
	}
	wg.Wait()
	requireBooksBalance(t, clients)
	sum := func(list [clients]int) (n int) {
		for _, each := range list {
			n += each
		}
		return n
	}
	require.EqualValues(t, clients+7919*clients*(clients-1)/2, sum(sent))
	require.EqualValues(t, sum(sent), metric(t, "received_bytes_total", labels("backend", s.address)))
	require.EqualValues(t, sum(got), metric(t, "sent_bytes_total", labels("backend", s.address)))
}

// What a removed backend is goes with its last connection, what it did a while
// later. The others' series stay.
func TestSeriesOfARemovedBackend(t *testing.T) {
	a, b := echoServer(t), echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, backendsJSON(a.address, b.address)+"}"))
	conns := []*net.TCPConn{dialClient(t, lb), dialClient(t, lb)}
	for _, c := range conns {
		write(t, c, "x")
		expect(t, c, "x")
	}
	reload(t, lbConfig(lb, backendsJSON(a.address)+"}"))
	require.Contains(t, exposition(t), b.address, "it still has a connection")
	require.Zero(t, metric(t, "backend_weight", labels("backend", b.address)))
	for _, c := range conns {
		require.NoError(t, c.Close())
	}
	weight := fmt.Sprintf("tcp_lb_backend_weight{backend=%q", b.address)
	eventually(t, func() bool { return !strings.Contains(exposition(t), weight) }, "it is gone")
	require.Contains(t, exposition(t), fmt.Sprintf(`tcp_lb_connections_closed_total{backend=%q,lb="tcp_lb",reason="client_closed"} 1`, b.address))
	forgetDeparted()
	require.NotContains(t, exposition(t), b.address, "no series of it is left")
	require.Contains(t, exposition(t), fmt.Sprintf(`tcp_lb_connections_total{backend=%q,lb="tcp_lb"} 1`, a.address))
}

// What connections took is counted for the backend and for its pool, and what
// the pool counts does not shrink when a backend leaves.
func TestPoolDurations(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, backendsJSON(a.address, b.address)+"}"))
	for range 4 {
		_, err := ask(lb)
		require.NoError(t, err)
	}
	requireBooksBalance(t, 4)
	for _, name := range []string{"connection_duration_seconds", "dial_duration_seconds"} {
		require.EqualValues(t, 2, metric(t, name, labels("backend", a.address)), name)
		require.EqualValues(t, 4, metric(t, "pool_"+name, labels("lb", "tcp_lb")), name)
	}
	eventually(t, func() bool {
		checks := metric(t, "health_check_duration_seconds", nil)
		return checks >= 2 && metric(t, "pool_health_check_duration_seconds", nil) == checks
	}, "checks, too")
	reload(t, lbConfig(lb, backendsJSON(b.address)+"}"))
	eventually(t, func() bool { return metric(t, "backend_weight", labels("backend", a.address)) == 0 }, "it left")
	forgetDeparted()
	require.NotContains(t, exposition(t), a.address)
	require.EqualValues(t, 4, metric(t, "pool_connection_duration_seconds", nil))
	require.EqualValues(t, 4, metric(t, "pool_dial_duration_seconds", nil))
}

// A thousand backends are to be scraped every few seconds: half of the 6.9 MB
// that they once were is the most.
func TestScrapeIsSmall(t *testing.T) {
	const backends, most = 1000, 3450
	none := len(exposition(t))
	fillPool(t, backends)
	text := exposition(t)
	require.Equal(t, backends, strings.Count(text, "\ntcp_lb_backend_healthy{"))
	require.Less(t, (len(text)-none)/backends, most, "bytes for each backend")
	if raceDetector {
		return // it allocates, too
	}
	metrics := make(chan prometheus.Metric, 100*backends)
	allocations := testing.AllocsPerRun(5, func() {
		collector{}.Collect(metrics)
		for len(metrics) > 0 {
			<-metrics
		}
	})
	require.Less(t, allocations/backends, 10.0, "allocations for each backend")
}

// BenchmarkScrape is one scrape of a pool of backends, as text.
func BenchmarkScrape(b *testing.B) {
	for _, backends := range []int{10, 1000} {
		b.Run(fmt.Sprintf("backends=%d", backends), func(b *testing.B) {
			fillPool(b, backends)
			r := prometheus.NewRegistry()
			r.MustRegister(collector{})
			scrape := promhttp.HandlerFor(r, promhttp.HandlerOpts{DisableCompression: true})
			request := httptest.NewRequest(http.MethodGet, "/metrics", nil)
			var out countingWriter
			b.ReportAllocs()
			for b.Loop() {
				out = countingWriter{header: make(http.Header)}
				scrape.ServeHTTP(&out, request)
			}
			b.ReportMetric(float64(out.n), "bytes/scrape")
		})
	}
}

// fillPool adds a pool with backends that nothing checks.
func fillPool(t testing.TB, backends int) {
	t.Helper()
	registry.mu.Lock()
	defer registry.mu.Unlock()
	p := registry.poolLocked("bench")
	for i := range backends {
		address := fmt.Sprintf("10.0.%d.%d:3001", i/256, i%256)
		p.backends[address] = newBackend(p, address, target{})
	}
	t.Cleanup(func() {
		registry.mu.Lock()
		defer registry.mu.Unlock()
		delete(registry.pools, "bench")
	})
}

// countingWriter is a response that is only counted.
type countingWriter struct {
	header http.Header
	n      int
}

func (w *countingWriter) Header() http.Header         { return w.header }
func (w *countingWriter) WriteHeader(int)             {}
func (w *countingWriter) Write(p []byte) (int, error) { w.n += len(p); return len(p), nil }
