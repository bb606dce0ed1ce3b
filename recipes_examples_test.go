//go:build unix

package tcplb

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// runExample runs a Caddyfile of examples/ with some of its text replaced: old,
// new, and so on. Its site is at a port of its own.
func runExample(t testing.TB, file string, replacements ...string) {
	t.Helper()
	text := readFile(t, file)
	for i := 0; i < len(replacements); i += 2 {
		require.Contains(t, text, replacements[i])
		text = strings.ReplaceAll(text, replacements[i], replacements[i+1])
	}
	config := snippetConfig(t, text)
	require.Contains(t, config, "127.0.0.1:9090")
	noPoolsYet(t)
	runCaddy(t, strings.ReplaceAll(config, "127.0.0.1:9090", freeAddress(t)))
}

// awaitAvailable waits until these backends of the pool are available, and no
// others.
func awaitAvailable(t testing.TB, pool string, addresses ...string) {
	t.Helper()
	eventually(t, func() bool {
		for _, m := range registry.newest(pool).members() {
			if m.Backend.Available() != slices.Contains(addresses, m.Backend.address) {
				return false
			}
		}
		return true
	}, "%s has %q, others have %v", pool, addresses, lazily(func() any { return lastErrors(pool) }))
}

// awaitChecks waits until a backend has been checked so many times more.
func awaitChecks(t testing.TB, address string, n float64) {
	t.Helper()
	checks := func() float64 { return metric(t, "health_checks_total", labels("backend", address)) }
	from := checks()
	eventually(t, func() bool { return checks() >= from+n }, "%v checks of %s", n, address)
}

// logged is what a server that logs to its output has said.
func (s *realServer) logged(t testing.TB) string {
	t.Helper()
	return readFile(t, s.running.output)
}

// serverUser is who runs a server that need not be root: its name, and how a
// command becomes it.
func serverUser(t testing.TB) (name, group string, as *syscall.Credential) {
	t.Helper()
	as = unprivileged(t)
	uid, gid := os.Getuid(), os.Getgid()
	if as != nil {
		uid, gid = int(as.Uid), int(as.Gid)
	}
	u, err := user.LookupId(strconv.Itoa(uid))
	require.NoError(t, err)
	g, err := user.LookupGroupId(strconv.Itoa(gid))
	require.NoError(t, err)
	return u.Username, g.Name, as
}

// writeFile writes a server's file and returns its name.
func writeFile(t testing.TB, dir, name, content string, as *syscall.Credential) string {
	t.Helper()
	name = filepath.Join(dir, name)
	require.NoError(t, os.WriteFile(name, []byte(content), 0o600))
	own(t, name, as)
	return name
}

func own(t testing.TB, name string, as *syscall.Credential) {
	t.Helper()
	if as != nil {
		require.NoError(t, os.Chown(name, int(as.Uid), int(as.Gid)))
	}
}

// serverFile writes certificate and key of a server to one file, which it returns.
func (a *issuer) serverFile(dir, name string, notAfter time.Time, as *syscall.Credential) string {
	a.t.Helper()
	c := a.named(name, notAfter)
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	require.NoError(a.t, err)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})
	return writeFile(a.t, dir, "server.pem", string(text)+string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})), as)
}

// named makes a certificate for a name alone.
func (a *issuer) named(name string, notAfter time.Time) tls.Certificate {
	return a.issue(func(c *x509.Certificate) { c.IPAddresses, c.DNSNames, c.NotAfter = nil, []string{name}, notAfter })
}

// speaks is a server that has a certificate for the name, says what it has to
// say, and closes.
func (a *issuer) speaks(name, text string) func(*net.TCPConn) {
	config := &tls.Config{Certificates: []tls.Certificate{a.named(name, time.Now().Add(time.Hour))}}
	return func(c *net.TCPConn) {
		conn := tls.Server(c, config)
		_, _ = io.WriteString(conn, text)
		_ = conn.CloseWrite()
	}
}
