package tcplb

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// Checks speak what clients' connections speak, unless told otherwise.
func TestChecksFollowTLS(t *testing.T) {
	a := newIssuer(t)
	expired := func(t testing.TB) *server {
		return a.server(t, &tls.Config{Certificates: []tls.Certificate{a.issue(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })}}, secureEcho)
	}
	good := func(t testing.TB) *server { return a.server(t, nil, secureEcho) }
	wanting := func(t testing.TB) *server {
		return a.server(t, &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool()}, secureEcho)
	}
	plain := func(t testing.TB) *server { return echoServer(t) }
	silent := func(t testing.TB) *server {
		return startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	}
	named := func(t testing.TB) *server {
		return a.server(t, &tls.Config{Certificates: []tls.Certificate{a.issue(func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"web.internal"} })}}, secureEcho)
	}
	t.Setenv("TCPLB_TEST_NAME", "web.internal")
	other := newIssuer(t)
	const often = `"interval":"20ms","fast_interval":"20ms"`
	for name, c := range map[string]struct {
		start           func(testing.TB) *server
		options, checks string
		want            string // of the last error; empty = it is up
	}{
		"a certificate that holds":   {good, a.trusted(""), often, ""},
		"an expired one":             {expired, a.trusted(""), often, "expired"},
		"no TLS":                     {plain, a.trusted(""), often, "TLS handshake"},
		"silence":                    {silent, a.trusted(""), often + `,"timeout":"50ms"`, "TLS handshake: not done within 50ms"},
		"told not to":                {expired, a.trusted(""), often + `,"tls":{"off":true}`, ""},
		"told to, and no more":       {good, a.trusted(""), often + `,"tls":{}`, ""},
		"told a name":                {named, a.trusted(""), often + `,"tls":{"server_name":"web.internal"}`, ""},
		"told a placeholder":         {named, a.trusted(""), often + `,"tls":{"server_name":"{env.TCPLB_TEST_NAME}"}`, ""},
		"told another name":          {named, a.trusted(`"server_name":"web.internal"`), often + `,"tls":{"server_name":"db.internal"}`, "not db.internal"},
		"told other CAs":             {good, a.trusted(""), often + "," + other.trusted(""), "unknown authority"},
		"told CAs, of whom any do":   {good, `"tls":{"insecure_skip_verify":true}`, often + "," + other.trusted(""), "unknown authority"},
		"told that any do":           {named, a.trusted(""), often + `,"tls":{"insecure_skip_verify":true}`, ""},
		"told to, of whom any do":    {named, `"tls":{"insecure_skip_verify":true}`, often + `,"tls":{}`, ""},
		"told CAs, a certificate":    {wanting, `"tls":{` + a.files(a.issue(nil)) + `}`, often + "," + a.trusted(""), ""},
		"no client's certificate":    {wanting, a.trusted(""), often, "after the TLS handshake: remote error: tls: certificate required"},
		"a client's certificate":     {wanting, a.trusted(a.files(a.issue(nil))), often, ""},
		"a check by more than that":  {good, a.trusted(""), often + `,"dialogue":[{"send":"ping"},{"expect":"ping"}]`, ""},
		"the same, and no TLS there": {plain, a.trusted(""), often + `,"dialogue":[{"send":"ping"},{"expect":"ping"}]`, "TLS handshake"},
	} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			s := c.start(t)
			runCaddy(t, lbConfig(freeAddress(t), fmt.Sprintf(`{%s,%s,"health_checks":{"active":{%s}}}`, backendsJSON(s.address), c.options, c.checks)))
			checked(t)
			if c.want == "" {
				require.Empty(t, backendStatuses(t)[s.address].LastError)
				require.True(t, backendStatuses(t)[s.address].Healthy)
				return
			}
			eventually(t, func() bool {
				b := backendStatuses(t)[s.address] // one check of many may come to nothing, not even to this
				return !b.Healthy && strings.Contains(b.LastError, c.want)
			}, "it is down for this reason, %v", lazily(func() any { return backendStatuses(t) }))
		})
	}
}

// Another port is another service's as a rule, and speaks what that does.
func TestChecksOfAnotherPortDoNotFollowTLS(t *testing.T) {
	a := newIssuer(t)
	s, agent := a.server(t, nil, secureEcho), echoServer(t)
	port := func(s *server) int {
		tcp, err := net.ResolveTCPAddr("tcp", s.address)
		require.NoError(t, err)
		return tcp.Port
	}
	for name, c := range map[string]struct {
		port    int
		follows bool
	}{"its own": {port(s), true}, "an agent's": {port(agent), false}} {
		t.Run(name, func(t *testing.T) {
			before := agent.acceptedCount()
			runCaddy(t, lbConfig(freeAddress(t), fmt.Sprintf(`{%s,%s,"health_checks":{"active":{"port":%d,"dialogue":[{"send":"ping"},{"expect":"ping"}]}}}`,
				backendsJSON(s.address), a.trusted(""), c.port)))
			checked(t)
			require.True(t, backendStatuses(t)[s.address].Healthy, backendStatuses(t)[s.address].LastError)
			require.Equal(t, c.follows, agent.acceptedCount() == before)
		})
	}
}

// What checks have of their own is all that they have on another port.
func TestChecksOfAnotherPortInheritNothing(t *testing.T) {
	a := newIssuer(t)
	agent := a.server(t, nil, secureEcho)
	tcp, err := net.ResolveTCPAddr("tcp", agent.address)
	require.NoError(t, err)
	s := a.server(t, nil, secureEcho)
	runCaddy(t, lbConfig(freeAddress(t), fmt.Sprintf(`{%s,%s,"health_checks":{"active":{"interval":"20ms","fast_interval":"20ms","port":%d,"tls":{}}}}`,
		backendsJSON(s.address), a.trusted(""), tcp.Port)))
	eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "it is down")
	require.Contains(t, backendStatuses(t)[s.address].LastError, "unknown authority")
}

// Who adds tls to checks by TLS has them ask as clients' connections do, at once.
func TestOwnChecksFollowAReloadToTLS(t *testing.T) {
	a := newIssuer(t)
	// By TLS 1.2 a backend refuses within the handshake: one check is enough, however
	// late the answer.
	s := a.server(t, &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool(), MaxVersion: tls.VersionTLS12}, secureEcho)
	lb := freeAddress(t)
	config := func(more string) string {
		return lbConfig(lb, fmt.Sprintf(`{%s,"health_checks":{"active":{"interval":"1h","fast_interval":"1h","fails":1,%s}}%s}`, backendsJSON(s.address), a.trusted(`"server_name":"127.0.0.1"`), more))
	}
	runCaddy(t, config(""))
	eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "no certificate")
	reload(t, config(`,"tls":{`+a.files(a.issue(nil))+`}`))
	eventually(t, func() bool { return backendStatuses(t)[s.address].Healthy }, "a certificate")
	reload(t, config(""))
	eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "none again")
}

// A Unix socket has no port, and is probed itself whatever the port for the others.
func TestChecksOfAUnixSocketFollowTLS(t *testing.T) {
	a := newIssuer(t)
	path := a.unixServer(t)
	for _, port := range []string{"", `"port":9,`} {
		runCaddy(t, lbConfig(freeAddress(t), fmt.Sprintf(`{%s,%s,"health_checks":{"active":{%s"dialogue":[{"send":"ping"},{"expect":"ping"}]}}}`,
			backendsJSON("unix/"+path), a.trusted(`"server_name":"127.0.0.1"`), port)))
		checked(t)
		status := backendStatuses(t)["unix/"+path]
		require.True(t, status.Healthy, "%s %s", port, status.LastError)
		require.NoError(t, caddy.Stop())
	}
}

// A reload that has checks speak TLS asks another question: the first answer to it
// decides alone.
func TestChecksFollowAReloadToTLS(t *testing.T) {
	a := newIssuer(t)
	s := startServer(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	lb := freeAddress(t)
	config := func(more string) string {
		return lbConfig(lb, fmt.Sprintf(`{%s,"health_checks":{"active":{"interval":"1h","fast_interval":"1h"}}%s}`, backendsJSON(s.address), more))
	}
	runCaddy(t, config(""))
	checked(t)
	require.True(t, backendStatuses(t)[s.address].Healthy)
	reload(t, config(","+a.trusted("")))
	eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "a check by TLS")
	reload(t, config(""))
	eventually(t, func() bool { return backendStatuses(t)[s.address].Healthy }, "a check without")
}
