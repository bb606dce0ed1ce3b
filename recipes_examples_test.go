//go:build unix

package tcplb

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
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
	config, err := adapt(t, text)
	require.NoError(t, err)
	require.Contains(t, config, "127.0.0.1:9090")
	config = strings.ReplaceAll(config, "127.0.0.1:9090", freeAddress(t))
	noPoolsYet(t)
	runCaddy(t, strings.Replace(config, "{", `{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"ERROR"}}},`, 1))
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

// authority issues certificates.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its own certificate
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, pool: x509.NewCertPool()}
	text, key := a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "the test's CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	a.key = key
	block, _ := pem.Decode([]byte(text))
	var err error
	a.cert, err = x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	a.pool.AddCert(a.cert)
	a.file = writeFile(t, t.TempDir(), "ca.pem", text, nil)
	return a
}

// server writes certificate and key of a server to one file, which it returns.
func (a *authority) server(dir, name string, notAfter time.Time, as *syscall.Credential) string {
	a.t.Helper()
	text, key := a.issue(&x509.Certificate{DNSNames: []string{name}, NotAfter: notAfter, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(a.t, err)
	return writeFile(a.t, dir, "server.pem", text+string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), as)
}

func (a *authority) issue(c *x509.Certificate) (text string, key *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore = time.Now().Add(-24 * time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	require.NoError(a.t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), key
}

// speaks is a server that has a certificate for the name, says what it has to
// say, and closes.
func (a *authority) speaks(t testing.TB, name, text string) func(*net.TCPConn) {
	t.Helper()
	file := a.server(t.TempDir(), name, time.Now().Add(time.Hour), nil)
	certificate, err := tls.LoadX509KeyPair(file, file)
	require.NoError(t, err)
	config := &tls.Config{Certificates: []tls.Certificate{certificate}}
	return func(c *net.TCPConn) {
		conn := tls.Server(c, config)
		_, _ = io.WriteString(conn, text)
		_ = conn.CloseWrite()
	}
}
