package tcplb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// connectionsAnswer sends the request to the admin endpoint.
func connectionsAnswer(t testing.TB, method, admin, query string) (status, total int, list []connectionStatus) {
	t.Helper()
	resp, err := send(method, "http://"+admin+"/tcp_lb/connections?"+query, "")
	require.NoError(t, err)
	defer resp.Body.Close()
	if resp.StatusCode == 200 {
		require.NoError(t, json.NewDecoder(resp.Body).Decode(&list))
		_, err := fmt.Sscan(resp.Header.Get(totalHeader), &total)
		require.NoError(t, err)
	}
	return resp.StatusCode, total, list
}

// requireReset finds that the connection was cut.
func requireReset(t testing.TB, c net.Conn) {
	t.Helper()
	_, err := io.Copy(io.Discard, c)
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func TestConnectionsEndpoint(t *testing.T) {
	watchLeftovers(t)
	a, b := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	runWithAdmin(t, adminConfig(admin, web, lb, `"name":"web",`+checksDisabled+","+backendsJSON(a.address, b.address)+"}"))
	status, total, list := connectionsAnswer(t, http.MethodGet, admin, "")
	require.Equal(t, 200, status)
	require.Zero(t, total)
	require.NotNil(t, list, "an empty list, not null")

	before := time.Now()
	first := hold(t, lb)  // to a
	second := hold(t, lb) // to b
	third := hold(t, lb)  // to a
	write(t, second, strings.Repeat("x", 100))
	expect(t, second, strings.Repeat("x", 100))
	all := func(query string) []connectionStatus {
		t.Helper()
		status, total, list := connectionsAnswer(t, http.MethodGet, admin, query)
		require.Equal(t, 200, status)
		require.GreaterOrEqual(t, total, len(list))
		return list
	}
	clients := func(list []connectionStatus) (addresses []string) {
		for _, c := range list {
			addresses = append(addresses, c.Client)
		}
		return addresses
	}
	name := func(c net.Conn) string { return c.LocalAddr().String() }
	eventually(t, func() bool {
		list = all("")
		return len(list) == 3 && list[1].SentBytes == 101
	}, "counted")
	require.Equal(t, []string{name(first), name(second), name(third)}, clients(list), "the oldest first")
	for i, backend := range []string{a.address, b.address, a.address} {
		c := list[i]
		require.Equal(t, "web", c.LB)
		require.Equal(t, backend, c.Backend)
		require.False(t, c.Since.Before(before.Truncate(time.Millisecond)), c.Since)
		require.InDelta(t, time.Since(c.Since).Seconds(), c.Age, hangTimeout.Seconds())
		require.LessOrEqual(t, c.Idle, c.Age)
	}
	require.EqualValues(t, 101, list[1].ReceivedBytes)

	host, port, err := net.SplitHostPort(name(second))
	require.NoError(t, err)
	for query, want := range map[string][]string{
		"lb=web":                            {name(first), name(second), name(third)},
		"lb=db":                             {},
		"lb=&address=&client=":              {name(first), name(second), name(third)},
		"address=" + a.address:              {name(first), name(third)},
		"address=LOCALHOST:80":              {},
		"lb=web&address=" + b.address:       {name(second)},
		"lb=db&address=" + b.address:        {},
		"client=" + name(second):            {name(second)},
		"client=" + host:                    {name(first), name(second), name(third)},
		"client=127.0.0.0/8":                {name(first), name(second), name(third)},
		"client=10.0.0.0/8":                 {},
		"client=[::ffff:127.0.0.1]:" + port: {name(second)},
		"client=::ffff:127.0.0.0/104":       {name(first), name(second), name(third)},
		"client=::1":                        {},
		"sort=bytes&limit=1":                {name(second)},
		"sort=age&limit=2":                  {name(first), name(second)},
		"limit=0":                           {name(first), name(second), name(third)},
	} {
		require.ElementsMatch(t, want, clients(all(query)), query)
	}
	_, total, list = connectionsAnswer(t, http.MethodGet, admin, "limit=2")
	require.Equal(t, 3, total)
	require.Len(t, list, 2)
	status, body := request(t, http.MethodHead, "http://"+admin+"/tcp_lb/connections", "")
	require.Equal(t, 200, status)
	require.Empty(t, body)
	require.Len(t, all(""), 3, "who looks cuts nothing")

	// A backend that has left the config has its connections still.
	reload(t, adminConfig(admin, web, lb, `"name":"web",`+checksDisabled+","+backendsJSON(a.address)+"}"))
	require.Equal(t, []string{name(second)}, clients(all("address="+b.address)))
}

func TestAdminQueriesRefused(t *testing.T) {
	serve := map[string]caddy.AdminHandlerFunc{"connections": serveConnections, "backends": serveBackends, "pools": servePools}
	for _, c := range []struct{ method, target, want string }{
		{"GET", "connections?clinet=10.0.0.1", `unknown parameter "clinet": did you mean client? (there are address, client, lb, limit, sort)`},
		{"GET", "connections?lb=a&lb=b", `parameter "lb" is there 2 times`},
		{"GET", "connections?lb=%zz", `query "lb=%zz"`},
		{"GET", "connections?lb=a;sort=age", `query "lb=a;sort=age"`},
		{"GET", "connections?sort=size", `unknown sort "size" (there are age, bytes, idle)`},
		{"GET", "connections?limit=-1", `limit "-1": want a number, 0 for all`},
		{"GET", "connections?limit=ten", `limit "ten": want a number, 0 for all`},
		{"GET", "connections?client=me", `client "me": want an IP address, one with a port, or a prefix such as 10.0.0.0/8`},
		{"GET", "connections?client=10.0.0.1:0", `client "10.0.0.1:0": want an IP`},
		{"GET", "connections?client=10.0.0.1/33", `client "10.0.0.1/33": want an IP`},
		{"GET", "connections?address=10.0.0.1", `address "10.0.0.1": want host:port`},
		{"DELETE", "connections", "which connections? want lb, address or client"},
		{"DELETE", "connections?sort=age&limit=1", "which connections? want lb, address or client"},
		{"DELETE", "connections?lb=web&client=", `parameter "client" is empty: leave it out for all`},
		{"GET", "backends?client=10.0.0.1", `unknown parameter "client" (there are address, lb)`},
		{"GET", "backends?address=db", `address "db": want host:port`},
		{"GET", "pools?address=db:1", `unknown parameter "address" (there is lb)`},
	} {
		w := httptest.NewRecorder()
		endpoint, _, _ := strings.Cut(c.target, "?")
		var refusal caddy.APIError
		require.ErrorAs(t, serve[endpoint](w, httptest.NewRequest(c.method, "/tcp_lb/"+c.target, nil)), &refusal, c.target)
		require.Equal(t, http.StatusBadRequest, refusal.HTTPStatus, c.target)
		require.ErrorContains(t, refusal.Err, c.want, c.target)
	}
	for endpoint, allowed := range map[string]string{"connections": "GET, HEAD, DELETE", "pools": "GET, HEAD"} {
		w := httptest.NewRecorder()
		var refusal caddy.APIError
		require.ErrorAs(t, serve[endpoint](w, httptest.NewRequest(http.MethodPost, "/tcp_lb/"+endpoint, nil)), &refusal)
		require.Equal(t, http.StatusMethodNotAllowed, refusal.HTTPStatus)
		require.Equal(t, allowed, w.Header().Get("Allow"))
	}
}

func TestBackendsEndpointFilters(t *testing.T) {
	a, b := freeAddress(t), freeAddress(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	runWithAdmin(t, adminConfig(admin, web, lb, `"name":"web",`+checksDisabled+","+backendsJSON(a, b)+"}"))
	for query, want := range map[string]int{
		"": 2, "lb=web": 2, "lb=": 2, "lb=db": 0, "address=" + a: 1, "lb=web&address=" + b: 1, "lb=db&address=" + b: 0, "address=10.0.0.1:1": 0,
	} {
		status, body := request(t, http.MethodGet, "http://"+admin+"/tcp_lb/backends?"+query, "")
		require.Equal(t, 200, status, body)
		var list []backendStatus
		require.NoError(t, json.Unmarshal([]byte(body), &list))
		require.NotNil(t, list)
		require.Len(t, list, want, query)
	}
	for query, want := range map[string]int{"": 1, "lb=web": 1, "lb=db": 0} {
		status, body := request(t, http.MethodGet, "http://"+admin+"/tcp_lb/pools?"+query, "")
		require.Equal(t, 200, status, body)
		var list []poolSummary
		require.NoError(t, json.Unmarshal([]byte(body), &list))
		require.Len(t, list, want, query)
	}
}

func TestKillConnections(t *testing.T) {
	watchLeftovers(t)
	a, b := echoServer(t), echoServer(t)
	stalled := startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(c, endless{}) })
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	file := filepath.Join(t.TempDir(), "tcp_lb.log")
	config := adminConfig(admin, web, lb, `"name":"web","access_log":true,`+checksDisabled+","+backendsJSON(a.address, b.address, stalled.address)+"}")
	runWithAdmin(t, replaceOnce(t, config, `"default":{"level":"PANIC"}`, fmt.Sprintf(
		`"default":{"level":"PANIC"},"lines":{"include":["layer4.handlers.tcp_lb"],"writer":{"output":"file","filename":%q}}`, file)))
	active := func(n float64) {
		t.Helper()
		eventually(t, func() bool { return metric(t, "connections_active", nil) == n }, "%v are open", n)
	}
	kill := func(query string) (int, []connectionStatus) {
		status, total, list := connectionsAnswer(t, http.MethodDelete, admin, query)
		if !strings.Contains(query, "limit") {
			require.Len(t, list, total)
		}
		return status, list
	}
	first, second := hold(t, lb), hold(t, lb) // to a and b
	unread := dialClient(t, lb)               // takes nothing
	eventually(t, func() bool { return metric(t, "connections_active", labels("backend", stalled.address)) == 1 }, "its turn is over")
	require.NoError(t, unread.CloseWrite()) // which alone would be client_closed
	third, fourth := hold(t, lb), hold(t, lb)
	active(5)

	status, list := kill("client=" + first.LocalAddr().String())
	require.Equal(t, 200, status)
	require.Len(t, list, 1)
	require.Equal(t, first.LocalAddr().String(), list[0].Client)
	requireReset(t, first)
	active(4)
	require.Equal(t, 1.0, metric(t, "connections_closed_total", labels("backend", a.address, "reason", "killed")))
	status, _ = kill("client=" + first.LocalAddr().String())
	require.Equal(t, 404, status, "it is gone")
	write(t, fourth, "y")
	expect(t, fourth, "y")

	status, list = kill("lb=web&address=" + stalled.address)
	require.Equal(t, 200, status)
	require.Len(t, list, 1)
	requireReset(t, unread)
	active(3)

	status, list = kill("lb=web&sort=age&limit=1")
	require.Equal(t, 200, status)
	require.Len(t, list, 1)
	require.Equal(t, second.LocalAddr().String(), list[0].Client)
	requireReset(t, second)
	active(2)

	status, list = kill("lb=web")
	require.Equal(t, 200, status)
	require.Len(t, list, 2)
	requireReset(t, third)
	requireReset(t, fourth)
	active(0)
	require.Equal(t, 5.0, metric(t, "connections_total", nil))
	require.Equal(t, 5.0, metric(t, "connections_closed_total", labels("reason", "killed")))
	status, _ = kill("lb=web")
	require.Equal(t, 404, status)

	lines := readFile(t, file)
	require.Equal(t, 4, strings.Count(lines, `"connections are cut by hand","lb":"web","connections":`), lines)
	for _, l := range strings.Split(lines, "\n") {
		if strings.Contains(l, `"reason":"killed"`) {
			require.Contains(t, l, `"level":"info"`, "it is no failure")
		}
	}
	require.Contains(t, lines, `"reason":"killed"`)
}

// endless is a source of bytes without an end.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// Connections are cut at any moment of their life while others come, and every
// one is counted, with one reason.
func TestKillWhileClientsComeAndGo(t *testing.T) {
	watchLeftovers(t)
	a, b := echoServer(t), echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, `"name":"web",`+checksDisabled+","+backendsJSON(a.address, b.address)+"}"))
	const kills = 200
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var dialed atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				c, err := net.Dial("tcp", lb)
				if err != nil {
					continue
				}
				dialed.Add(1)
				_ = c.SetDeadline(time.Now().Add(hangTimeout))
				_, _ = io.WriteString(c, "x")
				if i%2 == 0 { // others stay until they are cut
					_ = c.(*net.TCPConn).CloseWrite()
				}
				if _, err = io.Copy(io.Discard, c); isTimeout(err) {
					t.Errorf("a client hangs: %v", err)
				}
				_ = c.Close()
			}
		})
	}
	cut := 0
	eventually(t, func() bool {
		w := httptest.NewRecorder()
		err := serveConnections(w, httptest.NewRequest(http.MethodDelete, "/tcp_lb/connections?lb=web", nil))
		var refusal caddy.APIError
		if errors.As(err, &refusal) {
			require.Equal(t, 404, refusal.HTTPStatus)
			return false
		}
		require.NoError(t, err)
		cut++
		return cut == kills
	}, "cut again and again")
	stop()
	// Those that came after the last cut, and only wait.
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	eventually(t, func() bool {
		_ = serveConnections(httptest.NewRecorder(), httptest.NewRequest(http.MethodDelete, "/tcp_lb/connections?lb=web", nil))
		return isClosed(done)
	}, "all have ended")
	eventually(t, func() bool { return open.n.Load() == 0 }, "and are counted")
	require.Equal(t, metric(t, "connections_total", nil), metric(t, "connections_closed_total", labels("backend", a.address))+
		metric(t, "connections_closed_total", labels("backend", b.address)))
	require.Positive(t, metric(t, "connections_closed_total", labels("reason", "killed")))
	require.Zero(t, metric(t, "connections_active", nil))
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// Whoever walks over a backend's connections lets them come and go meanwhile.
func TestListingStopsNobody(t *testing.T) {
	b := newBackend(&pool{}, one, target{})
	b.users = 1
	const n = 10 * sessionsAtOnce
	stay, leave := make(map[*session]bool), make([]*session, 0, n/2)
	for i := range n {
		s := &session{}
		b.enter(s)
		if i%2 == 0 {
			stay[s] = true
		} else {
			leave = append(leave, s)
		}
	}
	parts := 0
	seen := make(map[*session]int)
	b.visitSessions(func(some []*session) {
		require.LessOrEqual(t, len(some), sessionsAtOnce)
		require.True(t, b.mu.TryLock(), "nobody is held up")
		b.mu.Unlock()
		for _, s := range some {
			seen[s]++
		}
		// Others end, and as many begin.
		for range min(100, len(leave)) {
			last := len(leave) - 1
			b.leave(leave[last], reasonClientClosed, 0)
			leave = leave[:last]
			b.enter(&session{})
		}
		parts++
	})
	require.Greater(t, parts, n/2/sessionsAtOnce)
	for s := range stay {
		require.Equal(t, 1, seen[s])
	}
	for _, times := range seen {
		require.Equal(t, 1, times)
	}
}

func TestIdleTimeOfAConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, inner := net.Pipe()
		backend, server := net.Pipe()
		r := relay.New(inner, backend, relay.Options{Up: new(atomic.Uint64), Down: new(atomic.Uint64)})
		b := newBackend(&pool{}, one, target{})
		s := &session{pool: b.pool, relay: r, began: time.Now()}
		s.backend = b
		done := make(chan struct{})
		r.Start(func() { close(done) })
		idle := func() float64 { return foundSession{s: s}.status(time.Now()).Idle }
		time.Sleep(1234 * time.Millisecond)
		require.Equal(t, 1.234, idle())
		write(t, client, "x")
		expect(t, server, "x")
		synctest.Wait()
		require.Zero(t, idle())
		time.Sleep(time.Minute)
		require.Equal(t, 60.0, idle())
		// Nobody looked between these bytes and the relay's own next look.
		write(t, server, "x")
		expect(t, client, "x")
		time.Sleep(time.Minute)
		require.InDelta(t, 60, idle(), 15)
		require.Equal(t, 121.234, foundSession{s: s}.status(time.Now()).Age)
		_ = client.Close()
		_ = server.Close()
		<-done
		_ = inner.Close()
		_ = backend.Close()
	})
}

// BenchmarkConnections lists 9,900 open connections of one backend.
func BenchmarkConnections(b *testing.B) {
	p := &pool{name: "web", backends: make(map[string]*Backend)}
	busy := newBackend(p, one, target{})
	busy.users = 1
	p.backends[one] = busy
	for i := range 9900 {
		from := &net.TCPAddr{IP: net.IPv4(10, 1, byte(i>>8), byte(i)), Port: 40000}
		s := &session{pool: p, from: from, relay: relay.New(nil, nil, relay.Options{}), began: time.Now()}
		s.backend = busy
		busy.enter(s)
	}
	registry.mu.Lock()
	registry.pools["web"] = p
	registry.mu.Unlock()
	b.Cleanup(func() {
		registry.mu.Lock()
		delete(registry.pools, "web")
		registry.mu.Unlock()
	})
	for name, query := range map[string]string{"oldest": "", "idle longest": "sort=idle", "of one client": "client=10.1.0.7", "all": "limit=0"} {
		b.Run(name, func(b *testing.B) {
			r := httptest.NewRequest(http.MethodGet, "/tcp_lb/connections?"+query, nil)
			b.ReportAllocs()
			for b.Loop() {
				w := httptest.NewRecorder()
				require.NoError(b, serveConnections(w, r))
				require.NotEqual(b, "0", w.Header().Get(totalHeader))
			}
		})
	}
}
