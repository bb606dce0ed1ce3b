package tcplb

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// issuer signs certificates of a test.
type issuer struct {
	t      testing.TB
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	file   string // the CA's own, in PEM
	serial atomic.Int64
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	return newIssuerOf(t, "ca")
}

// newIssuerOf is a CA of the name, by which servers say whom they trust.
func newIssuerOf(t testing.TB, name string) *issuer {
	t.Helper()
	a := &issuer{t: t, file: filepath.Join(t.TempDir(), "ca.pem")}
	var err error
	a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &a.key.PublicKey, a.key)
	require.NoError(t, err)
	a.cert, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	a.serial.Store(1)
	require.NoError(t, os.WriteFile(a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	return a
}

// issue makes a certificate for both ends, by default for 127.0.0.1.
func (a *issuer) issue(change func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial.Add(1)), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	require.NoError(a.t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// files writes a certificate and its key, and returns both in JSON.
func (a *issuer) files(c tls.Certificate) string {
	a.t.Helper()
	dir := a.t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	require.NoError(a.t, err)
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(a.t, os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600))
	require.NoError(a.t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return fmt.Sprintf(`"client_certificate_file":%q,"client_certificate_key_file":%q`, cert, key)
}

// pool trusts the issuer alone.
func (a *issuer) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// trusted is a "tls" in JSON that trusts the issuer alone, and more.
func (a *issuer) trusted(more string) string {
	if more != "" {
		more = "," + more
	}
	return fmt.Sprintf(`"tls":{"ca":{"provider":"file","pem_files":[%q]}%s}`, a.file, more)
}

// server is a backend that speaks TLS by the config, with a certificate of the
// issuer's unless that has one.
func (a *issuer) server(t testing.TB, config *tls.Config, handle func(*tls.Conn)) *server {
	t.Helper()
	if config == nil {
		config = new(tls.Config)
	}
	if len(config.Certificates) == 0 {
		config.Certificates = []tls.Certificate{a.issue(nil)}
	}
	return startServer(t, func(c *net.TCPConn) {
		secure := tls.Server(c, config)
		if secure.Handshake() != nil {
			return
		}
		handle(secure)
	})
}

// unixServer echoes by TLS on a Unix socket, one connection after the other.
func (a *issuer) unixServer(t testing.TB) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	secured := tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{a.issue(nil)}})
	done := make(chan struct{})
	go func() { // ends with ln
		defer close(done)
		for {
			c, err := secured.Accept()
			if err != nil {
				return
			}
			secureEcho(c.(*tls.Conn))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return path
}

// secureEcho passes a half-close on, as a server of TLS does that is written well.
func secureEcho(c *tls.Conn) {
	echo(c)
	_ = c.CloseWrite()
}
