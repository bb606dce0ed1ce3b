package tcplb

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// delayedConfig is one whose exit waits for so long.
func delayedConfig(admin, web, lb, delay, handler string) string {
	config := adminConfig(admin, web, lb, handler)
	config = strings.Replace(config, `"apps":{`, fmt.Sprintf(`"apps":{"tcp_lb":{"shutdown_delay":%q},`, delay), 1)
	return strings.Replace(config, `"PANIC"`, `"INFO"`, 1)
}

// healthOf asks the health endpoint; status 0 is no answer.
func healthOf(web string) (status int, health healthStatus) {
	r, err := send(http.MethodGet, "http://"+web+"/health", "")
	if err != nil {
		return 0, health
	}
	defer r.Body.Close()
	_ = json.NewDecoder(r.Body).Decode(&health)
	return r.StatusCode, health
}

// While an exit is delayed all goes on as before, but for the health endpoint, which
// says so; a second SIGTERM ends it at once. Caddy's order of apps is at random.
func TestShutdownDelay(t *testing.T) {
	for name, stop := range map[string]func(*testing.T, *child, string){
		"terminate":  func(t *testing.T, c *child, _ string) { c.signal(t, terminate) },
		"interrupt":  func(t *testing.T, c *child, _ string) { c.signal(t, os.Interrupt) },
		"caddy stop": func(t *testing.T, c *child, admin string) { c.stopByAdmin(t, admin) },
	} {
		for _, network := range []string{"", "tcp_lb/"} {
			t.Run(name+" "+network, func(t *testing.T) {
				t.Parallel() // each has a process of its own
				s := echoServer(t)
				admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
				c := startChild(t, delayedConfig(admin, web, network+lb, "1h", `"name":"web","drain_timeout":"1h",`+fastChecks+","+backendsJSON(s.address)+"}"))
				eventually(t, func() bool { status, _ := healthOf(web); return status == 200 }, "at work")
				old := hold(t, lb)
				stop(t, c, admin)
				eventually(t, func() bool { status, _ := healthOf(web); return status == 503 }, "it says that it exits")
				for range 3 {
					status, health := healthOf(web)
					require.Equal(t, 503, status)
					require.Equal(t, healthStatus{Status: "unavailable", ShuttingDown: true, Pools: []poolStatus{{"web", 1, 1}}}, health)
					echoed(t, lb, 10)
					status, body := request(t, http.MethodGet, "http://"+web+"/metrics", "")
					require.Equal(t, 200, status)
					require.Contains(t, body, "tcp_lb_connections_active")
				}
				young := hold(t, lb)
				write(t, old, "still here")
				expect(t, old, "still here")
				s.kill() // checks go on, too
				eventually(t, func() bool { _, health := healthOf(web); return health.Pools[0].Available == 0 }, "it is found down")
				expectReset(t, young)
				s.start()
				eventually(t, func() bool { _, health := healthOf(web); return health.Pools[0].Available == 1 }, "and up")
				last := hold(t, lb)
				c.signal(t, terminate)
				expectReset(t, last)
				require.Equal(t, 0, c.wait(t))
				require.EqualValues(t, 1, c.line(t, `"pool ended"`)["cut_by_drain_timeout"])
			})
		}
	}
}

// Then listening stops and connections are drained; not before, whichever app Caddy
// stops first.
func TestShutdownDelayEnds(t *testing.T) {
	const delay = time.Second
	for i := range 4 { // Caddy's order is at random
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			s := echoServer(t)
			admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
			c := startChild(t, delayedConfig(admin, web, "tcp_lb/"+lb, delay.String(), `"name":"web","drain_timeout":"1h",`+checksDisabled+","+backendsJSON(s.address)+"}"))
			eventually(t, func() bool { status, _ := healthOf(web); return status == 200 }, "at work")
			conn := hold(t, lb)
			began := time.Now()
			c.signal(t, terminate)
			eventually(t, func() bool { status, _ := healthOf(web); return status != 200 }, "it exits")
			for {
				status, _ := healthOf(web)
				open := listens(lb)
				if status == 503 && open {
					continue
				}
				require.GreaterOrEqual(t, time.Since(began), delay, "status %d, listening: %v", status, open)
				break
			}
			c.line(t, "waiting for open connections")
			require.False(t, listens(lb))
			write(t, conn, "drained in peace")
			expect(t, conn, "drained in peace")
			require.NoError(t, conn.Close())
			require.Equal(t, 0, c.wait(t))
			require.EqualValues(t, 0, c.line(t, `"pool ended"`)["cut_by_drain_timeout"])
		})
	}
}

// Caddy waits for HTTP requests, without a limit unless one is set. A second SIGTERM
// cuts what is open here all the same.
func TestSecondTerminateBesideARequest(t *testing.T) {
	s, silent := echoServer(t), startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := delayedConfig(admin, web, "tcp_lb/"+lb, "100ms", `"name":"web","drain_timeout":"1h",`+checksDisabled+","+backendsJSON(s.address)+"}")
	config = replaceOnce(t, config, `{"handler":"tcp_lb_health"}`, fmt.Sprintf(`{"handler":"reverse_proxy","upstreams":[{"dial":%q}]}`, silent.address))
	c := startChild(t, config)
	eventually(t, func() bool { return listens(lb) && listens(web) }, "listening")
	write(t, dialClient(t, web), "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
	eventually(t, func() bool { return silent.acceptedCount() == 1 }, "a request that is not answered")
	conn := hold(t, lb)
	c.signal(t, terminate)
	c.line(t, "servers shutting down")
	c.signal(t, terminate)
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

// A config that comes during the delay has to wait for its end, and is refused then: it
// would listen again.
func TestNoConfigStartsDuringAnExit(t *testing.T) {
	s := echoServer(t)
	admin, web, lb, later := freeAddress(t), freeAddress(t), freeAddress(t), freeAddress(t)
	config := func(lb string) string {
		return delayedConfig(admin, web, "tcp_lb/"+lb, "500ms", `"name":"web","drain_timeout":"1h",`+checksDisabled+","+backendsJSON(s.address)+"}")
	}
	c := startChild(t, config(lb))
	eventually(t, func() bool { return listens(lb) }, "listening")
	conn := hold(t, lb)
	c.signal(t, terminate)
	c.line(t, "listening goes on for the delay")
	status, body := request(t, http.MethodPost, "http://"+admin+"/load", config(later))
	require.Equal(t, 400, status)
	require.Contains(t, body, "the process is exiting")
	c.line(t, "waiting for open connections")
	require.False(t, listens(later))
	write(t, conn, "drained in peace")
	expect(t, conn, "drained in peace")
	require.NoError(t, conn.Close())
	require.Equal(t, 0, c.wait(t))
}

// A second Ctrl+C is Caddy's own, also in the delay.
func TestSecondInterruptEndsTheDelay(t *testing.T) {
	s := echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	c := startChild(t, delayedConfig(admin, web, lb, "1h", backendsJSON(s.address)+"}"))
	eventually(t, func() bool { return listens(lb) }, "listening")
	c.signal(t, os.Interrupt)
	c.line(t, "listening goes on for the delay")
	c.signal(t, os.Interrupt)
	require.Equal(t, caddy.ExitCodeForceQuit, c.wait(t))
}

// A reload, or an end of the config without one of the process, is not delayed. A
// process without pools is.
func TestShutdownDelayIsOfExits(t *testing.T) {
	t.Run("reload", func(t *testing.T) {
		s, lb := echoServer(t), freeAddress(t)
		config := strings.Replace(lbConfig(lb, backendsJSON(s.address)+"}"), `"apps":{`, `"apps":{"tcp_lb":{"shutdown_delay":"1h"},`, 1)
		runCaddy(t, config)
		for range 3 {
			reload(t, config)
			echoed(t, lb, 1)
		}
	})
	t.Run("no pools", func(t *testing.T) {
		admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
		config := delayedConfig(admin, web, lb, "1h", toNowhere)
		config = replaceOnce(t, config, withHandler(toNowhere), `{"handler":"echo"}`)
		c := startChild(t, config)
		eventually(t, func() bool { status, _ := healthOf(web); return status == 200 }, "there is nothing to be down")
		c.signal(t, terminate)
		eventually(t, func() bool { status, health := healthOf(web); return status == 503 && health.ShuttingDown }, "it says so")
		c.signal(t, terminate)
		require.Equal(t, 0, c.wait(t))
	})
}
