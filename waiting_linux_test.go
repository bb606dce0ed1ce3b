package tcplb

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// doors are the listeners of one balancer: one whose route terminates TLS, one
// without, a mixed one, and an HTTP server's. All are tcp_lb/, over one backend.
type doors struct {
	secure, plain, mixed, http, admin string
	roots                             *x509.CertPool
	server                            *server
	tlsApp                            string
}

func newDoors(t *testing.T) *doors {
	t.Helper()
	d := &doors{
		secure: freeAddress(t), plain: freeAddress(t), mixed: freeAddress(t), http: freeAddress(t), admin: freeAddress(t),
		server: echoServer(t),
	}
	d.tlsApp, d.roots = certificate(t)
	return d
}

// config has the limit of time, in JSON.
func (d *doors) config(admin, limit string) string {
	lb := withHandler(`"name":"web",` + backendsJSON(d.server.address) + "}")
	server := func(name, listen string, routes ...string) string {
		return fmt.Sprintf(`%q:{"listen":["tcp_lb/%s"],%s}`, name, listen, layer4Routes(routes...))
	}
	return fmt.Sprintf(`{"admin":{%s,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"WARN","exclude":["layer4"]}}},
		"apps":{%s,"tcp_lb":{"handshake_timeout":%s},"layer4":{"servers":{%s}},
		"http":{"servers":{"site":{"listen":["tcp_lb/%s"],"protocols":["h1"],"automatic_https":{"disable":true},
		"routes":[{"handle":[{"handler":"static_response","body":"hello"}]}]}}}}}`,
		admin, d.tlsApp, limit, strings.Join([]string{
			server("secure", d.secure, `{"handler":"tls"},`+lb),
			server("plain", d.plain, lb),
			`"mixed":{"listen":["tcp_lb/` + d.mixed + `"],"routes":[{"match":[{"ssh":{}}],"handle":[` + lb + `]},{"handle":[{"handler":"echo"}]}]}`,
		}, ","), d.http)
}

// run runs it in this process.
func (d *doors) run(t *testing.T, limit string) {
	t.Helper()
	runCaddy(t, d.config(`"disabled":true`, limit))
}

// child runs it in a process with 256 files.
func (d *doors) child(t *testing.T, limit string) *child {
	t.Helper()
	c := startChildWithFiles(t, 256, d.config(fmt.Sprintf(`"listen":%q`, d.admin), limit))
	for _, address := range []string{d.admin, d.plain, d.secure, d.mixed, d.http} { // apps and servers start in any order
		eventually(t, func() bool { return listens(address) }, "listening")
	}
	return c
}

func (d *doors) secureDial(t testing.TB) *tls.Conn {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: hangTimeout}, "tcp", d.secure, &tls.Config{RootCAs: d.roots, ServerName: "lb.test"})
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(hangTimeout)))
	return c
}

// turnedAwayIn is a child's count of them, by listener and reason.
func turnedAwayIn(t testing.TB, admin, listener, reason string) float64 {
	t.Helper()
	return scrape(t, admin, fmt.Sprintf(`tcp_lb_listener_connections_closed_total{listener=%q,reason=%q}`, listener, reason))
}

func turnedAwayHere(t testing.TB, listener, reason string) float64 {
	t.Helper()
	return metric(t, "listener_connections_closed_total", labels("listener", listener, "reason", reason))
}

// silent opens n connections that say nothing.
func silent(t testing.TB, address string, n int) []*net.TCPConn {
	t.Helper()
	list := make([]*net.TCPConn, n)
	for i := range list {
		list[i] = dialClient(t, address)
	}
	return list
}

// requireServed has ten clients at once, who are all served.
func requireServed(t testing.TB, address, when string) {
	t.Helper()
	all := gather(address, 10, 10)
	all.leave()
	require.Empty(t, all.failed, when)
	require.Len(t, all.served, 10, when)
}

// More silent clients than there are files for keep nobody else out, as long as
// they come and stay: where they are in the way, the oldest are ended.
func TestSilentClientsStarveNobody(t *testing.T) {
	for name, ports := range map[string]func(*doors) []string{
		"on one port":   func(d *doors) []string { return []string{d.secure} },
		"on all ports":  func(d *doors) []string { return []string{d.secure, d.mixed, d.http} },
		"on port mixed": func(d *doors) []string { return []string{d.mixed} },
		"on port HTTP":  func(d *doors) []string { return []string{d.http} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // each has a process of its own
			d := newDoors(t)
			c := d.child(t, `"1h"`)
			before := c.openFiles(t)
			over := func(address, reason string) float64 { return turnedAwayIn(t, d.admin, address, reason) }
			var quiet []*net.TCPConn
			for _, address := range ports(d) {
				quiet = append(quiet, silent(t, address, 300)...)
			}
			requireServed(t, d.plain, "at once")
			// A further crowd, and a third, each of which has to give way.
			for round := range 2 {
				for _, address := range ports(d) {
					quiet = append(quiet, silent(t, address, 300)...)
				}
				requireServed(t, d.plain, fmt.Sprintf("after further crowds, round %d", round))
			}
			for _, address := range ports(d) {
				if address == d.secure {
					eventually(t, func() bool { return over(address, "files_short") >= 3*300-160 }, "the oldest were ended")
				} else {
					eventually(t, func() bool { return over(address, "max_connections") >= 3*300-160 }, "those over their share were closed")
				}
				require.Zero(t, over(address, "handshake_timeout"))
			}
			requireServed(t, d.plain, "later")
			if ports(d)[0] == d.secure {
				secure := d.secureDial(t)
				_, err := io.WriteString(secure, "x")
				require.NoError(t, err)
				expect(t, secure, "x")
				require.NoError(t, secure.Close())
			}
			require.Zero(t, scrape(t, d.admin, `tcp_lb_connection_errors_total{backend="",error_type="max_connections",lb="web"}`))

			for _, conn := range quiet {
				_ = conn.Close()
			}
			eventually(t, func() bool { return c.openFiles(t) <= before+2 }, "files are free again")
			// The look whether a port listens may have been turned away, too.
			line := c.line(t, fmt.Sprintf(`"closed connections that had not reached tcp_lb","listener":%q`, ports(d)[0]))
			require.Equal(t, "warn", line["level"])
			require.Contains(t, line, "handshake_timeout_count")
			c.mu.Lock()
			defer c.mu.Unlock()
			require.NotContains(t, strings.Join(c.log, "\n"), "too many open files")
		})
	}
}

// Thousands that connect and leave, and others that are served all the while.
func TestTenThousandSilentConnects(t *testing.T) {
	d := newDoors(t)
	c := d.child(t, `"10s"`)
	before := c.openFiles(t)
	const clients, atATime = 10_000, 50
	var wg sync.WaitGroup
	next := make(chan struct{}, clients)
	for range clients {
		next <- struct{}{}
	}
	close(next)
	failed := make(chan error, clients)
	for range atATime {
		wg.Go(func() {
			for range next {
				conn, err := net.DialTimeout("tcp", d.secure, hangTimeout)
				if err != nil {
					failed <- err
					continue
				}
				_ = conn.(*net.TCPConn).SetLinger(0)
				_ = conn.Close()
			}
		})
	}
	rounds := 0
	for ; len(next) > 0; rounds++ {
		requireServed(t, d.plain, "meanwhile")
	}
	require.Positive(t, rounds)
	wg.Wait()
	require.Empty(t, failed)
	requireServed(t, d.plain, "afterwards")
	eventually(t, func() bool { return c.openFiles(t) <= before+2 }, "files are free again")
}

// Whatever a client does instead of shaking hands, its time is the same.
func TestHandshakeTimeout(t *testing.T) {
	watchLeftovers(t)
	d := newDoors(t)
	d.run(t, `"300ms"`)
	hello := clientHello(t)
	over := func() float64 { return turnedAwayHere(t, d.secure, "handshake_timeout") }

	began := time.Now()
	expectReset(t, dialClient(t, d.secure))
	require.GreaterOrEqual(t, time.Since(began), 300*time.Millisecond)
	eventually(t, func() bool { return over() == 1 }, "counted")

	stops := dialClient(t, d.secure)
	write(t, stops, hello[:len(hello)/2])
	expectReset(t, stops)
	eventually(t, func() bool { return over() == 2 }, "counted")

	trickles := dialClient(t, d.secure)
	sent := 0
	for ; sent < len(hello); sent++ {
		if _, err := io.WriteString(trickles, hello[sent:sent+1]); err != nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	require.Less(t, sent, len(hello), "it does not help to send a little")
	eventually(t, func() bool { return over() == 3 }, "counted")

	goes := dialClient(t, d.secure)
	require.NoError(t, goes.Close())
	many := silent(t, d.secure, 50)
	for _, c := range many {
		expectReset(t, c)
	}
	eventually(t, func() bool { return over() == 53 }, "counted, but not who left by himself")
	require.Zero(t, turnedAwayHere(t, d.secure, "files_short"))
	require.Zero(t, metric(t, "connections_total", nil))
}

// clientHello is the first message of a TLS handshake.
func clientHello(t testing.TB) string {
	t.Helper()
	client, server := net.Pipe()
	go func() { // ends when server is closed
		_ = tls.Client(client, &tls.Config{ServerName: "lb.test"}).Handshake()
	}()
	b := make([]byte, 16<<10)
	n, err := server.Read(b)
	require.NoError(t, err)
	require.NoError(t, server.Close())
	return string(b[:n])
}

// Whoever may stay without coming to tcp_lb is let be: HTTP's connections, those
// of a server with other routes, and those that have reached tcp_lb.
func TestHandshakeTimeoutSparesOthers(t *testing.T) {
	watchLeftovers(t)
	d := newDoors(t)
	d.run(t, `"200ms"`)
	get := func(c net.Conn) {
		t.Helper()
		write(t, c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		b := make([]byte, 4096)
		n, err := c.Read(b)
		require.NoError(t, err)
		require.Contains(t, string(b[:n]), "hello")
	}
	keepAlive, unasked := dialClient(t, d.http), dialClient(t, d.http)
	get(keepAlive)
	echoes, unheard := dialClient(t, d.mixed), dialClient(t, d.mixed)
	write(t, echoes, "not ssh")
	expect(t, echoes, "not ssh")
	served := dialClient(t, d.plain)
	secure := d.secureDial(t)

	for range 3 { // connections after them run out of time
		expectReset(t, dialClient(t, d.secure))
	}
	get(keepAlive)
	get(unasked)
	for _, c := range []net.Conn{echoes, served, secure, unheard} {
		write(t, c, "still here")
		expect(t, c, "still here")
	}
	require.EqualValues(t, 3, metric(t, "listener_connections_closed_total", nil))
}

// A client that takes its time, but not more, is served.
func TestSlowHandshake(t *testing.T) {
	watchLeftovers(t)
	d := newDoors(t)
	d.run(t, `"20s"`)
	slow := &slowConn{Conn: dialClient(t, d.secure)}
	c := tls.Client(slow, &tls.Config{RootCAs: d.roots, ServerName: "lb.test"})
	require.NoError(t, c.Handshake())
	write(t, c, "x")
	expect(t, c, "x")
	require.Greater(t, slow.pieces, 50)
	require.NoError(t, c.Close())
	require.Zero(t, metric(t, "listener_connections_closed_total", nil))
}

// slowConn sends what it is given in small pieces.
type slowConn struct {
	net.Conn
	pieces int
}

func (c *slowConn) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = c.Conn.Write(b[n:min(n+10, len(b))])
		n += m
		c.pieces++
		time.Sleep(time.Millisecond)
	}
	return n, err
}

// Over a reload, connections on their way keep the time they had, and those
// that come have the new config's.
func TestReloadWhileClientsAreOnTheirWay(t *testing.T) {
	watchLeftovers(t)
	d := newDoors(t)
	d.run(t, `"1h"`)
	patient := silent(t, d.secure, 2)
	eventually(t, func() bool { return onTheirWay() == 2 }, "accepted")
	reload(t, d.config(`"disabled":true`, `"200ms"`))
	d.acceptsAnew(t)
	expectReset(t, dialClient(t, d.secure))
	eventually(t, func() bool { return turnedAwayHere(t, d.secure, "handshake_timeout") == 1 }, "counted")
	require.Equal(t, 2, onTheirWay())
	for _, conn := range patient {
		c := tls.Client(conn, &tls.Config{RootCAs: d.roots, ServerName: "lb.test"})
		write(t, c, "x")
		expect(t, c, "x")
	}

	hasty := dialClient(t, d.secure)
	eventually(t, func() bool { return onTheirWay() == 1 }, "accepted")
	reload(t, d.config(`"disabled":true`, `0`))
	d.acceptsAnew(t)
	unlimited := dialClient(t, d.secure)
	expectReset(t, hasty)
	eventually(t, func() bool { return onTheirWay() == 1 }, "accepted")
	require.EqualValues(t, 2, turnedAwayHere(t, d.secure, "handshake_timeout"), "counting goes on")
	c := tls.Client(unlimited, &tls.Config{RootCAs: d.roots, ServerName: "lb.test"})
	write(t, c, "x")
	expect(t, c, "x")

	require.Equal(t, 4*3, countSeries(t, "tcp_lb_listener_connections_closed_total"))
	reload(t, layer4Config(""))
	// An HTTP server's, which Caddy shuts down beside the load, may be there a little longer.
	eventually(t, func() bool { return countSeries(t, "tcp_lb_listener_connections_closed_total") == 0 }, "they end with the listener")
}

// acceptsAnew waits until the newest config accepts: the one before may
// do so a last time just when it is closed.
func (d *doors) acceptsAnew(t testing.TB) {
	t.Helper()
	app, err := caddy.ActiveContext().AppIfConfigured("tcp_lb")
	require.NoError(t, err)
	eventually(t, func() bool { return listener.Accepting(d.secure) == app.(*App).waiting }, "the new config accepts")
}

func countSeries(t testing.TB, name string) int {
	t.Helper()
	return strings.Count(exposition(t), "\n"+name+"{")
}

// Connections on their way don't hold up an exit.
func TestExitWhileClientsAreOnTheirWay(t *testing.T) {
	d := newDoors(t)
	c := d.child(t, `"1h"`)
	quiet := silent(t, d.secure, 300)
	requireServed(t, d.plain, "before")
	c.signal(t, terminate)
	require.Zero(t, c.wait(t))
	for _, conn := range quiet {
		_, err := conn.Read(make([]byte, 1))
		require.Error(t, err)
	}
}

// HTTP's keep-alive connections take one file each of a share, and the balancer
// keeps the rest.
func TestHTTPTakesOneFileEach(t *testing.T) {
	watchLeftovers(t)
	d := newDoors(t)
	d.run(t, `"10s"`)
	before := files.Process.Used()
	c := dialClient(t, d.http)
	eventually(t, func() bool { return files.Process.Used() == before+1 && files.Process.Guests() == 1 }, "one file")
	mixed := dialClient(t, d.mixed)
	eventually(t, func() bool { return files.Process.Used() == before+3 && files.Process.Guests() == 3 }, "a pair")
	write(t, mixed, "SSH-2.0-test\r\n")
	expect(t, mixed, "SSH-2.0-test\r\n")
	require.EqualValues(t, 1, files.Process.Guests(), "it came to tcp_lb")
	require.Equal(t, before+3, files.Process.Used())

	share := max(files.PerConnection, files.Process.Limit()/2) - files.Process.Guests()
	require.True(t, files.Process.AcquireForGuest(share))
	expectEOF(t, dialClient(t, d.http))
	expectEOF(t, dialClient(t, d.mixed))
	files.Process.ReleaseOfGuest(share)
	eventually(t, func() bool {
		return turnedAwayHere(t, d.http, "max_connections") == 1 && turnedAwayHere(t, d.mixed, "max_connections") == 1
	}, "counted")
	resp, err := http.Get("http://" + d.http)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	http.DefaultClient.CloseIdleConnections()
	require.NoError(t, c.Close())
	require.NoError(t, mixed.Close())
}

// A connection that was cut off just before it reached the handler is not
// served any more.
func TestCutOffBeforeTheHandler(t *testing.T) {
	watchLeftovers(t)
	w := listener.NewWaitingList(time.Millisecond)
	t.Cleanup(w.Close)
	lb := freeAddress(t)
	ln, err := listener.Listen(t.Context(), lb, net.ListenConfig{}, listener.Arrivals{Waiting: w}, zap.NewNop)
	require.NoError(t, err)
	defer ln.Close()
	client := dialClient(t, lb)
	c, err := ln.Accept()
	require.NoError(t, err)
	expectReset(t, client)
	h := handlerOf(t, `{"name":"web"}`) // which has no pool, and must not ask for it
	require.NoError(t, h.Handle(layer4Connection(c), nil))
	require.False(t, c.(*listener.Conn).Arrive())
	require.Error(t, c.Close())
}
