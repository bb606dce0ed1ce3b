//go:build linux

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// withTLS has the balancers speak TLS with the backends, verified. Each resumes
// sessions as it does; full leaves them nothing to resume.
var withTLS = flag.String("tls", "", "have balancers speak TLS with the backends: resumed or full; not if empty")

// secureEnv tells the process of the backends where its certificate is, and
// fullEnv that there are to be no tickets.
const (
	secureEnv = "BENCH_TLS"
	fullEnv   = "BENCH_TLS_FULL"
)

var certFile string // which is its own CA; empty = no TLS

// secureBackends makes a certificate for the backends, in dir.
func secureBackends(dir string) error {
	if *withTLS == "" {
		return nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"backend.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	certFile = filepath.Join(dir, "backend.pem")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	if err := os.WriteFile(certFile, both, 0o600); err != nil {
		return err
	}
	_ = os.Setenv(secureEnv, certFile)
	if *withTLS == "full" {
		_ = os.Setenv(fullEnv, "1")
	}
	return nil
}

// secured returns the listener with the TLS that the backends are to speak.
func secured(ln net.Listener) net.Listener {
	file := os.Getenv(secureEnv)
	if file == "" {
		return ln
	}
	cert, err := tls.LoadX509KeyPair(file, file)
	check(err)
	return tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}, SessionTicketsDisabled: os.Getenv(fullEnv) != ""})
}

// echoSecurely is echoes for backends that speak TLS.
func echoSecurely(c net.Conn) {
	_, _ = io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 4<<10))
}

// trusted is a "tls" that trusts the backends alone.
func trusted() map[string]any {
	return map[string]any{"ca": map[string]any{"provider": "file", "pem_files": []string{certFile}}}
}

// trustedByX25519 does without ML-KEM, which other balancers may not have.
func trustedByX25519() map[string]any {
	t := trusted()
	t["curves"] = []string{"x25519"}
	return t
}
