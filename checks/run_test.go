package checks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/stretchr/testify/require"
)

// checkFunc is a check of somebody else's.
type checkFunc func(ctx context.Context, t Target) error

func (f checkFunc) Check(ctx context.Context, t Target) error { return f(ctx, t) }

func TestProxyHeaders(t *testing.T) {
	for version, want := range map[ProxyVersion]string{
		"":   "PING",
		"v1": "PROXY UNKNOWN\r\nPING",
		"v2": "\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x20\x00\x00\x00PING",
	} {
		got := make(chan string, 1)
		s := serve(t, func(c net.Conn) {
			b, _ := io.ReadAll(io.LimitReader(c, int64(len(want))))
			got <- string(b)
		})
		require.NoError(t, s.check(t, provisioned(t, &Dialogue{Steps: steps("PING")}), Wire{Proxy: version}))
		require.Equal(t, want, <-got)
	}
	require.False(t, ProxyVersion("v3").Valid())
}

// serveTLS tells how each connection ended, and has what came before TLS.
func serveTLS(t testing.TB, c tls.Certificate, before int, handle func(*tls.Conn) error) (*server, chan error) {
	t.Helper()
	ended := make(chan error, 16)
	s := serve(t, func(conn net.Conn) {
		_, _ = io.ReadFull(conn, make([]byte, before))
		secure := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{c}})
		ended <- handle(secure)
		_ = secure.Close()
	})
	return s, ended
}

// readToEnd wants a close_notify, and no reset.
func readToEnd(c *tls.Conn) error {
	_, err := io.Copy(io.Discard, c)
	return err
}

func TestTLS(t *testing.T) {
	cert, caFile := certificate(t, "db.internal", "127.0.0.1")
	ca := caddyconfig.JSONModuleObject(caddytls.FileCAPool{TrustedCACertPEMFiles: []string{caFile}}, "provider", "file", nil)
	_, otherCA := certificate(t, "db.internal")
	other := caddyconfig.JSONModuleObject(caddytls.FileCAPool{TrustedCACertPEMFiles: []string{otherCA}}, "provider", "file", nil)
	for name, c := range map[string]struct {
		settings TLS
		want     string
	}{
		"a name":              {TLS{ServerName: "db.internal", CARaw: ca}, ""},
		"the backend's host":  {TLS{CARaw: ca}, ""},
		"another name":        {TLS{ServerName: "web.internal", CARaw: ca}, "TLS handshake: tls: failed to verify certificate: x509: certificate is valid for db.internal, not web.internal"},
		"another CA":          {TLS{ServerName: "db.internal", CARaw: other}, "signed by unknown authority"},
		"no CA":               {TLS{ServerName: "db.internal"}, "signed by unknown authority"},
		"any certificate":     {TLS{InsecureSkipVerify: true}, ""},
		"any, whatever it is": {TLS{ServerName: "web.internal", InsecureSkipVerify: true}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, ended := serveTLS(t, cert, 0, readToEnd)
			err := s.check(t, Connect{}, Wire{TLS: config(t, c.settings)})
			if c.want == "" {
				require.NoError(t, err)
				require.NoError(t, <-ended, "the backend has nothing to complain of")
				return
			}
			require.ErrorContains(t, err, c.want)
		})
	}
	t.Run("behind a PROXY header", func(t *testing.T) {
		s, ended := serveTLS(t, cert, len(ProxyVersion("v2").local()), readToEnd)
		require.NoError(t, s.check(t, Connect{}, Wire{Proxy: "v2", TLS: config(t, TLS{CARaw: ca})}))
		require.NoError(t, <-ended)
	})
	t.Run("HTTPS", func(t *testing.T) {
		s, ended := serveTLS(t, cert, 0, func(c *tls.Conn) error {
			_, _ = c.Read(make([]byte, 1024))
			_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nready")
			return err
		})
		require.NoError(t, s.check(t, provisioned(t, &HTTP{URI: "/readyz", ExpectBody: "^ready$"}), Wire{TLS: config(t, TLS{CARaw: ca})}))
		require.NoError(t, <-ended)
	})
	t.Run("a dialogue", func(t *testing.T) {
		s, ended := serveTLS(t, cert, 0, func(c *tls.Conn) error {
			_, _ = io.WriteString(c, "* OK ready\r\n")
			return readToEnd(c)
		})
		require.NoError(t, s.check(t, provisioned(t, &Dialogue{Steps: steps("<* OK")}), Wire{TLS: config(t, TLS{CARaw: ca})}))
		require.NoError(t, <-ended)
	})
	t.Run("no TLS", func(t *testing.T) {
		s := serve(t, func(c net.Conn) { _, _ = io.WriteString(c, "220 mail\r\n") })
		require.ErrorContains(t, s.check(t, Connect{}, Wire{TLS: config(t, TLS{CARaw: ca})}), "TLS handshake: tls: first record does not look like a TLS handshake")
	})
	t.Run("no module", func(t *testing.T) {
		_, err := (&TLS{CARaw: []byte(`{"provider":"nobody's"}`)}).Config(newContext(t))
		require.ErrorContains(t, err, "loading the trust pool")
	})
}

// One that begins a handshake and stops, or does not close after it, has its time.
func TestTLSOfAStalledBackend(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	s := serve(t, func(net.Conn) { <-release })
	err := s.checkWithin(t, 50*time.Millisecond, Connect{}, Wire{TLS: config(t, TLS{InsecureSkipVerify: true})})
	require.ErrorContains(t, err, "TLS handshake: ")

	lingerTime = time.Millisecond
	defer func() { lingerTime = hangTimeout }()
	cert, _ := certificate(t)
	s, _ = serveTLS(t, cert, 0, func(c *tls.Conn) error {
		err := c.Handshake()
		<-release
		return err
	})
	require.NoError(t, s.check(t, Connect{}, Wire{TLS: config(t, TLS{InsecureSkipVerify: true})}))
}

func TestCheckHasOneConnectionAtATime(t *testing.T) {
	closed := make(chan error, 2)
	s := serve(t, func(c net.Conn) {
		_, err := io.Copy(io.Discard, c)
		closed <- err
	})
	err := s.check(t, checkFunc(func(ctx context.Context, t Target) error {
		for range 2 {
			if _, err := t.Dial(ctx); err != nil {
				return err
			}
		}
		return <-closed // of the first
	}), Wire{})
	require.NoError(t, err)
	require.NoError(t, <-closed, "and of the second, which the check left open")
}

// What the check did not read makes no reset of its close.
func TestUnreadAnswerIsNoReset(t *testing.T) {
	ended := make(chan error, 1)
	s := serve(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "220 and so on")
		_, err := io.Copy(io.Discard, c)
		ended <- err
	})
	target := s.target()
	dial := target.Dial
	target.Dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		return &fewBytes{c.(*net.TCPConn)}, err
	}
	require.NoError(t, Run(t.Context(), provisioned(t, &Dialogue{Steps: steps("<220 ")}), Wire{}, target))
	require.NoError(t, <-ended)
}

// fewBytes reads four at a time.
type fewBytes struct{ *net.TCPConn }

func (c *fewBytes) Read(b []byte) (int, error) { return c.TCPConn.Read(b[:min(4, len(b))]) }

func (c *fewBytes) WriteTo(w io.Writer) (int64, error) { return c.TCPConn.WriteTo(w) }

// A check that looks at no context ends with it all the same.
func TestReadsEndWithTheCheck(t *testing.T) {
	s := serve(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	read := checkFunc(func(ctx context.Context, t Target) error {
		conn, err := t.Dial(context.Background())
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		return err
	})
	require.ErrorContains(t, s.checkWithin(t, 20*time.Millisecond, read, Wire{}), "i/o timeout")
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	require.Error(t, Run(ctx, read, Wire{}, s.target()), "also with a config that ends")
}

func TestPanicIsAFailure(t *testing.T) {
	s := serve(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	err := s.check(t, checkFunc(func(ctx context.Context, t Target) error {
		_, _ = t.Dial(ctx)
		panic("bang")
	}), Wire{})
	var panicked *Panic
	require.ErrorAs(t, err, &panicked)
	require.EqualError(t, err, "panic in the check: bang")
	require.Contains(t, string(panicked.Stack), "TestPanicIsAFailure")
}

func TestErrorsAreForReaders(t *testing.T) {
	long := errors.New(strings.Repeat("ü", maxText))
	err := explained(long)
	require.ErrorIs(t, err, long)
	require.LessOrEqual(t, len(err.Error()), maxText+len("…"))
	require.NotContains(t, err.Error(), "\uFFFD")

	op := &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: 54321}, Addr: &net.TCPAddr{Port: 80}, Err: errors.New("gone")}
	require.EqualError(t, explained(op), "gone")
	require.ErrorIs(t, explained(op), op)
	dial := &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{Port: 80}, Err: errors.New("gone")}
	require.EqualError(t, explained(dial), "dial tcp :80: gone")
	require.NoError(t, explained(nil))

	var unverified *tls.CertificateVerificationError
	cert, _ := certificate(t, "a")
	s, _ := serveTLS(t, cert, 0, readToEnd)
	err = s.check(t, Connect{}, Wire{TLS: &tls.Config{ServerName: "b", RootCAs: x509.NewCertPool()}})
	require.ErrorAs(t, err, &unverified)
}

// A certificate has a link-local address without its zone.
func TestServerNameHasNoZone(t *testing.T) {
	cert, caFile := certificate(t, "fe80::1")
	ca := caddyconfig.JSONModuleObject(caddytls.FileCAPool{TrustedCACertPEMFiles: []string{caFile}}, "provider", "file", nil)
	s, ended := serveTLS(t, cert, 0, readToEnd)
	target := s.target()
	target.Host = "fe80::1%eth0"
	require.NoError(t, Run(t.Context(), Connect{}, Wire{TLS: config(t, TLS{CARaw: ca})}, target))
	require.NoError(t, <-ended)
	require.Equal(t, "db.internal", ServerName("db.internal"))
}
