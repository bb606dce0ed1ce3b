package tcplb

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// A removal is drained by the config that brings it: in both directions the
// timeout of the config before does not count.
func TestDrainTimeoutOfTheNewConfigHolds(t *testing.T) {
	watchLeftovers(t)
	a, b, lb := echoServer(t), echoServer(t), freeAddress(t)
	config := func(drain string, addresses ...string) string {
		return lbConfig("tcp_lb/"+lb, fmt.Sprintf(`"drain_timeout":%q,%s}`, drain, backendsJSON(addresses...)))
	}
	runCaddy(t, config("0s", a.address, b.address))
	first, second := hold(t, lb), hold(t, lb)
	reload(t, config("1h", a.address)) // b would be cut at once otherwise
	write(t, second, "still here")
	expect(t, second, "still here")
	reload(t, config("0s", b.address)) // and this would go on for an hour
	expectReset(t, first)
	write(t, second, "y")
	expect(t, second, "y")
}

// A client that comes just as its backend leaves the config does not take the
// drain timeout from those that are there.
func TestDrainBeginsInOneStep(t *testing.T) {
	f := newFakeNet()
	run := func() *generation {
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			h.DrainTimeout = new(caddy.Duration(time.Hour))
			checksOff(h)
		})
		return g
	}
	g := run()
	g.start()
	b := g.members()[0].Backend
	require.Equal(t, wasTaken, b.take())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for !isClosed(stop) {
				s := &session{link: link{backend: b}}
				_ = b.enter(s)
				b.leave(s, reasonClientClosed, 0)
			}
		})
	}
	for range 2000 {
		g.stop()
		b.mu.Lock()
		end, cut := b.drainEnd, b.cutAt
		b.mu.Unlock()
		if g = run(); cut || time.Until(end) < time.Minute {
			break
		}
		g.start()
		require.Same(t, b, g.members()[0].Backend)
	}
	close(stop)
	wg.Wait()
	require.True(t, isClosed(g.started), "never cut, and an hour to go")
	b.release()
	g.stop()
}

// What a removal did to connections is in the log, and to be scraped afterwards.
func TestDrainingLeavesTraces(t *testing.T) {
	a, b := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := func(drain string, addresses ...string) string {
		return strings.Replace(adminConfig(admin, web, "tcp_lb/"+lb, fmt.Sprintf(`"name":"web","drain_timeout":%q,%s}`,
			drain, backendsJSON(addresses...))), `"PANIC"`, `"INFO"`, 1)
	}
	c := startChild(t, config("1h", a.address, b.address))
	eventually(t, func() bool { return listens(lb) }, "listening")
	load := func(config string) {
		status, body := request(t, http.MethodPost, "http://"+admin+"/load", config)
		require.Equal(t, 200, status, body)
	}
	for range 5 {
		hold(t, lb)
	}
	active := func(backend string) float64 {
		return scrape(t, admin, fmt.Sprintf(`tcp_lb_connections_active{backend=%q,lb="web"}`, backend))
	}
	eventually(t, func() bool { return active(a.address)+active(b.address) == 5 }, "open")
	onB := active(b.address)

	load(config("1h", a.address))
	line := c.line(t, "backend left the config, draining")
	require.Equal(t, b.address, line["backend"])
	require.EqualValues(t, onB, line["connections"])
	require.NotEmpty(t, line["until"])
	load(config("1h", a.address, b.address))
	require.EqualValues(t, onB, c.line(t, "backend is back in the config")["connections"])

	load(config("0s", a.address))
	line = c.line(t, "backend is drained")
	require.Equal(t, b.address, line["backend"])
	require.EqualValues(t, onB, line["connections"])
	require.EqualValues(t, onB, line["cut_by_drain_timeout"])
	status, metrics := request(t, http.MethodGet, "http://"+admin+"/metrics", "")
	require.Equal(t, 200, status)
	require.Contains(t, metrics, fmt.Sprintf(`tcp_lb_connections_closed_total{backend=%q,lb="web",reason="drain_timeout"} %v`, b.address, onB))
	require.Contains(t, metrics, fmt.Sprintf(`tcp_lb_connections_active{backend=%q,lb="web"} 0`, b.address), "the books balance")
	require.NotContains(t, metrics, fmt.Sprintf(`tcp_lb_backend_healthy{backend=%q,lb="web"}`, b.address), "nobody checks it")
	status, list := request(t, http.MethodGet, "http://"+admin+"/tcp_lb/backends", "")
	require.Equal(t, 200, status)
	require.NotContains(t, list, b.address)
}

// The series of what is gone stay for a while, and not for ever. One that comes
// back goes on counting.
func TestDepartedSeriesEnd(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		opened := func() float64 { return metric(t, "connections_total", labels("lb", t.Name())) }
		run := func() *generation {
			g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
			return g
		}
		use := func(g *generation) {
			g.start()
			far, near := net.Pipe()
			_ = far.Close()
			g.serve(layer4Connection(near))
			g.stop()
		}
		first, second := run(), run() // a new one forgets what has departed
		use(first)
		require.Empty(t, registry.snapshot())
		require.EqualValues(t, 1, opened())
		time.Sleep(departedFor - time.Second)
		require.EqualValues(t, 1, opened())
		use(second)
		require.EqualValues(t, 2, opened(), "continued")
		time.Sleep(departedFor)
		require.Zero(t, opened())
		require.Zero(t, metric(t, "connections_closed_total", labels("lb", t.Name())))
	})
}
