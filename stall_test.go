package tcplb

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// stalledServer reads nothing of what it is sent.
func stalledServer(t testing.TB) *server {
	t.Helper()
	stop := make(chan struct{})
	s := startServer(t, func(*net.TCPConn) { <-stop })
	t.Cleanup(func() { close(stop) }) // before the server is killed
	return s
}

// upload sends to the balancer until nobody takes any more.
func upload(t testing.TB, lb string) *net.TCPConn {
	t.Helper()
	c := dialClient(t, lb)
	flood(t, c)
	return c
}

func TestStalledUploadIsIdle(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			s := stalledServer(t)
			lb := freeAddress(t)
			runCaddy(t, lbConfig(network+lb, `"idle_timeout":"500ms",`+backendsJSON(s.address)+"}"))
			c := dialClient(t, lb)
			err := error(nil)
			for err == nil { // in the middle of a write, at the latest
				_, err = c.Write(make([]byte, 1<<20))
			}
			require.ErrorIs(t, err, syscall.ECONNRESET)
			requireBooksBalance(t, 1)
			require.EqualValues(t, 1, closedFor(t, s, reasonIdleTimeout))
		})
	}
}

func TestStalledUploadsOfARemovedBackend(t *testing.T) {
	watchLeftovers(t)
	removed, stays := stalledServer(t), stalledServer(t)
	lb := freeAddress(t)
	config := func(addresses ...string) string {
		return lbConfig("tcp_lb/"+lb, `"drain_timeout":"200ms",`+backendsJSON(addresses...)+"}")
	}
	runCaddy(t, config(removed.address))
	var stalled []*net.TCPConn
	for range 5 {
		stalled = append(stalled, upload(t, lb))
	}
	eventually(t, func() bool { return metric(t, "connections_active", nil) == 5 }, "all are open")
	reload(t, config(stays.address))
	for _, c := range stalled {
		expectReset(t, c)
	}
	eventually(t, func() bool { return open.n.Load() == 0 }, "all have ended")
}

func TestExitWithAStalledUpload(t *testing.T) {
	s := stalledServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	c := startChild(t, strings.Replace(adminConfig(admin, web, "tcp_lb/"+lb,
		`"name":"web","drain_timeout":"500ms",`+backendsJSON(s.address)+"}"), `"PANIC"`, `"INFO"`, 1))
	c.line(t, "serving initial configuration")
	stalled := upload(t, lb)
	active := fmt.Sprintf(`tcp_lb_connections_active{backend=%q,lb="web"} 1`, s.address)
	eventually(t, func() bool {
		_, body := request(t, http.MethodGet, "http://"+admin+"/metrics", "")
		return strings.Contains(body, active)
	}, "one is open")
	c.signal(t, terminate)
	_, err := io.ReadAll(stalled)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.Equal(t, 0, c.wait(t))
	require.EqualValues(t, 1, c.line(t, `"pool ended"`)["cut_by_drain_timeout"])
}
