//go:build unix

package tcplb

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestPoliciesBesidePeers puts the policies beside those of HAProxy and nginx
// which have the same: the same connections, the same weights, the same backend
// down. It logs the table of docs/policies.md.
func TestPoliciesBesidePeers(t *testing.T) {
	for _, name := range []string{"haproxy", "nginx"} {
		if _, err := exec.LookPath(name); err != nil {
			skipWithout(t, name)
		}
	}
	module := "/usr/lib/nginx/modules/ngx_stream_module.so"
	if _, err := os.Stat(module); err != nil {
		skipWithout(t, "nginx's stream module")
	}
	var rows [][]string
	for _, c := range []struct{ policy, haproxy, nginx string }{
		{"round_robin", "roundrobin", ""},
		{"least_conn", "leastconn", "least_conn;"},
		{"random", "random(1)", "random;"},
		{"random_choose", "random(2)", "random two least_conn;"},
		{"first", "first", ""},
		{"ip_hash", "source\nhash-type consistent", "hash $remote_addr consistent;"},
	} {
		ours := policyShares(t, startOurs, c.policy)
		row := []string{c.policy, ours.String(), policyShares(t, startHAProxy, c.haproxy).String(), "–"}
		if c.nginx != "" || c.policy == "round_robin" {
			row[3] = policyShares(t, startNginx(module), c.nginx).String()
		}
		rows = append(rows, row)
		require.Zero(t, ours.failed, c.policy)
		sum := ours.held[0] + ours.held[1] + ours.held[2]
		switch c.policy {
		case "round_robin", "least_conn":
			require.Equal(t, [3]int{60, 40, 20}, ours.held, c.policy)
			for i, want := range []int{75, 0, 25} {
				require.InDelta(t, want, ours.down[i], 2, "%s: %v", c.policy, ours.down)
			}
		case "first":
			require.Equal(t, [3]int{120, 0, 0}, ours.held, c.policy)
		case "ip_hash": // one client has one backend
			require.Contains(t, ours.held, sum, c.policy)
		}
	}
	t.Log("\n| policy | tcp_lb | HAProxy | nginx |\n|---|---|---|---|")
	for _, r := range rows {
		t.Logf("| `%s` | %s |", r[0], strings.Join(r[1:], " | "))
	}
}

// shares are how many connections each of three backends got, of weights 3, 2
// and 1.
type shares struct {
	held   [3]int // of 120 that stay open
	short  [3]int // of 120 that end before the next one comes
	down   [3]int // of 100 short ones while the second is down
	failed int    // of those 100
}

func (s shares) String() string {
	return fmt.Sprintf("%s · %s · %s", triple(s.held), triple(s.short), triple(s.down))
}

func triple(n [3]int) string { return fmt.Sprintf("%d/%d/%d", n[0], n[1], n[2]) }

// startBalancer starts one on the address, over the backends, with a policy in
// its own words.
type startBalancer func(t testing.TB, address string, backends []string, policy string)

func policyShares(t *testing.T, start startBalancer, policy string) shares {
	t.Helper()
	var result shares
	t.Run(strings.Fields(policy + " default")[0], func(t *testing.T) {
		var addresses []string
		servers := make([]*server, 3)
		for i := range servers {
			servers[i] = startServer(t, func(c *net.TCPConn) { // tells its number, and stays
				_, _ = io.WriteString(c, strconv.Itoa(i))
				_, _ = io.Copy(io.Discard, c)
			})
			addresses = append(addresses, servers[i].address)
		}
		address := freeAddress(t)
		start(t, address, addresses, policy)
		connect := func() (net.Conn, int) {
			c, err := net.Dial("tcp", address)
			if err != nil {
				return nil, -1
			}
			_ = c.SetDeadline(time.Now().Add(hangTimeout))
			b := make([]byte, 1)
			if _, err := io.ReadFull(c, b); err != nil {
				_ = c.Close()
				return nil, -1
			}
			return c, int(b[0] - '0')
		}
		require.Eventually(t, func() bool {
			c, n := connect()
			if n >= 0 {
				_ = c.Close()
			}
			return n >= 0
		}, hangTimeout, 20*time.Millisecond, "it does not start")

		var open []net.Conn
		for range 120 {
			c, n := connect()
			require.GreaterOrEqual(t, n, 0)
			open = append(open, c)
			result.held[n]++
		}
		for i, c := range open {
			finish(t, c, len(open)-i-1)
		}
		short := func() int {
			c, n := connect()
			if n >= 0 {
				finish(t, c, 0)
			}
			return n
		}
		for range 120 {
			n := short()
			require.GreaterOrEqual(t, n, 0)
			result.short[n]++
		}
		servers[1].kill()
		for range 100 {
			if n := short(); n < 0 {
				result.failed++
			} else {
				result.down[n]++
			}
		}
	})
	return result
}

// finish ends a connection in order, and returns when the balancer has, too: when
// it passes the end on, and if it is ours when it counts so many.
func finish(t testing.TB, c net.Conn, left int) {
	t.Helper()
	require.NoError(t, c.(*net.TCPConn).CloseWrite())
	_, err := io.Copy(io.Discard, c)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool {
		var load int64
		for _, p := range registry.snapshot() {
			for _, b := range p.backends {
				load += b.Load()
			}
		}
		return load <= int64(left)
	}, hangTimeout, 100*time.Microsecond)
}

func startOurs(t testing.TB, address string, backends []string, policy string) {
	t.Helper()
	text := fmt.Sprintf("{\n\tadmin off\n\tlayer4 {\n\t\ttcp_lb/%s {\n\t\t\troute {\n\t\t\t\ttcp_lb {\n", address)
	for i, b := range backends {
		text += fmt.Sprintf("\t\t\t\t\tbackend %s %d\n", b, 3-i)
	}
	text += fmt.Sprintf("\t\t\t\t\tlb_policy %s\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n", policy)
	config, err := adapt(t, text)
	require.NoError(t, err)
	runCaddy(t, config)
}

func startHAProxy(t testing.TB, address string, backends []string, policy string) {
	t.Helper()
	config := "global\n\tmaxconn 1000\ndefaults\n\tmode tcp\n\ttimeout connect 2s\n\ttimeout client 1m\n\ttimeout server 1m\n\tretries 3\n\toption redispatch 1\n" +
		fmt.Sprintf("listen l\n\tbind %s\n\tbalance %s\n", address, strings.ReplaceAll(policy, "\n", "\n\t"))
	for i, b := range backends {
		config += fmt.Sprintf("\tserver s%d %s weight %d check inter 100ms\n", i, b, 3-i)
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	require.NoError(t, os.WriteFile(file, []byte(config), 0o600))
	runPeer(t, "haproxy", "-db", "-f", file)
}

func startNginx(module string) startBalancer {
	return func(t testing.TB, address string, backends []string, policy string) {
		t.Helper()
		dir := t.TempDir()
		config := fmt.Sprintf("daemon off;\nmaster_process off;\npid %s/pid;\nerror_log /dev/null;\nload_module %s;\nevents { worker_connections 1000; }\nstream {\n\tupstream u {\n\t\t%s\n", dir, module, policy)
		for i, b := range backends {
			config += fmt.Sprintf("\t\tserver %s weight=%d;\n", b, 3-i)
		}
		config += fmt.Sprintf("\t}\n\tserver { listen %s; proxy_pass u; proxy_half_close on; }\n}\n", address)
		file := filepath.Join(dir, "nginx.conf")
		require.NoError(t, os.WriteFile(file, []byte(config), 0o600))
		runPeer(t, "nginx", "-p", dir, "-c", file)
	}
}

// runPeer runs another balancer until the test ends.
func runPeer(t testing.TB, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, name, args...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
}
