//go:build unix

package tcplb

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestReadyzByHTTPS has servers asked whether they are ready, and who they are.
// nginx is what an API server is to a balancer.
func TestReadyzByHTTPS(t *testing.T) {
	requirePrograms(t, "/usr/sbin", "nginx", "nginx")
	ca, dir := newIssuer(t), t.TempDir()
	later, ago := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	servers, wrong := []*apiServer{}, map[string]string{}
	for i, c := range []struct {
		ca    *issuer
		name  string
		until time.Time
		wrong string
	}{
		{ca, "kubernetes", later, ""},
		{ca, "kubernetes", later, ""},
		{newIssuer(t), "kubernetes", later, "signed by unknown authority"},
		{ca, "somebody-else", later, "valid for somebody-else, not kubernetes"},
		{ca, "kubernetes", ago, "certificate has expired"},
	} {
		a := &apiServer{name: fmt.Sprint("server ", i), dir: filepath.Join(dir, fmt.Sprint(i))}
		require.NoError(t, os.Mkdir(a.dir, 0o700))
		a.certificate = c.ca.serverFile(a.dir, c.name, c.until, nil)
		a.address = freeAddress(t)
		servers = append(servers, a)
		wrong[a.address] = c.wrong
	}
	log := startAPIServers(t, dir, servers)
	lb := freeAddress(t)
	runExample(t, "examples/apiserver/Caddyfile", "tcp_lb/:6443", "tcp_lb/"+lb, "{$API_CA:examples/apiserver/ca.pem}", ca.file,
		"10.0.7.1:6443", servers[0].address, "10.0.7.2:6443", servers[1].address, "10.0.7.3:6443", servers[2].address+" "+servers[3].address+" "+servers[4].address,
		"health_interval 3s", "health_interval 100ms", "close_if_unhealthy 30s", "close_if_unhealthy 100ms")
	first, second := servers[0], servers[1]
	awaitAvailable(t, "apiserver", first.address, second.address)
	for _, s := range servers[2:] {
		awaitChecks(t, s.address, 1)
	}
	for address, told := range lastErrors("apiserver") {
		require.Contains(t, told, wrong[address])
	}

	// Clients see the servers' own certificate.
	client := &http.Client{Timeout: hangTimeout, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.pool(), ServerName: "kubernetes"}}}
	t.Cleanup(client.CloseIdleConnections)
	ask := func() string {
		t.Helper()
		resp, err := client.Get("https://" + lb + "/who")
		require.NoError(t, err)
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return string(b)
	}
	// Who is not ready gets nobody, and has to let go of those it has.
	for range 2 {
		busy := ask()
		require.Equal(t, busy, ask(), "the connection is kept")
		from, to := first, second
		if busy == second.name {
			from, to = second, first
		}
		unready := filepath.Join(from.dir, "unready")
		require.NoError(t, os.WriteFile(unready, nil, 0o600))
		awaitAvailable(t, "apiserver", to.address)
		require.Equal(t, "HTTP 503, want 2xx", lastErrors("apiserver")[from.address])
		eventually(t, func() bool {
			return from.connections(t) == from.metric(t, "connections_closed_total", "reason", "backend_down")
		}, "its connection is cut")
		require.Equal(t, to.name, ask())
		require.NoError(t, os.Remove(unready))
		awaitAvailable(t, "apiserver", first.address, second.address)
		require.Equal(t, to.name, ask(), "and stays there")
	}
	require.NotContains(t, readFile(t, log), "[error]", "of checks nothing is logged but what is wrong")
	require.NotContains(t, readFile(t, log), "[crit]")
}

// apiServer is a server of one nginx.
type apiServer struct {
	realServer
	name, dir, certificate string
}

// startAPIServers runs an nginx that answers as all of them, and returns its log.
func startAPIServers(t testing.TB, dir string, servers []*apiServer) (log string) {
	t.Helper()
	var text strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&text, "server {\nlisten %s ssl;\nssl_certificate %s;\nssl_certificate_key %s;\n", s.address, s.certificate, s.certificate)
		fmt.Fprintf(&text, "location = /readyz {\nif (-f %s/unready) { return 503; }\nreturn 200 ok;\n}\nlocation = /who { return 200 %q; }\n}\n", s.dir, s.name)
	}
	log = filepath.Join(dir, "error.log")
	temps := ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temps += fmt.Sprintf("%s_temp_path %s/%s;\n", kind, dir, kind)
	}
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;\n" // whose directory it is
	}
	config := writeFile(t, dir, "nginx.conf", fmt.Sprintf("%sdaemon off;\npid %s/pid;\nerror_log %s notice;\nevents {}\nhttp {\naccess_log off;\n%s%s}\n",
		user, dir, log, temps, &text), nil)
	nginx := &realServer{
		address: servers[0].address,
		command: command{name: "nginx", args: []string{"-p", dir, "-e", log, "-c", config}},
		ready:   command{name: "test", args: []string{"-s", dir + "/pid"}},
	}
	nginx.start(t)
	for _, s := range servers {
		eventually(t, func() bool { return listens(s.address) }, "%s listens", s.name)
	}
	return log
}
