package tcplb

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// route is a layer4 server whose handlers come before tcp_lb.
func routeConfig(listen, before, match, handler, apps string) string {
	if match != "" {
		match = `"match":[` + match + `],`
	}
	if before != "" {
		before += ","
	}
	c := layer4Config(fmt.Sprintf(`"srv":{"listen":[%q],"routes":[{%s"handle":[%s%s]}]}`, listen, match, before, withHandler(handler)))
	if apps != "" {
		c = strings.Replace(c, `"apps":{`, `"apps":{`+apps+`,`, 1)
	}
	return c
}

// Without terminating TLS, connections go by server name to different pools.
func TestTLSPassthroughBySNI(t *testing.T) {
	cert := selfSigned(t)
	backend := func(name string) string {
		return startServer(t, func(c *net.TCPConn) {
			secure := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}})
			_, _ = io.WriteString(secure, name)
			_ = secure.Close()
		}).address
	}
	lb := freeAddress(t)
	route := func(name string) string {
		return fmt.Sprintf(`{"match":[{"tls":{"sni":["%s.test"]}}],"handle":[%s]}`,
			name, withHandler(fmt.Sprintf(`"name":%q,%s}`, name, backendsJSON(backend(name)))))
	}
	runCaddy(t, layer4Config(fmt.Sprintf(`"srv":{"listen":[%q],"routes":[%s,%s]}`, lb, route("shop"), route("api"))))
	for _, name := range []string{"api", "shop", "api"} {
		c, err := tls.Dial("tcp", lb, &tls.Config{ServerName: name + ".test", InsecureSkipVerify: true})
		require.NoError(t, err)
		_ = c.SetDeadline(time.Now().Add(hangTimeout))
		got, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, name, string(got))
		require.NoError(t, c.Close())
	}
	requireBooksBalance(t, 3)
	require.EqualValues(t, 2, metric(t, "connections_total", labels("lb", "api")))
	require.EqualValues(t, 1, metric(t, "connections_total", labels("lb", "shop")))
}

// selfSigned makes a certificate for lb.test and 127.0.0.1.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"lb.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// certificate returns a tls app that loads a self-signed certificate, and the
// pool that trusts it.
func certificate(t *testing.T) (app string, roots *x509.CertPool) {
	t.Helper()
	made := selfSigned(t)
	keyDER, err := x509.MarshalPKCS8PrivateKey(made.PrivateKey)
	require.NoError(t, err)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: made.Certificate[0]})
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	require.NoError(t, os.WriteFile(certFile, cert, 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	roots = x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	return fmt.Sprintf(`"tls":{"certificates":{"load_files":[{"certificate":%q,"key":%q}]}}`, certFile, keyFile), roots
}

func TestTLSInFront(t *testing.T) {
	app, roots := certificate(t)
	s := startServer(t, func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		if err != nil || len(b) == 0 {
			return
		}
		if string(b) == "reset" {
			_, _ = io.WriteString(c, "half an ans")
			_ = c.SetLinger(0)
			return
		}
		_, _ = c.Write(bytes.ToUpper(b))
	})
	lb := freeAddress(t)
	runCaddy(t, routeConfig(lb, `{"handler":"tls"}`, "", backendsJSON(s.address)+"}", app))
	dial := func() *tls.Conn {
		c, err := tls.Dial("tcp", lb, &tls.Config{RootCAs: roots, ServerName: "lb.test"})
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		_ = c.SetDeadline(time.Now().Add(hangTimeout))
		return c
	}

	t.Run("half-close", func(t *testing.T) {
		question := strings.Repeat("question ", 100_000)
		c := dial()
		go func() {
			_, _ = io.WriteString(c, question)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		require.NoError(t, err, "ended in order, by a closing alert")
		require.Equal(t, strings.ToUpper(question), string(got))
		requireBooksBalance(t, 1)
		require.EqualValues(t, len(question), metric(t, "received_bytes_total", nil), "counted in the clear")
		require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("reason", "client_closed")))
	})
	t.Run("reset of the backend", func(t *testing.T) {
		c := dial()
		_, err := io.WriteString(c, "reset")
		require.NoError(t, err)
		require.NoError(t, c.CloseWrite())
		_, err = io.ReadAll(c)
		require.True(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrUnexpectedEOF), "not an end in order: %v", err)
		requireBooksBalance(t, 2)
		require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("reason", "backend_reset")))
	})
}

// Nor does one that stops speaking TLS.
func TestClientThatEndsItsTLS(t *testing.T) {
	app, roots := certificate(t)
	s, lb := echoServer(t), freeAddress(t)
	config, lines := withAccessLog(t, routeConfig(lb, `{"handler":"tls"}`, "", `"access_log":true,`+backendsJSON(s.address)+"}", app))
	runCaddy(t, config)
	socket := dialClient(t, lb)
	c := tls.Client(socket, &tls.Config{RootCAs: roots, ServerName: "lb.test"})
	write(t, c, "x")
	expect(t, c, "x")
	write(t, socket, "no TLS any more, though it began well")
	eventually(t, func() bool { return len(lines()) == 1 }, "its line")
	require.Equal(t, "client_error", lines()[0]["reason"])
	require.Equal(t, "info", lines()[0]["level"])
	require.Contains(t, lines()[0]["error"], "tls: ")
}

// Behind wrappers that can't half-close, a FIN must get through all the same.
func TestHalfCloseThroughWrappers(t *testing.T) {
	for name, c := range map[string]struct{ before, hello string }{
		"proxy_protocol": {`{"handler":"proxy_protocol"}`, "PROXY TCP4 192.0.2.1 192.0.2.2 1111 2222\r\n"},
		"throttle":       {`{"handler":"throttle","read_bytes_per_second":1e9,"read_burst_size":1000000}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t, func(c *net.TCPConn) {
				b, err := io.ReadAll(c)
				if err == nil && len(b) > 0 {
					_, _ = c.Write(bytes.ToUpper(b))
				}
			})
			lb := freeAddress(t)
			runCaddy(t, routeConfig(lb, c.before, "", backendsJSON(s.address)+"}", ""))
			client := dialClient(t, lb)
			write(t, client, c.hello+"question")
			require.NoError(t, client.CloseWrite())
			expect(t, client, "QUESTION")
			expectEOF(t, client)
			requireBooksBalance(t, 1)
			require.EqualValues(t, len("question"), metric(t, "received_bytes_total", nil))
		})
	}
}

// Who checks or scans a port that wants a header, or TLS, and has none: that says
// nothing of the pool, and the line says what it was.
func TestClientsThatTheirWrapperRefuses(t *testing.T) {
	for name, sends := range map[string]string{"nothing": "", "junk": "GET / HTTP/1.0\r\n\r\n"} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			s, lb := echoServer(t), freeAddress(t)
			config, lines := withAccessLog(t, routeConfig("tcp_lb/"+lb, `{"handler":"proxy_protocol"}`, "", `"access_log":true,`+backendsJSON(s.address)+"}", ""))
			runCaddy(t, config)
			require.NotContains(t, exposition(t), "client_error")
			client := dialClient(t, lb)
			write(t, client, sends)
			_ = client.CloseWrite() // junk has it reset by now, perhaps
			eventually(t, func() bool { return len(lines()) == 1 }, "its line")
			require.Equal(t, "client_error", lines()[0]["reason"])
			require.Contains(t, lines()[0]["error"], "proxy protocol signature not present")
			require.Equal(t, "info", lines()[0]["level"])
			requireBooksBalance(t, 1)
			require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("backend", s.address, "reason", "client_error")))
			require.Empty(t, backendStatuses(t)[s.address].LastError)
		})
	}
}

// The FIN of a backend has to reach a client that waits for it, too.
func TestBackendHalfCloseThroughWrapper(t *testing.T) {
	s := startServer(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "banner")
		_ = c.CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	})
	lb := freeAddress(t)
	runCaddy(t, routeConfig(lb, `{"handler":"proxy_protocol"}`, "", backendsJSON(s.address)+"}", ""))
	c := dialClient(t, lb)
	write(t, c, "PROXY TCP4 192.0.2.1 192.0.2.2 1111 2222\r\n")
	expect(t, c, "banner")
	expectEOF(t, c)
	write(t, c, "the other way is still open")
	require.NoError(t, c.CloseWrite())
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("reason", "backend_closed")))
}

// Bytes that a matcher read ahead go first, and once, also when the matcher's
// buffer is somebody else's by then.
func TestPrefetchedBytes(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			s := echoServer(t)
			lb := freeAddress(t)
			runCaddy(t, routeConfig(network+lb, "", `{"regexp":{"pattern":"^hello","count":5}}`, backendsJSON(s.address)+"}", ""))
			sizes := []int{0, 1, 1000, 3000, 500_000}
			const each = 8
			var wg sync.WaitGroup
			for i := range each * len(sizes) {
				size := sizes[i%len(sizes)]
				c := dialClient(t, lb)
				wg.Go(func() {
					data := append([]byte("hello"), make([]byte, size)...)
					fill(data[5:])
					for k := range data[5:] {
						data[5+k] ^= byte(i) // every client has its own
					}
					go func() {
						_, _ = c.Write(data)
						_ = c.CloseWrite()
					}()
					got, err := io.ReadAll(c)
					assert.NoError(t, err)
					assert.True(t, bytes.Equal(data, got), "%d bytes after the match, got %d in all", size, len(got))
				})
			}
			wg.Wait()
			requireBooksBalance(t, each*len(sizes))
			require.Equal(t, metric(t, "received_bytes_total", nil), metric(t, "sent_bytes_total", nil))
		})
	}
}

// Inside an HTTP server's listener wrapper. No HTTP request is made: what
// caddy-l4 does with one there trips the race detector.
func TestListenerWrapper(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			s := echoServer(t)
			lb := freeAddress(t)
			runCaddy(t, fmt.Sprintf(`{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"ERROR"}}},
				"apps":{"http":{"servers":{"srv":{"listen":[%q],"protocols":["h1"],"automatic_https":{"disable":true},
				"listener_wrappers":[{"wrapper":"layer4","routes":[{"match":[{"regexp":{"pattern":"^SSH-","count":4}}],"handle":[%s]}]}],
				"routes":[{"handle":[{"handler":"static_response","body":"http"}]}]}}}}}`,
				network+lb, withHandler(backendsJSON(s.address)+"}")))

			c := dialClient(t, lb)
			write(t, c, "SSH-2.0-test\r\n")
			expect(t, c, "SSH-2.0-test\r\n")
			require.NoError(t, c.CloseWrite())
			expectEOF(t, c)
			requireBooksBalance(t, 1)
		})
	}
}

// What no server says in time, the first packet does: another module may bring
// a network of datagrams.
func TestDatagramsAreRefused(t *testing.T) {
	listener, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	c, err := net.Dial("udp", listener.LocalAddr().String())
	require.NoError(t, err)
	defer c.Close()
	err = handlerOf(t, `{"name":"web"}`).Handle(layer4Connection(c), nil)
	require.ErrorContains(t, err, `tcp_lb "web" serves TCP connections only, this listener's network is "udp"`)
}

// seal is a handler of somebody else's, whose wrapper nothing can look into.
type seal struct{}

func (seal) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "layer4.handlers.tcplb_test_seal", New: func() caddy.Module { return new(seal) }}
}

func (seal) Handle(cx *layer4.Connection, next layer4.Handler) error {
	return next.Handle(cx.Wrap(sealed{cx}))
}

func init() { caddy.RegisterModule(seal{}) }

// One that is served is not taken for one that has yet to reach tcp_lb.
func TestHandshakeTimeoutSparesTheServedBehindOthersHandlers(t *testing.T) {
	watchLeftovers(t)
	s := echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, routeConfig("tcp_lb/"+lb, `{"handler":"tcplb_test_seal"}`, "", backendsJSON(s.address)+"}", `"tcp_lb":{"handshake_timeout":"1s"}`))
	c := hold(t, lb)
	require.Zero(t, onTheirWay(), "it is served")
	write(t, c, "y")
	expect(t, c, "y")
	require.NoError(t, c.CloseWrite())
	expectEOF(t, c)
}
