package tcplb

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/require"
)

// duoServer tells its name to a client that begins with "n", and sends back
// everything to one that begins with "s".
func duoServer(t testing.TB, name string) *server {
	t.Helper()
	return startServer(t, func(c *net.TCPConn) { serveDuo(c, name) })
}

func serveDuo(c *net.TCPConn, name string) {
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		return
	}
	switch first[0] {
	case 'n':
		_, _ = io.WriteString(c, name)
	case 's':
		echo(c)
	}
}

// findings are what goroutines of a test found wrong; the first few are kept.
type findings struct {
	mu   sync.Mutex
	list []string
}

func (f *findings) add(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.list) < 10 {
		f.list = append(f.list, fmt.Sprintf(format, args...))
	}
}

func (f *findings) none() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.list) == 0
}

func (f *findings) require(t testing.TB) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	require.Empty(t, f.list)
}

// load is traffic over a balancer of duoServers: short connections as fast as
// they go, and streams that last. Nothing of it may fail.
type load struct {
	findings
	lb      string
	stop    chan struct{}
	wg      sync.WaitGroup
	streams sync.WaitGroup // that have yet to get their first bytes back
	short   atomic.Int64   // connections done
	bytes   atomic.Uint64  // both kinds sent, first bytes included
}

func startLoad(lb string, workers, streams int) *load {
	l := &load{lb: lb, stop: make(chan struct{})}
	l.streams.Add(streams)
	for i := range streams {
		l.wg.Go(func() { l.stream(byte(i)) })
	}
	l.streams.Wait()
	for range workers {
		l.wg.Go(l.connectOften)
	}
	return l
}

// finish ends the traffic and checks that all went well.
func (l *load) finish(t testing.TB) {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	l.require(t)
}

func (l *load) connectOften() {
	for !isClosed(l.stop) {
		name, err := tellName(l.lb)
		if err != nil || name == "" {
			l.add("short connection %d: %q, %v", l.short.Load(), name, err)
		}
		l.bytes.Add(1)
		l.short.Add(1)
	}
}

// tellName asks a duoServer for its name.
func tellName(lb string) (string, error) {
	c, err := net.DialTimeout("tcp", lb, hangTimeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(hangTimeout))
	if _, err := io.WriteString(c, "n"); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// stream sends a pattern until the load is stopped, compares what comes back
// and ends in order.
func (l *load) stream(seed byte) {
	begun := sync.OnceFunc(l.streams.Done)
	defer begun()
	if err := l.streamOnce(seed, begun); err != nil {
		l.add("stream %d: %v", seed, err)
	}
}

func (l *load) streamOnce(seed byte, begun func()) error {
	conn, err := net.DialTimeout("tcp", l.lb, hangTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "s"); err != nil {
		return err
	}
	l.bytes.Add(1)
	sent, back := &hashing{}, &hashing{}
	source, buf := &pattern{seed: seed}, make([]byte, 2<<10)
	for !isClosed(l.stop) {
		_ = conn.SetDeadline(time.Now().Add(hangTimeout))
		_, _ = source.Read(buf)
		_, _ = sent.Write(buf)
		if _, err := conn.Write(buf); err != nil {
			return fmt.Errorf("after %d bytes: %w", source.at, err)
		}
		l.bytes.Add(uint64(len(buf)))
		if _, err := io.CopyN(back, conn, int64(len(buf))); err != nil {
			return fmt.Errorf("after %d bytes: %w", source.at, err)
		}
		begun()
		pause(20*time.Millisecond, l.stop)
	}
	_ = conn.(*net.TCPConn).CloseWrite()
	rest, err := io.Copy(back, conn)
	if err != nil || rest != 0 || sent.sum != back.sum {
		return fmt.Errorf("ends with %d bytes more, sums %x and %x, %v", rest, sent.sum, back.sum, err)
	}
	return nil
}

// bookkeeper scrapes over and over, and checks at each scrape that counters
// only grow, that the books balance, and that no series goes away: not even one
// of a backend that leaves the config, if it comes back soon.
type bookkeeper struct {
	findings
	stop    chan struct{}
	done    chan struct{}
	last    map[string]float64
	scrapes atomic.Int64
}

func startBookkeeper() *bookkeeper {
	k := &bookkeeper{
		stop: make(chan struct{}), done: make(chan struct{}), last: make(map[string]float64),
	}
	go k.run()
	return k
}

func (k *bookkeeper) run() {
	defer close(k.done)
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(collector{})
	for !isClosed(k.stop) {
		families, err := r.Gather()
		if err != nil {
			k.add("scrape: %v", err)
		}
		k.check(families)
		k.scrapes.Add(1)
		pause(5*time.Millisecond, k.stop)
	}
}

func (k *bookkeeper) check(families []*dto.MetricFamily) {
	now := make(map[string]float64)
	books := make(map[string]float64) // opened less closed less active, by pool and backend
	for _, f := range families {
		for _, m := range f.GetMetric() {
			backend := labelValue(m, "backend")
			series := f.GetName() + fmt.Sprint(m.GetLabel())
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				now[series] = m.GetCounter().GetValue()
			case dto.MetricType_HISTOGRAM:
				now[series] = float64(m.GetHistogram().GetSampleCount())
			}
			if m.GetGauge().GetValue() < 0 {
				k.add("%s is %v", series, m.GetGauge().GetValue())
			}
			if backend == "" {
				continue
			}
			backend = labelValue(m, "lb") + " " + backend
			switch f.GetName() {
			case "tcp_lb_connections_total":
				books[backend] += now[series]
			case "tcp_lb_connections_closed_total":
				books[backend] -= now[series]
			case "tcp_lb_connections_active":
				books[backend] -= m.GetGauge().GetValue()
			}
		}
	}
	for backend, rest := range books {
		if rest != 0 {
			k.add("%s: %v connections too many opened", backend, rest)
		}
	}
	for series, was := range k.last {
		if is, ok := now[series]; !ok || is < was {
			k.add("%s went from %v to %v, there: %v", series, was, is, ok)
		}
	}
	k.last = now
}

func (k *bookkeeper) finish(t testing.TB) {
	t.Helper()
	close(k.stop)
	<-k.done
	k.require(t)
}

// variedConfig is a config over the backends: the round says which of them and
// with what weights. Two rounds in a row have most in common.
func variedConfig(listen string, round int, backends []*server) string {
	var list []string
	for i, s := range backends {
		if len(backends) > 1 && i == round%len(backends) {
			continue // left out this time
		}
		list = append(list, fmt.Sprintf(`{"address":%q,"weight":%d}`, s.address, 1+(i+round)%3))
	}
	return lbConfig(listen, fmt.Sprintf(`"drain_timeout":"1h","dial_timeout":"%ds","backends":[%s]}`, 3+round%5, strings.Join(list, ",")))
}

const streamsUnderLoad = 100

func TestReloadUnderLoad(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	var backends []*server
	for i := range 5 {
		backends = append(backends, duoServer(t, fmt.Sprint("backend ", i)))
	}
	lb := freeAddress(t)
	all := lbConfig("tcp_lb/"+lb, fmt.Sprintf(`"drain_timeout":"1h",%s}`, backendsOf(backends)))
	runCaddy(t, all)
	checked(t)
	l := startLoad(lb, 16, streamsUnderLoad)
	k := startBookkeeper()
	for round := range 20 {
		done := l.short.Load()
		reload(t, variedConfig("tcp_lb/"+lb, round, backends))
		require.GreaterOrEqual(t, metric(t, "connections_active", nil), float64(streamsUnderLoad))
		eventually(t, func() bool { return l.short.Load() > done+300 }, "load between reloads")
	}
	reload(t, all)
	k.finish(t)
	require.EqualValues(t, len(backends), len(backendStatuses(t)), "streams kept every backend's books open")
	l.finish(t)
	requireBooksBalance(t, int(l.short.Load())+streamsUnderLoad)
	require.EqualValues(t, l.bytes.Load(), metric(t, "received_bytes_total", nil))
	t.Logf("%d short connections, %d scrapes, %d MB", l.short.Load(), k.scrapes.Load(), l.bytes.Load()>>20)

	// The rotation goes on, too.
	var order string
	for round := range 3 * len(backends) {
		if round%4 == 3 {
			reload(t, strings.Replace(all, `"1h"`, fmt.Sprintf(`"%dm"`, 60+round), 1))
		}
		name, err := tellName(lb)
		require.NoError(t, err)
		order += name[len(name)-1:]
	}
	require.Contains(t, strings.Repeat("01234", 4), order)
}

func backendsOf(servers []*server) string {
	var list []string
	for _, s := range servers {
		list = append(list, s.address)
	}
	return backendsJSON(list...)
}

func TestFailedLoadUnderLoad(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	a, b := duoServer(t, "a"), duoServer(t, "b")
	never := duoServer(t, "never")
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := func(options string, backends ...*server) string {
		return adminConfig(admin, web, "tcp_lb/"+lb, `"name":"web",`+options+backendsOf(backends)+"}")
	}
	running := config(`"max_connections":500,`, a, b)
	runWithAdmin(t, running)
	checked(t)
	l := startLoad(lb, 8, streamsUnderLoad)
	k := startBookkeeper()
	bad := map[string]string{
		"garbage":                     `{"apps":{"layer4":{`,
		"an option":                   config(`"max_connections":-1,`, never),
		"a module":                    config(`"load_balancing":{"selection_policy":{"policy":"nonesuch"}},`, never),
		"the start of another app":    watchStart(config(`"max_connections":1,"drain_timeout":"0s",`, never)),
		"the listener of another app": strings.Replace(config(`"max_connections":1,`, never), `"servers":{"web":`, `"servers":{"x":{"listen":["unix//nonexistent/socket"]},"web":`, 1),
	}
	seenAtStart.fail.Store(true)
	t.Cleanup(func() { seenAtStart.fail.Store(false); seenAtStart.pools.Store(0) })
	for range 4 { // apps start in a different order each time
		for name, config := range bad {
			done := l.short.Load()
			status, body := request(t, http.MethodPost, "http://"+admin+"/load", config)
			require.GreaterOrEqual(t, status, 400, name)
			require.Contains(t, body, "error", name)
			status, body = request(t, http.MethodGet, "http://"+admin+"/metrics", "")
			require.Equal(t, 200, status)
			require.Contains(t, body, fmt.Sprintf(`tcp_lb_backend_healthy{backend=%q,lb="web"} 1`, a.address), name)
			require.NotContains(t, body, never.address, name)
			eventually(t, func() bool { return l.short.Load() > done+20 }, "load goes on")
		}
	}
	g := registry.newest("web")
	require.EqualValues(t, 500, g.limit)
	require.Len(t, g.members(), 2)
	require.Zero(t, never.acceptedCount(), "nobody connected to a backend of a failed config")
	k.finish(t)
	l.finish(t)
	requireBooksBalance(t, int(l.short.Load())+streamsUnderLoad)
	require.EqualValues(t, l.bytes.Load(), metric(t, "received_bytes_total", nil))
}
