package tcplb

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

func TestExit(t *testing.T) {
	for _, c := range []struct {
		name    string
		stop    func(t *testing.T, c *child, admin string)
		network string
		reloads int
	}{
		{"interrupt", func(t *testing.T, c *child, _ string) { c.signal(t, os.Interrupt) }, "", 0},
		{"terminate", func(t *testing.T, c *child, _ string) { c.signal(t, terminate) }, "", 0},
		{"caddy stop", func(t *testing.T, c *child, admin string) { c.stopByAdmin(t, admin) }, "", 0},
		{"interrupt after reloads", func(t *testing.T, c *child, _ string) { c.signal(t, os.Interrupt) }, "tcp_lb/", 3},
		{"terminate after reloads", func(t *testing.T, c *child, _ string) { c.signal(t, terminate) }, "tcp_lb/", 3},
		{"caddy stop after reloads", func(t *testing.T, c *child, admin string) { c.stopByAdmin(t, admin) }, "tcp_lb/", 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // each has a process of its own
			testExit(t, c.network, c.reloads, c.stop)
		})
	}
}

func testExit(t *testing.T, network string, reloads int, stop func(*testing.T, *child, string)) {
	s, other := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := func(round int) string {
		backends := backendsJSON(s.address)
		if round%2 == 1 {
			backends = backendsJSON(s.address, other.address)
		}
		options := fmt.Sprintf(`"name":"web","dial_timeout":"%ds","drain_timeout":"5s",`, 1+round)
		return strings.Replace(adminConfig(admin, web, network+lb, options+backends+"}"), `"PANIC"`, `"INFO"`, 1)
	}
	c := startChild(t, config(0))
	eventually(t, func() bool { return listens(lb) }, "listening")
	ends, stays := dialClient(t, lb), dialClient(t, lb)
	for _, conn := range []*net.TCPConn{ends, stays} {
		write(t, conn, "x")
		expect(t, conn, "x")
	}
	for round := range reloads {
		status, body := request(t, http.MethodPost, "http://"+admin+"/load", config(round+1))
		require.Equal(t, 200, status, body)
	}
	stop(t, c, admin)
	eventually(t, func() bool { return !listens(lb) }, "new connections are refused")
	write(t, ends, "the rest of the stream")
	require.NoError(t, ends.CloseWrite())
	expect(t, ends, "the rest of the stream")
	expectEOF(t, ends)
	one := fmt.Sprintf(`tcp_lb_connections_active{backend=%q,lb="web"} 1`, s.address)
	eventually(t, func() bool {
		status, body := request(t, http.MethodGet, "http://"+admin+"/metrics", "")
		return status == 200 && strings.Contains(body, one)
	}, "metrics that are served to the end, and say that one is left")
	expectReset(t, stays)
	require.Equal(t, 0, c.wait(t))
	line := c.line(t, `"pool ended"`)
	require.EqualValues(t, 1, line["cut_by_drain_timeout"])
	require.EqualValues(t, "web", line["lb"])
	require.EqualValues(t, len("x")*2+len("the rest of the stream"), line["sent_bytes"])
}

func TestSecondInterruptEndsAtOnce(t *testing.T) {
	s := echoServer(t)
	lb := freeAddress(t)
	config := strings.Replace(lbConfig(lb, `"drain_timeout":"1h",`+backendsJSON(s.address)+"}"), `"ERROR"`, `"INFO"`, 1)
	c := startChild(t, config)
	eventually(t, func() bool { return listens(lb) }, "listening")
	conn := dialClient(t, lb)
	write(t, conn, "x")
	expect(t, conn, "x")
	c.signal(t, os.Interrupt)
	c.line(t, "waiting for open connections")
	c.signal(t, os.Interrupt)
	require.Equal(t, caddy.ExitCodeForceQuit, c.wait(t))
}

// Another SIGTERM says that there is no time left: what is open is cut, and
// counted.
func TestSecondTerminateEndsAtOnce(t *testing.T) {
	s := echoServer(t)
	lb := freeAddress(t)
	config := strings.Replace(lbConfig(lb, `"drain_timeout":"1h",`+backendsJSON(s.address)+"}"), `"ERROR"`, `"INFO"`, 1)
	c := startChild(t, config)
	eventually(t, func() bool { return listens(lb) }, "listening")
	conn := hold(t, lb)
	c.signal(t, terminate)
	c.line(t, "waiting for open connections")
	c.signal(t, terminate)
	expectReset(t, conn)
	require.Equal(t, 0, c.wait(t))
	require.EqualValues(t, 1, c.line(t, `"pool ended"`)["cut_by_drain_timeout"])
}

// What an earlier config promised to a backend that it removed ends with the
// drain timeout of the exit.
func TestExitEndsOlderDrains(t *testing.T) {
	a, b := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := func(drain string, addresses ...string) string {
		return strings.Replace(adminConfig(admin, web, "tcp_lb/"+lb, fmt.Sprintf(`"name":"web","drain_timeout":%q,%s}`,
			drain, backendsJSON(addresses...))), `"PANIC"`, `"INFO"`, 1)
	}
	c := startChild(t, config("1h", a.address, b.address))
	eventually(t, func() bool { return listens(lb) }, "listening")
	held := []*net.TCPConn{hold(t, lb), hold(t, lb), hold(t, lb), hold(t, lb)}
	for _, drain := range []string{"1h", "100ms"} { // b leaves with the first
		status, body := request(t, http.MethodPost, "http://"+admin+"/load", config(drain, a.address))
		require.Equal(t, 200, status, body)
	}
	c.line(t, "backend left the config, draining")
	c.signal(t, terminate)
	require.Less(t, c.line(t, "waiting for open connections")["at_most"], 2.0)
	for _, conn := range held {
		expectReset(t, conn)
	}
	require.Equal(t, 0, c.wait(t))
	require.EqualValues(t, 4, c.line(t, `"pool ended"`)["cut_by_drain_timeout"])
}

// An exit of a config without a pool leaves the pools of earlier ones their time.
func TestExitKeepsDrainsOfRemovedPools(t *testing.T) {
	s := echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	with := strings.Replace(adminConfig(admin, web, "tcp_lb/"+lb, `"name":"web","drain_timeout":"1h",`+backendsJSON(s.address)+"}"), `"PANIC"`, `"INFO"`, 1)
	c := startChild(t, with)
	eventually(t, func() bool { return listens(lb) }, "listening")
	conn := hold(t, lb)
	without := regexp.MustCompile(`\{"handler":"tcp_lb",.*?\]\}`).ReplaceAllString(with, `{"handler":"echo"}`)
	require.NotContains(t, without, `"tcp_lb",`)
	status, body := request(t, http.MethodPost, "http://"+admin+"/load", without)
	require.Equal(t, 200, status, body)
	c.line(t, "pool left the config")
	c.signal(t, terminate)
	require.Greater(t, c.line(t, "waiting for open connections")["at_most"], 3000.0)
	write(t, conn, "still here")
	expect(t, conn, "still here")
	c.signal(t, terminate)
	expectReset(t, conn)
	require.Equal(t, 0, c.wait(t))
	require.EqualValues(t, 1, c.line(t, `"pool ended"`)["cut_by_drain_timeout"])
}

// Caddy stops its apps one after the other, and an HTTP server waits for its
// requests. Connections are drained meanwhile.
func TestExitDoesNotWaitForHTTP(t *testing.T) {
	for i := range 4 { // Caddy's order is at random
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			s, silent := echoServer(t), startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
			admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
			config := adminConfig(admin, web, "tcp_lb/"+lb, `"name":"web","drain_timeout":"100ms",`+backendsJSON(s.address)+"}")
			config = strings.Replace(config, `{"handler":"tcp_lb_health"}`, fmt.Sprintf(`{"handler":"reverse_proxy","upstreams":[{"dial":%q}]}`, silent.address), 1)
			c := startChild(t, config)
			eventually(t, func() bool { return listens(lb) && listens(web) }, "listening")
			asks := dialClient(t, web)
			write(t, asks, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
			eventually(t, func() bool { return silent.acceptedCount() == 1 }, "a request that is not answered")
			conn := hold(t, lb)
			c.signal(t, terminate)
			expectReset(t, conn)
		})
	}
}
