//go:build unix

package tcplb

import (
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestQuickStartInABrowser has a Chromium read the page of the quick start: it shows
// the backends, and finds nothing to complain of.
func TestQuickStartInABrowser(t *testing.T) {
	requirePrograms(t, "", "chromium", "chromium")
	text := readFile(t, "examples/quickstart/Caddyfile")
	web, lb := freeAddress(t), freeAddress(t)
	_, port, err := net.SplitHostPort(web)
	require.NoError(t, err)
	for old, with := range map[string]string{
		"tcp_lb/:8080": "tcp_lb/" + lb, "http://:9090": "http://:" + port, "{\n\tlayer4": "{\n\tadmin off\n\tpersist_config off\n\tlayer4",
	} {
		text = replaceOnce(t, text, old, with)
	}
	for _, n := range []string{"3001", "3002", "3003"} {
		_, backend, err := net.SplitHostPort(freeAddress(t))
		require.NoError(t, err)
		text = strings.ReplaceAll(text, n, backend)
	}
	config, err := adapt(t, text)
	require.NoError(t, err)
	runCaddy(t, config)
	eventually(t, func() bool {
		return strings.Contains(statusHTML(t, "http://"+web+"/"), "3 of 3 backends available")
	}, "checked")

	cmd := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
		"--disable-background-networking", "--enable-logging=stderr", "--user-data-dir="+t.TempDir(), "--dump-dom", "http://"+web+"/")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	var complaints strings.Builder
	cmd.Stderr = &complaints
	dom, err := cmd.Output()
	require.NoError(t, err, complaints.String())
	require.Contains(t, string(dom), "The pool is well: 3 of 3 backends available</bdi></h2>")
	require.Equal(t, 3, strings.Count(string(dom), `<b class="s well">up</b>`), string(dom))
	require.NotContains(t, complaints.String(), "CONSOLE")
}
