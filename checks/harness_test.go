package checks

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// hangTimeout bounds every wait of the tests. It is no measure of speed.
const hangTimeout = 30 * time.Second

func TestMain(m *testing.M) {
	lingerTime = hangTimeout // who closes first must not depend on how fast this machine is
	goleak.VerifyTestMain(m)
}

// server handles each connection in a goroutine of its own.
type server struct {
	address string
}

func serve(t testing.TB, handle func(net.Conn)) *server {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(hangTimeout))
				handle(c)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
	})
	return &server{address: ln.Addr().String()}
}

func (s *server) target() Target {
	return Target{
		Address: s.address,
		Host:    "127.0.0.1",
		Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", s.address)
		},
	}
}

// check runs the check of the server for as long as it takes.
func (s *server) check(t testing.TB, c Check, w Wire) error {
	t.Helper()
	return s.checkWithin(t, hangTimeout, c, w)
}

func (s *server) checkWithin(t testing.TB, d time.Duration, c Check, w Wire) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	return Run(ctx, c, w, s.target())
}

// provisioned returns the check with what Caddy does to it.
func provisioned[T interface {
	Check
	caddy.Provisioner
}](t testing.TB, c T) T {
	t.Helper()
	require.NoError(t, c.Provision(caddy.Context{}))
	return c
}

// certificate is of a CA of its own, for the names, and returns the file of the CA.
func certificate(t testing.TB, names ...string) (c tls.Certificate, caFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, caFile
}

// config loads the settings as a config does.
func config(t testing.TB, s TLS) *tls.Config {
	t.Helper()
	c, err := s.Config(newContext(t))
	require.NoError(t, err)
	return c
}

func newContext(t testing.TB) caddy.Context {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	return ctx
}
