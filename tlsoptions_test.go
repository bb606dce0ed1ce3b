package tcplb

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCaddyfileRefusesOfTLS(t *testing.T) {
	for _, c := range []struct {
		lines string
		line  int
		want  string
	}{
		{"tls_server_name db.internal", 1, "tcp_lb: tls_server_name: there is no TLS without tls"},
		{"name web\ntls_insecure_skip_verify", 2, "tls_insecure_skip_verify: there is no TLS without tls"},
		{"backend b:80 {\n\ttls_timeout 1s\n}", 2, "backend b:80: tls_timeout: there is no TLS without tls: write tls, here or for all backends"},
		{"tls off", 1, "tls: it is off unless it is there"},
		{"tls on", 1, "tls: takes no value"},
		{"tls db.internal", 1, "what else it takes stands on lines of its own, such as tls_server_name"},
		{"tls {\n\tca /etc/ca.pem\n}", 2, "what else it takes stands on lines of its own"},
		{"backend b:80 {\n\ttls off more\n}", 2, `tls off: one value is enough, found "more"`},
		{"tls\ntls_server_name db:5432", 2, `tls_server_name "db:5432": want a server's name`},
		{"tls\ntls_server_name 10.0.0.300", 2, `tls_server_name "10.0.0.300": no IP address`},
		{"tls\nbackend b:80 {\n\ttls_server_name 10.0.0.1.\n}", 3, "did you mean 10.0.0.1?"},
		{"tls\ntls_server_name *.internal", 2, "want a server's name"},
		{"tls\ntls_client_auth a b c", 2, `tls_client_auth a b: want a certificate's file and its key's, found "c"`},
		{"tls\ntls_client_auth /etc/lb.pem", 2, "want a name for which Caddy has a certificate, or two files"},
		{"tls\ntls_client_auth lb.PEM", 2, "or two files: the certificate's and its key's, which may be one and the same"},
		{"tls\ntls_trust_pool files a", 2, "tls_trust_pool files"},
		{"tls\ntls_curves p256", 2, `unknown curve "p256"`},
		{"tls\ntls_curves x25519 x25519", 2, "listed twice"},
		{"tls\ntls_alpn \"\"", 2, "want protocols of 1 to 255 bytes"},
		{"tls\ntls_renegotiation always", 2, `tls_renegotiation "always": want never, once or freely`},
		{"tls\nbackend unix//run/db.sock", 1, `backend "unix//run/db.sock" has no host whose name a certificate could have: write tls_server_name`},
		{"tls\ntls_trust_pool file a.pem\nname web\ntls_insecure_skip_verify", 4, "tls_insecure_skip_verify: nothing is verified with it, so that tls_trust_pool would do nothing"},
		{"backend b:80 {\n\ttls\n\ttls_insecure_skip_verify\n\ttls_trust_pool file a.pem\n}", 3, "backend b:80: tls_insecure_skip_verify: nothing is verified with it"},
		{"health_tls_trust_pool file a.pem\nhealth_tls_insecure_skip_verify", 2, "health_tls_insecure_skip_verify: nothing is verified with it, so that health_tls_trust_pool"},
		{"dial_timeout 1s\ntls\ntls_timeout 2s", 3, "tls_timeout 2s: may not exceed dial_timeout, 1s"},
		{"backend b:80 {\n\ttls\n\ttls_timeout 2s\n}\ndial_timeout 1s", 5, `backend "b:80": tls_timeout 2s: may not exceed dial_timeout, 1s`},
		{"health_tls off\nhealth_tls_insecure_skip_verify", 1, "health_tls: it is off, the other options"},
	} {
		t.Run(c.lines, func(t *testing.T) {
			requireRefused(t, lbCaddyfile("good:80", strings.Split(c.lines, "\n")...), handlerLine+c.line, c.want)
		})
	}
	for _, lines := range []string{
		"backend b:80 {\n\ttls_timeout 1s\n}\ntls", "backend b:80 {\n\ttls\n\ttls_timeout 1s\n}", "tls\ntls_server_name 10.0.0.1",
		"tls\ntls_server_name {env.NAME}", "tls\ntls_server_name db.internal\nbackend unix//run/db.sock", "tls\nbackend unix//run/db.sock {\n\ttls off\n}",
		"tls\ntls_client_auth lb.internal", "tls\nhealth_tls off", "tls\ntls_server_name db.internal\nhealth_tls\nhealth_port 9\nbackend unix//run/db.sock", "health_tls {env.NAME}", "tls\ntls_timeout 1m", "tls\ntls_timeout 1s\ndial_timeout 1s", "tls\ntls_insecure_skip_verify\nbackend b:80 {\n\ttls_trust_pool file a.pem\n}",
		"tls\ntls_server_name db.internal\nhealth_tls\nbackend unix//run/db.sock", "tls\nhealth_tls\nbackend unix//run/db.sock {\n\ttls_insecure_skip_verify\n}",
	} {
		_, err := adapt(t, lbCaddyfile("good:80", strings.Split(lines, "\n")...))
		require.NoError(t, err, lines)
	}
}

// Caddy makes an empty pool of a file in which it finds no certificate. All backends
// would be down with it.
func TestTrustPoolOfNobody(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.der")
	require.NoError(t, os.WriteFile(file, []byte{0x30, 0x82}, 0o600))
	// Nor has it a word of one beside another that has one.
	for _, files := range []string{file, "testdata/ca.pem " + file} {
		for _, lines := range []string{"tls\ntls_trust_pool file " + files, "health_tls_trust_pool file " + files} {
			config, err := adapt(t, lbCaddyfile("good:80", strings.Split(lines, "\n")...))
			require.NoError(t, err)
			require.ErrorContains(t, validate(t, config), "no certificate in "+file+": want PEM", lines)
		}
	}
	config := lbConfig("127.0.0.1:0", `{"backends":[{"address":"a:80"}],"tls":{"ca":{"provider":"file","pem_files":[]}}}`)
	require.ErrorContains(t, validate(t, config), "no certificate in the trust pool: want PEM")
}

func TestJSONRefusesOfTLS(t *testing.T) {
	for tls, want := range map[string]string{
		`{"off":true}`:                        "off is for a backend's block",
		`{"client_certificate_file":"a"}`:     "the key is missing",
		`{"client_certificate_key_file":"a"}`: "the certificate is missing",
		`{"client_certificate_file":"a","client_certificate_key_file":"b","client_certificate_automate":"c"}`: "one certificate is enough",
		`{"except_ports":["80"]}`:         `write "tls": {"off": true} beside its address`,
		`{"root_ca_pem_files":["a.pem"]}`: `write "ca"`,
		`{"insecure_skip_verify":true,"ca":{"provider":"file","pem_files":["a"]}}`: "tls.insecure_skip_verify: nothing is verified with it, so that tls.ca would do nothing",
		`{"handshake_timeout":-1}`:                          "tls.handshake_timeout",
		`{"server_name":"10.0.0.300"}`:                      `tls.server_name "10.0.0.300": no IP address`,
		`{"renegotiation":"always"}`:                        `tls.renegotiation "always"`,
		`{"curves":["p256"]}`:                               `tls.curves: unknown curve "p256"`,
		`{"server_name":"{env.TCPLB_TEST_UNSET}{nothing}"}`: "tls.server_name",
		`{"servername":"a"}`:                                `tls: unknown field "servername": did you mean server_name?`,
		`{"insecure_skip_verify":"yes"}`:                    "tls.insecure_skip_verify",
		`true`:                                              "tls: want an object, found true",
		`{"ca":{"provider":"file","pem_files":["/nowhere/ca.pem"]}}`:                                  "/nowhere/ca.pem",
		`{"client_certificate_file":"/nowhere/c.pem","client_certificate_key_file":"/nowhere/k.pem"}`: "/nowhere/c.pem",
	} {
		t.Run(tls, func(t *testing.T) {
			require.ErrorContains(t, loadOnce(lbConfig(freeAddress(t), fmt.Sprintf(`{%s,"tls":%s}`, backendsJSON("a:80"), tls))), want)
		})
	}
	const slow = `{"backends":[{"address":"a:80"}],"tls":{"handshake_timeout":"4s"}%s}`
	require.ErrorContains(t, validate(t, lbConfig("127.0.0.1:0", fmt.Sprintf(slow, `,"dial_timeout":"3s"`))), "tls.handshake_timeout 4s: may not exceed dial_timeout, 3s")
	require.NoError(t, validate(t, lbConfig("127.0.0.1:0", fmt.Sprintf(slow, ""))), "the default was not chosen")
	require.ErrorContains(t, loadOnce(lbConfig(freeAddress(t), `{"backends":[{"address":"a:80","tls":{"off":true,"server_name":"b"}}]}`)), "the other options would do nothing")
}

// Two handlers of one name have one TLS.
func TestTLSDiffers(t *testing.T) {
	two := func(one, other string) error {
		return loadOnce(layer4Config(fmt.Sprintf(`"srv":{"listen":[%q],"routes":[{"match":[{"tls":{}}],"handle":[%s]},{"handle":[%s]}]}`, freeAddress(t),
			withHandler(backendsJSON("a:80")+one+"}"), withHandler(backendsJSON("a:80")+other+"}"))))
	}
	require.ErrorContains(t, two(`,"tls":{}`, ""), "tls is on in one and off in the other")
	require.ErrorContains(t, two(`,"tls":{"server_name":"a"}`, `,"tls":{}`), `tls_server_name is "a" in one and not set in the other`)
	require.NoError(t, two(`,"tls":{}`, `,"tls":{}`))
}
