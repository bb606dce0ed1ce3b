package tcplb

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// startTLS is startLB with checks off and TLS to the backends.
func startTLS(t testing.TB, network, options string, backends ...string) string {
	t.Helper()
	lb := freeAddress(t)
	runCaddy(t, lbConfig(network+lb, fmt.Sprintf(`{%s,%s,%s}`, backendsJSON(backends...), options, uncheckedJSON)))
	return lb
}

func TestTLSToBackends(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run("listener "+network, func(t *testing.T) {
			watchLeftovers(t)
			a := newIssuer(t)
			lb := startTLS(t, network, a.trusted(""), a.server(t, nil, secureEcho).address)
			const size = 1 << 20
			c := dialClient(t, lb)
			go func() {
				_, _ = c.Write(make([]byte, size))
				_ = c.CloseWrite()
			}()
			n, err := io.Copy(io.Discard, c)
			require.NoError(t, err)
			require.EqualValues(t, size, n)
			requireBooksBalance(t, 1)
			require.EqualValues(t, size, metric(t, "received_bytes_total", nil), "counted in the clear")
			require.EqualValues(t, size, metric(t, "sent_bytes_total", nil))
			require.EqualValues(t, 1, metric(t, "connections_closed_total", labels("reason", "client_closed")))
		})
	}
}

// Each of these handshakes fails, is told in words, and another backend serves the
// client.
func TestTLSHandshakesThatFail(t *testing.T) {
	a, other := newIssuer(t), newIssuer(t)
	serving := func(config *tls.Config) func(testing.TB) *server {
		return func(t testing.TB) *server { return a.server(t, config, secureEcho) }
	}
	certificate := func(by *issuer, change func(*x509.Certificate)) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{by.issue(change)}}
	}
	plain := func(handle func(*net.TCPConn)) func(testing.TB) *server {
		return func(t testing.TB) *server { return startServer(t, handle) }
	}
	for name, c := range map[string]struct {
		start   func(testing.TB) *server
		options string
		want    string
	}{
		"expired":             {serving(certificate(a, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })), "", "expired"},
		"of another name":     {serving(certificate(a, func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"db.internal"} })), "", "doesn't contain any IP SANs"},
		"of another CA":       {serving(certificate(other, nil)), "", "unknown authority"},
		"not the name wanted": {serving(nil), `"server_name":"db.internal"`, "wanted to match db.internal"},
		"no TLS, a banner": {plain(func(c *net.TCPConn) {
			_, _ = io.WriteString(c, "220 mail.internal ESMTP\r\n")
			_, _ = io.Copy(io.Discard, c)
		}), "", "does not look like a TLS handshake"},
		"no TLS, an echo":      {plain(func(c *net.TCPConn) { echo(c) }), "", "TLS handshake:"},
		"silence":              {plain(func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }), `"handshake_timeout":"50ms"`, "not done within 50ms"},
		"closed":               {plain(func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 4096)) }), "", "the backend closed the connection"},
		"reset":                {plain(func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); _ = c.SetLinger(0) }), "", "reset"},
		"an old version":       {serving(&tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}), "", "protocol version"},
		"no certificate shown": {serving(&tls.Config{MaxVersion: tls.VersionTLS12, ClientAuth: tls.RequireAnyClientCert}), "", "remote error: tls:"},
		"no common protocol":   {serving(&tls.Config{NextProtos: []string{"smtp"}}), `"alpn":["postgresql"]`, "no application protocol"},
	} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			lb, s, good := freeAddress(t), c.start(t), a.server(t, nil, secureEcho)
			runCaddy(t, lbConfig(lb, fmt.Sprintf(`{"backends":[{"address":%q,"tls":{%s}},{"address":%q,"backup":true}],%s,%s}`,
				s.address, c.options, good.address, a.trusted(""), uncheckedJSON)))
			echoed(t, lb, 10)
			requireBooksBalance(t, 1)
			require.EqualValues(t, 0, dialErrors(t, s.address, dialRefused))
			// The backup is asked where the first has been taken out, or as a retry.
			require.EqualValues(t, 1, dialErrors(t, s.address, dialTLS))
			require.Contains(t, backendStatuses(t)[s.address].LastError, c.want)
			require.EqualValues(t, 1, metric(t, "connections_total", labels("backend", good.address)))
		})
	}
}

// A server of TLS 1.3 sees the balancer's certificate, or that there is none, when
// the handshake is done on this side.
func TestTLSClientCertificate(t *testing.T) {
	a := newIssuer(t)
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		config := func() *tls.Config {
			return &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool(), MinVersion: version, MaxVersion: version}
		}
		t.Run("shown in "+name, func(t *testing.T) {
			lb := startTLS(t, "", a.trusted(a.files(a.issue(nil))), a.server(t, config(), secureEcho).address)
			echoed(t, lb, 10)
		})
	}
	for name, by := range map[string]*issuer{"none": nil, "another's": newIssuer(t)} {
		t.Run(name+", in 1.3", func(t *testing.T) {
			watchLeftovers(t)
			config := &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool(), MinVersion: tls.VersionTLS13}
			s, shown := a.server(t, config, secureEcho), ""
			if by != nil {
				shown = by.files(by.issue(nil))
			}
			lb := startTLS(t, "", a.trusted(shown), s.address)
			_, err := ask(lb)
			require.Error(t, err, "nobody takes it for the end of an answer")
			requireBooksBalance(t, 1)
			require.EqualValues(t, 1, closedFor(t, s, reasonBackendReset))
			require.Regexp(t, "TLS: remote error: tls: (certificate required|unknown certificate authority|bad certificate)", backendStatuses(t)[s.address].LastError)
		})
	}
}

// A certificate is shown also to a server that names other CAs than the one that
// signed it: what follows from that is the server's to say.
func TestTLSClientCertificateOfAnotherCA(t *testing.T) {
	a, other := newIssuer(t), newIssuerOf(t, "other")
	shown := a.trusted(other.files(other.issue(nil)))
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		config := func(auth tls.ClientAuthType) *tls.Config {
			return &tls.Config{ClientAuth: auth, ClientCAs: a.pool(), MinVersion: version, MaxVersion: version}
		}
		t.Run("taken in "+name, func(t *testing.T) {
			watchLeftovers(t)
			s, lb := a.server(t, config(tls.RequireAnyClientCert), secureEcho), freeAddress(t)
			runCaddy(t, lbConfig(lb, fmt.Sprintf(`{%s,%s}`, backendsJSON(s.address), shown)))
			checked(t)
			require.True(t, backendStatuses(t)[s.address].Healthy, backendStatuses(t)[s.address].LastError)
			require.Empty(t, backendStatuses(t)[s.address].LastError)
			echoed(t, lb, 10)
		})
		t.Run("refused in "+name, func(t *testing.T) {
			watchLeftovers(t)
			s := a.server(t, config(tls.RequireAndVerifyClientCert), secureEcho)
			lb := startTLS(t, "", shown, s.address)
			_, _ = ask(lb) // in 1.2 the handshake fails, in 1.3 what follows
			eventually(t, func() bool { return backendStatuses(t)[s.address].LastError != "" }, "the server's word")
			require.Regexp(t, "remote error: tls: (unknown certificate authority|bad certificate)", backendStatuses(t)[s.address].LastError)
		})
	}
	c := other.issue(nil)
	_, err := alwaysShow(&c)(&tls.CertificateRequestInfo{Version: tls.VersionTLS13, SignatureSchemes: []tls.SignatureScheme{tls.PSSWithSHA256}})
	require.ErrorContains(t, err, "the certificate of tls_client_auth is not of a kind that the backend takes: ")
}

// One for a name is there as soon as Caddy has it.
func TestTLSClientCertificateOfCaddys(t *testing.T) {
	a := newIssuer(t)
	shown := make(chan []string, 100)
	s := a.server(t, &tls.Config{ClientAuth: tls.RequireAnyClientCert}, func(c *tls.Conn) {
		shown <- c.ConnectionState().PeerCertificates[0].DNSNames
		secureEcho(c)
	})
	lb := freeAddress(t)
	config := lbConfig(lb, fmt.Sprintf(`{%s,%s,"health_checks":{"active":{"interval":"20ms","fast_interval":"20ms"}}}`, backendsJSON(s.address), a.trusted(`"client_certificate_automate":"lb.internal"`)))
	config = strings.Replace(config, `"apps":{`, fmt.Sprintf(`"storage":{"module":"file_system","root":%q},"apps":{
		"pki":{"certificate_authorities":{"local":{"install_trust":false}}},
		"tls":{"automation":{"policies":[{"subjects":["lb.internal"],"issuers":[{"module":"internal"}]}]}},`, t.TempDir()), 1)
	runCaddy(t, config)
	eventually(t, func() bool { return len(shown) > 0 }, "a certificate that the server takes")
	eventually(t, func() bool { return backendStatuses(t)[s.address].Healthy }, "it is up")
	echoed(t, lb, 10)
	require.Equal(t, []string{"lb.internal"}, <-shown)
}

// A handshake that is under way as the config with its certificate goes is made
// anew as the next config has it.
func TestTLSClientCertificateGoesWithItsConfig(t *testing.T) {
	watchLeftovers(t)
	a := newIssuer(t)
	var held atomic.Bool
	began, goOn := make(chan struct{}), make(chan struct{})
	cert := a.issue(nil)
	s := a.server(t, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		if held.CompareAndSwap(true, false) {
			close(began)
			<-goOn
		}
		return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true}, nil
	}}, secureEcho)
	lb := freeAddress(t)
	config := func(tls string) string {
		return lbConfig(lb, fmt.Sprintf(`{"backends":[{"address":%q}],%s,%s}`, s.address, tls, uncheckedJSON))
	}
	runCaddy(t, strings.Replace(config(a.trusted(`"client_certificate_automate":"lb.internal"`)), `"apps":{`, fmt.Sprintf(`"storage":{"module":"file_system","root":%q},"apps":{
		"pki":{"certificate_authorities":{"local":{"install_trust":false}}},
		"tls":{"automation":{"policies":[{"subjects":["lb.internal"],"issuers":[{"module":"internal"}]}]}},`, t.TempDir()), 1))
	eventually(t, func() bool { return tryEcho(lb) == nil }, "the certificate is there")
	held.Store(true)
	echo := make(chan error, 1)
	go func() { echo <- tryEcho(lb) }() // ends with its connection
	receive(t, began)
	reload(t, config(a.trusted("")))
	close(goOn)
	require.NoError(t, receive(t, echo))
	echoed(t, lb, 10)
}

// resuming returns a server, and whether each of its connections resumed a session.
func (a *issuer) resuming(t testing.TB) (s *server, resumed chan bool) {
	resumed = make(chan bool, 100)
	return a.server(t, nil, func(c *tls.Conn) {
		resumed <- c.ConnectionState().DidResume
		secureEcho(c)
	}), resumed
}

func TestTLSSessionsAreResumed(t *testing.T) {
	a, other := newIssuer(t), newIssuer(t)
	s, resumed := a.resuming(t)
	lb := freeAddress(t)
	config := func(secured string) string {
		return lbConfig(lb, fmt.Sprintf(`{%s,%s,%s}`, backendsJSON(s.address), secured, uncheckedJSON))
	}
	runCaddy(t, config(a.trusted("")))
	for _, want := range []bool{false, true, true} {
		echoed(t, lb, 10)
		require.Equal(t, want, <-resumed)
	}
	requireBooksBalance(t, 3)
	reload(t, config(other.trusted("")))
	refused(t, lb)
	require.EqualValues(t, 1, dialErrors(t, s.address, dialTLS), "what another config trusted is worth nothing")
	require.Empty(t, resumed)
	reload(t, config(a.trusted(`"server_name":"127.0.0.1"`)))
	echoed(t, lb, 10)
	require.False(t, <-resumed, "each config verifies by itself")
}

// Some servers that verify clients end every handshake that would resume a session.
// No client comes to know of that, and the next ones need no second connect.
func TestTLSSessionsThatAreRefused(t *testing.T) {
	const preSharedKey = 41 // the extension by which TLS 1.3 resumes
	a := newIssuer(t)
	var ended atomic.Int64
	issued := a.issue(nil)
	s := a.server(t, &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(hello.Extensions, preSharedKey) {
			ended.Add(1)
			return nil, errors.New("session id context uninitialized")
		}
		return &tls.Config{Certificates: []tls.Certificate{issued}}, nil
	}}, secureEcho)
	lb := startTLS(t, "", a.trusted(""), s.address)
	const clients = 6
	for range clients {
		echoed(t, lb, 10)
	}
	requireBooksBalance(t, clients)
	require.Zero(t, dialErrors(t, s.address, dialTLS))
	require.EqualValues(t, 1, ended.Load(), "once is enough")
}

// A handshake that is cut off, as by a server that is restarted, costs its client a
// second one and the backend its session. Only of a server that does so each time
// none is kept any more.
func TestTLSSessionsThatAreCut(t *testing.T) {
	for name, c := range map[string]struct {
		version      uint16
		reset, often bool
	}{
		"once":                  {version: tls.VersionTLS13},
		"once, by a reset":      {version: tls.VersionTLS13, reset: true},
		"each time, in TLS 1.2": {version: tls.VersionTLS12, often: true},
		"each time, by a reset": {version: tls.VersionTLS13, reset: true, often: true},
	} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			const clients = 6
			a := newIssuer(t)
			config := &tls.Config{Certificates: []tls.Certificate{a.issue(nil)}, MaxVersion: c.version}
			config.SetSessionTicketKeys([][32]byte{{1}})
			resumed := make(chan bool, clients)
			var cut atomic.Int64
			s := startServer(t, func(socket *net.TCPConn) {
				own := config.Clone()
				own.UnwrapSession = func(ticket []byte, state tls.ConnectionState) (*tls.SessionState, error) {
					if len(ticket) == 0 || !c.often && cut.Load() > 0 {
						return config.DecryptTicket(ticket, state)
					}
					cut.Add(1)
					if c.reset {
						_ = socket.SetLinger(0)
					}
					_ = socket.Close()
					return nil, net.ErrClosed
				}
				if secured := tls.Server(socket, own); secured.Handshake() == nil {
					resumed <- secured.ConnectionState().DidResume
					secureEcho(secured)
				}
			})
			lb := startTLS(t, "", a.trusted(""), s.address)
			for i := range clients {
				echoed(t, lb, 10)
				require.Equal(t, i >= 2 && !c.often, <-resumed, "client %d", i)
			}
			requireBooksBalance(t, clients)
			require.Zero(t, dialErrors(t, s.address, dialTLS))
			want := 1
			if c.often {
				want = maxCut
			}
			require.EqualValues(t, want, cut.Load())
		})
	}
}

// A reload has open connections go on as they are.
func TestTLSConnectionsOutliveAReload(t *testing.T) {
	a, other := newIssuer(t), newIssuer(t)
	s := a.server(t, nil, secureEcho)
	lb := freeAddress(t)
	config := func(secured string) string {
		return lbConfig("tcp_lb/"+lb, fmt.Sprintf(`{%s,%s,%s}`, backendsJSON(s.address), secured, uncheckedJSON))
	}
	runCaddy(t, config(a.trusted("")))
	c := hold(t, lb)
	reload(t, config(other.trusted("")))
	write(t, c, "y")
	expect(t, c, "y")
	require.Error(t, caddy.Load([]byte(config(`"tls":{"ca":{"provider":"file","pem_files":["/nowhere/ca.pem"]}}`)), true))
	write(t, c, "z")
	expect(t, c, "z")
}

// Why a backend is taken out, or would be, is what TLS has told.
func TestTLSWordsOfABackendThatFailsClients(t *testing.T) {
	watchLeftovers(t)
	a := newIssuer(t)
	s := a.server(t, &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool(), MinVersion: tls.VersionTLS13}, secureEcho)
	lb := freeAddress(t)
	config, lines := withAccessLog(t, lbConfig(lb, fmt.Sprintf(`{%s,%s,"health_checks":{"active":{"disabled":true},"passive":{"fail_duration":"1h"}}}`, backendsJSON(s.address), a.trusted(""))))
	runCaddy(t, strings.Replace(config, `"layer4.handlers.tcp_lb.access"`, `"layer4.handlers.tcp_lb"`, 1))
	_, err := ask(lb) // whose connect may meet with the reset already
	require.Error(t, err)
	eventually(t, func() bool {
		return slices.ContainsFunc(lines(), func(l map[string]any) bool {
			return l["msg"] == "backend fails clients, and stays as no other is available" && l["error"] == "backend_reset: TLS: remote error: tls: certificate required"
		})
	}, "its line")
}

// The client leaves, or the drain timeout ends, while a backend says nothing.
func TestTLSHandshakeIsGivenUp(t *testing.T) {
	silent := func(t *testing.T) *server {
		return startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	}
	const patient = `"tls":{},"dial_timeout":"10m"`
	t.Run("the client leaves", func(t *testing.T) {
		watchLeftovers(t)
		s := silent(t)
		lb := startTLS(t, "tcp_lb/", patient, s.address)
		c := dialClient(t, lb)
		eventually(t, func() bool { return s.acceptedCount() == 1 }, "a handshake")
		require.NoError(t, c.SetLinger(0))
		require.NoError(t, c.Close())
		eventually(t, func() bool { return metric(t, "connections_closed_total", labels("reason", "client_reset")) == 1 }, "the end of it")
		require.Zero(t, dialErrors(t, s.address, dialTLS), "which is not the backend's fault")
	})
	t.Run("the drain timeout ends", func(t *testing.T) {
		watchLeftovers(t)
		s, lb := silent(t), freeAddress(t)
		noPoolsYet(t)
		require.NoError(t, caddy.Load([]byte(lbConfig("tcp_lb/"+lb, fmt.Sprintf(`{%s,%s,%s,"drain_timeout":"0s"}`, backendsJSON(s.address), patient, uncheckedJSON))), true))
		c := dialClient(t, lb)
		eventually(t, func() bool { return s.acceptedCount() == 1 }, "a handshake")
		require.NoError(t, caddy.Stop())
		_, err := io.ReadAll(c)
		require.Error(t, err)
		eventually(t, func() bool { return open.n.Load() == 0 }, "the end of it")
	})
}

// The PROXY header goes first, in the clear.
func TestTLSAfterAProxyHeader(t *testing.T) {
	a := newIssuer(t)
	cert := a.issue(nil)
	said := make(chan string, 1)
	s := startServer(t, func(c *net.TCPConn) {
		header := make([]byte, 0, 128)
		for b := make([]byte, 1); !strings.HasSuffix(string(header), "\r\n"); header = append(header, b...) {
			if _, err := c.Read(b); err != nil {
				return
			}
		}
		said <- string(header)
		secureEcho(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}))
	})
	lb := startTLS(t, "", a.trusted("")+`,"proxy_protocol":"v1"`, s.address)
	echoed(t, lb, 10)
	require.Contains(t, <-said, "PROXY TCP4 127.0.0.1 127.0.0.1 ")
}

// A backend's own options hold in place of the handler's, one by one.
func TestTLSOfOneBackend(t *testing.T) {
	a := newIssuer(t)
	named := a.server(t, &tls.Config{Certificates: []tls.Certificate{a.issue(func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"db.internal"} })}}, secureEcho)
	plain, other := echoServer(t), a.server(t, nil, secureEcho)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, fmt.Sprintf(`{"backends":[{"address":%q,"tls":{"server_name":"db.internal"}},{"address":%q,"tls":{"off":true}},{"address":%q}],%s,%s}`,
		named.address, plain.address, other.address, a.trusted(""), uncheckedJSON)))
	for range 3 {
		echoed(t, lb, 10)
	}
	for _, s := range []*server{named, plain, other} {
		require.Equal(t, 1, s.acceptedCount())
	}
	require.Zero(t, metric(t, "connection_errors_total", nil))
}

// A backend whose block names CAs is verified, whomever the others' connections take.
func TestTLSOfOneBackendIsVerified(t *testing.T) {
	a, other := newIssuer(t), newIssuer(t)
	s := a.server(t, nil, secureEcho)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, fmt.Sprintf(`{"backends":[{"address":%q,%s}],"tls":{"insecure_skip_verify":true},%s}`, s.address, other.trusted(""), uncheckedJSON)))
	refused(t, lb)
	require.Contains(t, backendStatuses(t)[s.address].LastError, "unknown authority")
}

// A certificate has an address without its zone, which is of this machine alone.
func TestTLSServerNameWithoutZone(t *testing.T) {
	a := newIssuer(t)
	cert, err := x509.ParseCertificate(a.issue(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.ParseIP("fe80::1")} }).Certificate[0])
	require.NoError(t, err)
	for address, verified := range map[string]bool{"[fe80::1%eth0]:5432": true, "[fe80::1]:5432": true, "[fe80::2%eth0]:5432": false} {
		to, err := parseTarget(address)
		require.NoError(t, err)
		name := (&security{config: new(tls.Config)}).forHost(to.host).ServerName
		require.Equal(t, verified, cert.VerifyHostname(name) == nil, name)
	}
}

func TestTLSToAUnixSocket(t *testing.T) {
	watchLeftovers(t)
	a := newIssuer(t)
	path := a.unixServer(t)
	require.ErrorContains(t, loadOnce(lbConfig(freeAddress(t), fmt.Sprintf(`{%s,"tls":{}}`, backendsJSON("unix/"+path)))),
		"has no host whose name a certificate could have: write tls.server_name")
	lb := startTLS(t, "tcp_lb/", a.trusted(`"server_name":"127.0.0.1"`), "unix/"+path)
	echoed(t, lb, 10)
}

// tryEcho has a byte echoed by way of the balancer.
func tryEcho(lb string) error {
	c, err := net.DialTimeout("tcp", lb, hangTimeout)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(hangTimeout))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

// receive returns what comes, as long as a hang would take to notice.
func receive[T any](t testing.TB, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(hangTimeout):
		require.FailNow(t, "nothing came")
	}
	return v
}
