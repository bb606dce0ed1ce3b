//go:build unix

package tcplb

import (
	"crypto/x509"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// pemFiles writes a certificate as files that are named in a command.
func (a *issuer) pemFiles(name string) (cert, key string) {
	a.t.Helper()
	var files []string
	for part := range strings.SplitSeq(a.files(a.issue(func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = []string{name}, nil })), `"`) {
		if filepath.IsAbs(part) {
			files = append(files, part)
		}
	}
	return files[0], files[1]
}

// TestRedisOverTLS has the example's balancer speak TLS to real servers that want a
// certificate of it; one without takes nothing from clients, and its checks know.
func TestRedisOverTLS(t *testing.T) {
	requirePrograms(t, "", "redis-server redis-tools", "redis-server", "redis-cli")
	a := newIssuer(t)
	cert, key := a.pemFiles("cache.internal")
	s := &realServer{address: freeAddress(t)}
	s.command = command{name: "redis-server", args: []string{
		"--bind", "127.0.0.1", "--port", "0", "--tls-port", s.port(), "--dir", t.TempDir(), "--save", "", "--appendonly", "no",
		"--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", a.file, "--tls-auth-clients", "yes",
	}}
	s.ready = command{name: "redis-cli", args: []string{"-h", "127.0.0.1", "-p", s.port(), "--tls", "--cacert", a.file, "--cert", cert, "--key", key, "--sni", "cache.internal", "ping"}}
	s.start(t)

	own, ownKey := a.pemFiles("lb.internal")
	for _, withCertificate := range []bool{true, false} {
		text := readFile(t, "examples/backend-tls/Caddyfile")
		lb := freeAddress(t)
		trust := "tls_trust_pool file " + a.file
		if withCertificate {
			trust += "\n\t\t\t\t\ttls_client_auth " + own + " " + ownKey
		}
		for from, to := range map[string]string{
			"# tls_trust_pool file /etc/caddy/ca.pem": trust, "127.0.0.1:6379": lb,
			"10.0.6.1:6380": s.address, "10.0.6.2:6380": freeAddress(t), ":9090": portSuffix(freeAddress(t)),
		} {
			require.Contains(t, text, from)
			text = strings.ReplaceAll(text, from, to)
		}
		t.Run(fmt.Sprint("certificate ", withCertificate), func(t *testing.T) {
			config, err := adapt(t, text)
			require.NoError(t, err)
			runCaddy(t, strings.Replace(config, "{", `{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"ERROR"}}},`, 1))
			checked(t)
			if !withCertificate {
				eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "it is down")
				require.Contains(t, backendStatuses(t)[s.address].LastError, "certificate required")
				return
			}
			require.True(t, backendStatuses(t)[s.address].Healthy, backendStatuses(t)[s.address].LastError)
			cli := func(args ...string) string {
				return command{name: "redis-cli", args: append([]string{"-h", "127.0.0.1", "-p", portOf(lb)}, args...)}.run(t)
			}
			value := strings.Repeat("0123456789", 10_000)
			require.Contains(t, cli("set", "key", value), "OK")
			require.Contains(t, cli("get", "key"), value)
			requireBooksBalance(t, 2)
		})
	}
}

func portSuffix(address string) string { return ":" + portOf(address) }
