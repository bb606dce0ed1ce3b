//go:build unix

package tcplb

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// stage is a balancer with six pools, one for each thing that can be seen of
// it, and a real Prometheus that watches.
type stage struct {
	t                *testing.T
	heavy, light     *server // of pool web, weights 3 and 1
	good, shaky      *server // of pools retry, small and poor, and of shaky
	rude, ill        *server // of pool poor: closes at once, and is well as long as …
	health           *server // … this one serves
	web, dead, retry string  // where the pools listen
	small, poor      string
	config           string
	prometheus       *prometheusServer
	began            time.Time
}

func newStage(t *testing.T) *stage {
	requirePrograms(t, "", prometheusPackage, "prometheus")
	s := &stage{
		t: t, heavy: echoServer(t), light: echoServer(t), good: echoServer(t), shaky: echoServer(t),
		web: freeAddress(t), dead: freeAddress(t), retry: freeAddress(t), small: freeAddress(t), poor: freeAddress(t),
		rude: startServer(t, func(*net.TCPConn) {}), ill: echoServer(t), health: echoServer(t),
	}
	_, health, err := net.SplitHostPort(s.health.address)
	require.NoError(t, err)
	metrics, gone := freeAddress(t), freeAddress(t)
	pool := func(name, listen, options string) string {
		return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[{"handler":"tcp_lb","name":%q,%s}]}]}`, name, listen, name, options)
	}
	s.config = `{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"PANIC"}}},
		"apps":{"http":{"servers":{"metrics":{"listen":["` + metrics + `"],"protocols":["h1"],"automatic_https":{"disable":true},
			"routes":[{"handle":[{"handler":"metrics"}]}]}}},
		"layer4":{"servers":{` + strings.Join([]string{
		pool("web", "tcp_lb/"+s.web, fmt.Sprintf(`"backends":[{"address":%q,"weight":3},{"address":%q,"max_connections":5000}],`, s.heavy.address, s.light.address)+fastChecks),
		pool("dead", s.dead, backendsJSON(gone)+`,"load_balancing":{"try_duration":"50ms"},"dynamic_backends":[{"source":"a","name":"gone.internal","port":80,"resolvers":["`+freeAddress(t)+`"]}],`+fastChecks),
		pool("retry", s.retry, backendsJSON(s.good.address, gone)+`,"health_checks":{"active":{"disabled":true}}`),
		pool("small", s.small, backendsJSON(s.good.address)+`,"max_connections":2,`+fastChecks),
		pool("poor", s.poor, fmt.Sprintf(`"backends":[{"address":%q},{"address":%q,"health_port":%s},{"address":%q}],"close_if_unhealthy":"0s","health_checks":{"passive":{"fail_duration":"1h"},`,
			s.rude.address, s.ill.address, health, s.good.address)+strings.TrimPrefix(fastChecks, `"health_checks":{`)),
		pool("shaky", freeAddress(t), backendsJSON(s.shaky.address)+`,"health_checks":{"active":{"interval":"200ms","fast_interval":"200ms","fails":1000}}`),
	}, ",") + `}}}}`
	runCaddy(t, s.config)
	eventually(t, func() bool {
		return metric(t, "health_checks_total", labels("lb", "shaky")) > 0 &&
			metric(t, "health_checks_total", labels("lb", "dead")) > 0 && metric(t, "health_checks_total", labels("lb", "web")) > 3
	}, "first checks")
	s.prometheus = startPrometheus(t, metrics)
	s.began = time.Now()
	// Counters that are seen at 0 first: else an increase misses their beginning.
	require.Zero(t, s.prometheus.sum("tcp_lb_connections_total"))
	return s
}

// panel returns what a panel's query of a dashboard shows for the pool.
func (s *stage) panel(name, lb string) samples {
	s.t.Helper()
	return s.prometheus.query(s.expression(name, lb, "1m"))
}

func (s *stage) expression(name, lb, interval string) string {
	s.t.Helper()
	board, rest, _ := strings.Cut(name, "/")
	title, ref, _ := strings.Cut(rest, "/")
	for _, b := range loadBoards(s.t) {
		for _, p := range b.Panels {
			for _, q := range p.Targets {
				if b.Title == board && p.Title == title && q.RefID == ref {
					return substitute(strings.NewReplacer("$lb", lb, "$__rate_interval", interval).Replace(q.Expr))
				}
			}
		}
	}
	require.FailNow(s.t, "no such query", name)
	return ""
}

// counted waits until Prometheus knows of n connections of the pool that all
// have ended, but for the open ones.
func (s *stage) counted(lb string, n, open int) {
	s.t.Helper()
	s.prometheus.eventually(func() bool {
		return s.prometheus.sum(fmt.Sprintf("tcp_lb_connections_total{lb=%q}", lb)) == float64(n) &&
			s.prometheus.sum(fmt.Sprintf("tcp_lb_connections_closed_total{lb=%q, backend!=\"\"}", lb)) == float64(n-open)
	}, "%d connections of pool %s", n, lb)
}

// increases tells how far an increase() may be from the truth: of n scrapes it
// makes up to half an interval more at the window's end, a part 1/(2n-2) (and
// none at its begin, where the counters were 0).
const (
	increases = 0.1
	enough    = 10 // scrapes for that
)

const (
	overview    = "Load Balancer Overview/"
	backends    = "Backend Status/"
	connections = "Connection Metrics/"
)

// The dashboards and alerts, evaluated by a real Prometheus that watches a real
// balancer, say what was done to it.
func TestNumbersAgree(t *testing.T) {
	s := newStage(t)
	p := s.prometheus
	heavy, light := s.heavy.address, s.light.address
	s.failClients() // for most of the time that its alert looks at

	// 300 connections of 100 bytes, over weights 3 and 1.
	for range 300 {
		echoed(t, s.web, 100)
	}
	s.counted("web", 300, 0)
	p.eventually(func() bool { return p.sum("count_over_time(up[5m])") > enough }, "scrapes")
	require.Equal(t, 300.0, s.panel(overview+"Connections since start/A", "web").one(t), "exactly")
	require.Equal(t, 30_000.0, s.panel(connections+"Received since start/A", "web").one(t))
	require.Equal(t, 30_000.0, s.panel(connections+"Sent since start/A", "web").one(t))
	require.Equal(t, 225.0, s.panel(backends+"Backends/D", "web").one(t, "backend", heavy))
	require.Equal(t, 75.0, s.panel(backends+"Backends/D", "web").one(t, "backend", light))
	for _, name := range []string{"Share in the time range/A", "Share in the time range/B", "Share of connections against weight/A", "Share of connections against weight/B"} {
		// Both backends' increases are extrapolated by the same factor, which the ratio cancels.
		require.InDelta(t, 0.75, s.panel(backends+name, "web").one(t, "backend", heavy), 0.001, name)
		require.InDelta(t, 0.25, s.panel(backends+name, "web").one(t, "backend", light), 0.001, name)
	}
	require.InEpsilon(t, 225, s.panel(connections+"Distribution/A", "web").one(t, "backend", heavy), increases)
	require.InEpsilon(t, 300, s.panel(connections+"Reasons in the time range/A", "web").one(t, "reason", "client_closed"), increases)
	require.InEpsilon(t, 300, s.panel(connections+"Duration/A", "web").one(t, "le", "+Inf"), increases)
	require.Equal(t, 2.0, s.panel(overview+"Pools/A", "web").one(t), "all up")
	require.Zero(t, s.panel(overview+"Backends down/A", "web").one(t))
	require.Zero(t, s.panel(overview+"Error ratio/A", "web").one(t))

	s.killAndRevive(heavy, light)
	s.provoke()

	t.Run("every expression returns data", s.everyExpression)
	t.Run("books balance at every scrape", s.books)
	t.Run("no gap over a reload", s.reloads)

	require.NoError(t, caddy.Stop())
	p.wait(func() bool { return len(p.query(ruleExpr(t, "TcpLbBalancerDown"))) == 1 }, "the balancer is missed")
}

// killAndRevive takes the light backend away and brings it back, three times.
func (s *stage) killAndRevive(heavy, light string) {
	t, p := s.t, s.prometheus
	t.Helper()
	verdict := func(want float64) {
		t.Helper()
		p.eventually(func() bool { return s.panel(backends+"Health/A", "web").one(t, "backend", light) == want }, "the dashboard shows %v", want)
	}
	s.light.kill()
	verdict(0)
	known := time.Now()
	for range 40 {
		echoed(t, s.web, 100)
	}
	s.counted("web", 340, 0)
	var rates samples
	p.eventually(func() bool { // two scrapes since then make a rate
		since := p.at.Sub(known).Milliseconds()
		if since > 0 {
			rates = p.query(s.expression(backends+"Connections per second/A", "web", fmt.Sprintf("%dms", since)))
		}
		return len(rates) == 2
	}, "a rate since the backend was found dead")
	require.Zero(t, rates.one(t, "backend", light), "a dead backend gets nothing")
	require.Equal(t, 75.0, s.panel(backends+"Backends/D", "web").one(t, "backend", light))
	require.Equal(t, 265.0, s.panel(backends+"Backends/D", "web").one(t, "backend", heavy), "the other one takes all")
	require.Zero(t, s.panel(backends+"Share in the time range/B", "web").one(t, "backend", light), "nothing is due to it")
	require.Equal(t, 1.0, s.panel(backends+"Share in the time range/B", "web").one(t, "backend", heavy))
	require.Equal(t, 1.0, s.panel(overview+"Pools/A", "web").one(t), "some down")
	require.Equal(t, 1.0, s.panel(overview+"Backends down/A", "web").one(t))
	require.Equal(t, 1.0, s.panel(overview+"Backends up/A", "web").one(t))
	require.Zero(t, s.panel(overview+"Pools down/A", "web").one(t))
	require.NotEmpty(t, p.query(ruleExpr(t, "TcpLbBackendDown")+` and on (lb) tcp_lb_backend_healthy{lb="web"}`))

	s.light.start()
	verdict(1)
	for range 80 {
		echoed(t, s.web, 100)
	}
	s.counted("web", 420, 0)
	require.Equal(t, 75.0+20, s.panel(backends+"Backends/D", "web").one(t, "backend", light), "its share again")
	turned := s.panel(backends+"Backends/G", "web").one(t, "backend", light) // milliseconds
	require.WithinRange(t, time.UnixMilli(int64(turned)), known, time.Now())
	require.Zero(t, s.panel(backends+"Backends/G", "web").one(t, "backend", heavy), "never")
	for range 2 {
		s.light.kill()
		verdict(0)
		s.light.start()
		verdict(1)
	}
	require.Equal(t, 6.0, p.sum(`tcp_lb_health_transitions_total{lb="web"}`))
	require.InEpsilon(t, 3, s.panel(backends+"Transitions/A", "web").one(t, "to", "down", "backend", light), 2*increases)
}

// provoke has everything happen that a dashboard or an alert speaks of.
func (s *stage) provoke() {
	t, p := s.t, s.prometheus
	t.Helper()
	s.shaky.kill()
	for range 15 { // fewer than ten would be too few for a ratio
		refused(t, s.dead)
	}
	for range 40 { // of which half are retried: ten are enough for a ratio
		echoed(t, s.retry, 100)
	}
	hold(t, s.web)
	hold(t, s.small)
	hold(t, s.small)
	for range 3 {
		refused(t, s.small)
	}
	// Most of the process's files are gone.
	taken := files.Process.Limit()*85/100 - files.Process.Used()
	require.True(t, files.Process.Acquire(taken))
	t.Cleanup(func() { files.Process.Release(taken) })

	s.counted("web", 421, 1)
	s.counted("retry", 40, 0)
	s.counted("small", 2, 2)
	p.eventually(func() bool { return p.sum(`tcp_lb_connection_errors_total{backend=""}`) == 18 }, "18 were turned away")
	require.Equal(t, 18.0, s.panel(connections+"Turned away since start/A", ".*").one(t))
	require.Equal(t, 15.0, s.panel(connections+"Turned away since start/A", "dead").one(t))
	require.Equal(t, 1.0, s.panel(overview+"Error ratio/A", "dead").one(t))
	require.Equal(t, 1.0, s.panel(overview+"Pools down/A", ".*").one(t))
	require.Zero(t, s.panel(overview+"Pools/A", "dead").one(t), "none up")
	require.Equal(t, 3.0, s.panel(overview+"Pools/A", "retry").one(t), "unchecked")
	require.Equal(t, 2.0, s.panel(backends+"Health/A", "retry").one(t, "backend", s.good.address), "unchecked")
	require.Equal(t, 2.0, s.panel(backends+"Backends/A", "retry").one(t, "backend", s.good.address), "unchecked")
	require.Equal(t, 1.0, s.panel(backends+"Backends/A", "small").one(t, "backend", s.good.address), "up")
	require.Zero(t, s.panel(backends+"Backends/A", "dead").one(t), "down")
	require.Equal(t, 1.0, s.panel(overview+"Open connections/A", "web").one(t))
	require.Equal(t, 1.0, s.panel(overview+"Limit used/A", "small").one(t), "2 of 2")
	retries := metric(t, "retries_total", labels("lb", "retry"))
	require.Positive(t, retries)
	require.Equal(t, retries, s.panel(connections+"Failed connects since start/A", "retry").one(t))
	require.InDelta(t, retries/(40+retries), s.panel(overview+"Error and retry ratio/B", "retry").one(t), 0.001)
	require.Zero(t, s.panel(overview+"Error and retry ratio/A", "retry").one(t), "no client noticed")
	p.eventually(func() bool {
		return s.panel(overview+"Connections against the limit/B", ".*").one(t) > 0.8 && len(p.query(ruleExpr(t, "TcpLbHealthChecksFailing"))) > 0
	}, "files in use, and failing checks")
}

// failClients has a backend taken out since clients' connections to it fail, and the
// connection of another cut as its checks fail.
func (s *stage) failClients() {
	t, p := s.t, s.prometheus
	t.Helper()
	poor := registry.newest("poor").members()
	eventually(t, func() bool {
		c, err := net.Dial("tcp", s.poor)
		require.NoError(t, err)
		_ = c.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
		return !poor[0].Backend.Available()
	}, "a client fails")
	hold(t, s.poor)
	hold(t, s.poor)
	s.health.kill()
	p.eventually(func() bool {
		return p.sum(`tcp_lb_connections_closed_total{lb="poor", reason="backend_down"}`) == 1 && p.sum("tcp_lb_backend_ejected") == 1
	}, "one is taken out, and a connection is cut")
	require.Equal(t, 1.0, s.panel(backends+"Taken out/A", "poor").one(t, "backend", s.rude.address))
	require.Zero(t, s.panel(backends+"Taken out/A", "poor").one(t, "backend", s.ill.address), "which its checks have found")
	require.Empty(t, s.panel(backends+"Taken out/A", "web"), "no fail_duration")
	p.eventually(func() bool {
		return s.panel(backends+"Cut as the backend was down/A", "poor").one(t, "backend", s.ill.address) > 0 &&
			s.panel(backends+"Ejections per minute/A", "poor").one(t, "backend", s.rude.address) > 0
	}, "on the dashboard")
	require.Zero(t, s.panel(backends+"Cut as the backend was down/A", "poor").one(t, "backend", s.good.address))
	require.Zero(t, s.panel(backends+"Ejections per minute/A", "poor").one(t, "backend", s.good.address))
}

func ruleExpr(t testing.TB, alert string) string {
	t.Helper()
	for _, r := range alertRules(t) {
		if r.Alert == alert {
			return r.Expr
		}
	}
	require.FailNow(t, "no such alert", alert)
	return ""
}

// everyExpression evaluates all that the project asks of Prometheus: each
// query of a dashboard and of docs/metrics.md, each variable, each alert.
func (s *stage) everyExpression(t *testing.T) {
	p := s.prometheus
	for name, expr := range expressions(t) {
		if runtime.GOOS != "linux" && strings.Contains(expr, "tcp_lb_listener_") {
			continue // there tcp_lb listeners are Caddy's, and have no books
		}
		require.True(t, p.query(expr).hasNumber(), "%s: %s", name, expr)
	}

	questions := regexp.MustCompile("(?m)^\\| [a-z][^|`]* \\| (`.*`) \\|$").FindAllStringSubmatch(readFile(t, "docs/metrics.md"), -1)
	require.Greater(t, len(questions), 10)
	for _, q := range questions {
		for _, expr := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(q[1], -1) {
			require.True(t, p.query(expr[1]).hasNumber(), "docs/metrics.md: %s", expr[1])
		}
	}

	for _, b := range loadBoards(t) {
		var lbs, addresses []string
		p.get("label/lb/values", variable(t, strings.ReplaceAll(b.Templating.List[1].Query.Query, "$instance", ".*"), "lb"), &lbs)
		require.Equal(t, []string{"dead", "poor", "retry", "shaky", "small", "web"}, lbs)
		p.get("label/backend/values", variable(t, strings.NewReplacer("$instance", ".*", "$lb", "web").Replace(b.Templating.List[2].Query.Query), "backend"), &addresses)
		require.ElementsMatch(t, []string{s.heavy.address, s.light.address}, addresses)
	}

	for _, r := range alertRules(t) {
		switch r.Alert {
		case "TcpLbBalancerDown":
		case "TcpLbClientsWaiting": // on what lasts for minutes, see its own test
			require.NotEmpty(t, p.query(strings.TrimSuffix(r.Expr, " > 0")), r.Alert)
		default:
			require.NotEmpty(t, p.query(r.Expr), "%s has a reason to fire", r.Alert)
		}
	}
	p.eventually(func() bool {
		var loaded struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError, State string }
			}
		}
		p.get("rules", nil, &loaded)
		pending := 0
		for _, g := range loaded.Groups {
			for _, r := range g.Rules {
				require.NotEqual(t, "err", r.Health, "%s: %s", r.Name, r.LastError)
				if r.Health == "ok" && r.State != "inactive" && r.Name != "TcpLbClientsWaiting" {
					pending++
				}
			}
		}
		return pending == len(alertRules(t))-2 // the balancer is there, and nobody waits for minutes
	}, "all other alerts are pending or fire")
}

// variable turns Grafana's label_values(selector, label) into what Grafana
// asks Prometheus.
func variable(t testing.TB, query, label string) url.Values {
	t.Helper()
	m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(query)
	require.NotNil(t, m, query)
	require.Equal(t, label, m[2])
	return url.Values{"match[]": {m[1]}}
}

// books checks every scrape so far: what was opened is closed or active.
func (s *stage) books(t *testing.T) {
	points := 0
	s.prometheus.everyPoint(`sum by (lb, backend) (tcp_lb_connections_total) - sum by (lb, backend) (tcp_lb_connections_active)
		- sum by (lb, backend) (tcp_lb_connections_closed_total{backend!=""})`, s.began, func(labels map[string]string, v float64) {
		require.Zero(t, v, labels)
		points++
	})
	require.Greater(t, points, 100)
	s.prometheus.everyPoint(`{__name__=~"tcp_lb_.+"}`, s.began, func(labels map[string]string, v float64) {
		require.GreaterOrEqual(t, v, 0.0, labels)
	})
}

// reloads loads a config without the shaky pool: what it is goes, what it did
// stays to be scraped for a while, and the others' series are in every scrape
// and go on.
func (s *stage) reloads(t *testing.T) {
	p := s.prometheus
	less := regexp.MustCompile(`,"shaky":.*\]\}\]\}`).ReplaceAllString(s.config, "")
	require.NotEqual(t, s.config, less)
	reload(t, less)
	p.eventually(func() bool { return len(p.query(`tcp_lb_backend_weight{lb="shaky"}`)) == 0 }, "it is gone")
	require.NotEmpty(t, p.query(`tcp_lb_connections_closed_total{lb="shaky"}`))
	forgetDeparted()
	p.eventually(func() bool { return len(p.query(`{__name__=~"tcp_lb_.+", lb="shaky"}`)) == 0 }, "no series of it")
	require.Len(t, p.query(`count_over_time(tcp_lb_connections_total{lb!="shaky"}[5m]) == on () group_left () sum_over_time(up[5m])`), 9, "in every scrape")
	require.Len(t, p.query(`resets(tcp_lb_connections_total{lb!="shaky"}[5m]) == 0`), 9, "and never back to 0")
	require.Equal(t, 421.0, p.sum(`tcp_lb_connections_total{lb="web"}`))
}
