package tcplb

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite the expected JSON under testdata/caddyfile")

// goldenSeparator stands between a golden file's Caddyfile and its JSON.
const goldenSeparator = "----------\n"

func TestCaddyfileGolden(t *testing.T) {
	t.Setenv("TCPLB_TEST_BACKEND", "backend9:3009")
	t.Setenv("TCPLB_TEST_PORT", "5432")
	t.Setenv("TCPLB_TEST_HOST", "web")
	files, err := filepath.Glob("testdata/caddyfile/*.caddytest")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddytest"), func(t *testing.T) {
			content, err := os.ReadFile(file)
			require.NoError(t, err)
			input, want, ok := strings.Cut(string(content), goldenSeparator)
			require.True(t, ok, "no line of ten dashes")

			config, err := adapt(t, input)
			require.NoError(t, err)
			got := indented(t, config)
			if *update {
				require.NoError(t, os.WriteFile(file, []byte(input+goldenSeparator+got), 0o644))
				return
			}
			require.Equal(t, want, got)
			require.NoError(t, validate(t, config), "what the Caddyfile gives can be loaded")
		})
	}
}

func indented(t testing.TB, config string) string {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, json.Indent(&b, []byte(config), "", "\t"))
	return b.String() + "\n"
}

func TestEveryOptionHasAGolden(t *testing.T) {
	for _, option := range append(namesOf(handlerOptions), "tcp_lb_health") {
		content, err := os.ReadFile("testdata/caddyfile/" + option + ".caddytest")
		require.NoError(t, err)
		input, _, _ := strings.Cut(string(content), goldenSeparator)
		require.Regexp(t, `(?m)^\t+`+option+`\b`, input)
	}
}

// TestCaddyfileIsTheJSON has the design's full example in both forms.
func TestCaddyfileIsTheJSON(t *testing.T) {
	config, err := adapt(t, lbCaddyfile("backend1:3001",
		"name web", "lb_policy round_robin", "lb_retries 3", "lb_try_duration 1s", "lb_try_interval 250ms", "lb_slow_start 30s",
		"health_interval 10s", "health_fast_interval 1s", "health_timeout 2s", "health_passes 2", "health_fails 3",
		"health_port 8081", "max_connections 5000", "dial_timeout 3s", "idle_timeout 1h", "drain_timeout 30s", "access_log"))
	require.NoError(t, err)
	require.Equal(t, handlerOf(t, `{"handler":"tcp_lb","name":"web","backends":[{"address":"backend1:3001"}],
		"load_balancing":{"selection_policy":{"policy":"round_robin"},"retries":3,"try_duration":"1s","try_interval":"250ms","slow_start":"30s"},
		"health_checks":{"active":{"interval":"10s","fast_interval":"1s","timeout":"2s","passes":2,"fails":3,"port":8081}},
		"max_connections":5000,"dial_timeout":"3s","idle_timeout":"1h","drain_timeout":"30s","access_log":true}`),
		handlerOf(t, firstHandler(t, config)))
}

// firstHandler returns the JSON of the first handler of the first layer4 server.
func firstHandler(t testing.TB, config string) string {
	t.Helper()
	var c struct {
		Apps struct {
			Layer4 struct {
				Servers map[string]struct {
					Routes []struct{ Handle []json.RawMessage }
				}
			}
		}
	}
	require.NoError(t, json.Unmarshal([]byte(config), &c))
	return string(c.Apps.Layer4.Servers["srv0"].Routes[0].Handle[0])
}

// handlerOf reads a handler's JSON.
func handlerOf(t testing.TB, raw string) *Handler {
	t.Helper()
	h := new(Handler)
	require.NoError(t, json.Unmarshal([]byte(raw), h))
	return h
}

// lbCaddyfile is a Caddyfile with one tcp_lb: its arguments are on line
// handlerLine, its options start on the next.
func lbCaddyfile(arguments string, options ...string) string {
	var b strings.Builder
	b.WriteString("{\n\tlayer4 {\n\t\t:8080 {\n\t\t\troute {\n\t\t\t\t" + strings.TrimSpace("tcp_lb "+arguments))
	if len(options) > 0 {
		b.WriteString(" {\n")
		for _, o := range options {
			b.WriteString("\t\t\t\t\t" + o + "\n")
		}
		b.WriteString("\t\t\t\t}")
	}
	b.WriteString("\n\t\t\t}\n\t\t}\n\t}\n}\n")
	return b.String()
}

const handlerLine = 5

// requireRefused adapts the Caddyfile and wants an error that has all of want
// and that names this line and no other.
func requireRefused(t testing.TB, caddyfile string, line int, want ...string) {
	t.Helper()
	_, err := adapt(t, caddyfile)
	require.Error(t, err)
	for _, w := range want {
		require.ErrorContains(t, err, w)
	}
	places := regexp.MustCompile(`Caddyfile:\d+`).FindAllString(err.Error(), -1)
	require.Equal(t, []string{fmt.Sprintf("Caddyfile:%d", line)}, places, "%v", err)
}

func TestCaddyfileRefuses(t *testing.T) {
	const good = "good:80"
	for _, c := range []struct {
		name      string
		arguments string
		options   []string
		line      int // counted from the handler's own, which is 0
		want      []string
	}{
		{"no backends", "", nil, 0, []string{"no backends"}},
		{"no backends in a block", "", []string{"name web"}, 0, []string{"no backends"}},

		{"duplicate inline", "a:80 b:80 a:80", nil, 0, []string{"backend", `"a:80"`, "twice"}},
		{"duplicate inline and line", "a:80", []string{"name web", "backend a:80"}, 2, []string{"backend", `"a:80"`, "twice"}},
		{"duplicate lines", "", []string{"backend a:80", "backend a:80 2"}, 2, []string{"backend", `"a:80"`, "twice"}},
		{"duplicate with a block", "a:80", []string{"backend a:80 {", "\tweight 2", "}"}, 1, []string{"backend", `"a:80"`, "twice"}},
		{"duplicate IPv6 in another form", "[::1]:80", []string{"backend [0:0::1]:80"}, 1, []string{"backend", `"[0:0::1]:80"`, "twice"}},
		{"duplicate port in another form", "a:80", []string{"backend a:080"}, 1, []string{"backend", `"a:080"`, "twice"}},
		{"duplicate with a network", "a:80", []string{"backend tcp/a:80"}, 1, []string{"backend", `"tcp/a:80"`, "twice"}},
		{"duplicate Unix socket", "unix//run/a.sock", []string{"backend unix//run/a.sock"}, 1, []string{"backend", `"unix//run/a.sock"`, "twice"}},
		{"duplicate placeholder", "{env.A}", []string{"backend {env.A}"}, 1, []string{"backend", `"{env.A}"`, "twice"}},

		{"mistyped IP address", "10.0.5.300:1883", nil, 0, []string{`backend "10.0.5.300:1883"`, `host "10.0.5.300": no IP address`}},
		{"mistyped IP address on a line", good, []string{"name web", "backend 256.1.1.1:80"}, 2, []string{`"256.1.1.1"`, "no IP address"}},
		{"too many numbers", "", []string{"backend 1.2.3.4.5:80 2"}, 1, []string{`"1.2.3.4.5"`, "no IP address"}},
		{"too few numbers", "10.0.0:80", nil, 0, []string{`"10.0.0"`, "no IP address"}},
		{"IP address in hexadecimal", "0x7f.1:80 0x7f000001:80", nil, 0, []string{"no IP address"}},
		{"IP address with a dot at its end", "10.0.0.1.:5432", nil, 0, []string{"did you mean 10.0.0.1?"}},

		{"unknown option", good, []string{"name web", "lb_polciy round_robin"}, 2, []string{"unknown option", `"lb_polciy"`}},
		{"unknown option of a backend", good, []string{"backend b:80 {", "\tmax_conns 2", "}"}, 2, []string{"b:80", "unknown option", `"max_conns"`}},

		{"weight 257", good, []string{"backend b:80 257"}, 1, []string{"b:80", "weight 257"}},
		{"weight -1", good, []string{"backend b:80 -1"}, 1, []string{"b:80", "weight -1"}},
		{"weight x", good, []string{"backend b:80 x"}, 1, []string{"b:80", `unknown word "x" after the address`}},
		{"weight 1.5", good, []string{"backend b:80 1.5"}, 1, []string{"b:80", "weight 1.5"}},
		{"weight -1 in a block", good, []string{"backend b:80 {", "\tweight -1", "}"}, 2, []string{"b:80", "weight -1"}},
		{"weight 257 in a block", good, []string{"backend b:80 {", "\tweight 257", "}"}, 2, []string{"b:80", "weight 257"}},
		{"weight x in a block", good, []string{"backend b:80 {", "\tweight x", "}"}, 2, []string{"b:80", "weight x"}},
		{"weight twice, inline and block", good, []string{"backend b:80 2 {", "\tweight 2", "}"}, 2, []string{"b:80", "weight", "twice"}},
		{"weight twice in a block", good, []string{"backend b:80 {", "\tweight 2", "\tweight 3", "}"}, 3, []string{"b:80", "weight", "twice"}},
		{"weight without a value", good, []string{"backend b:80 {", "\tweight", "}"}, 2, []string{"weight", "missing"}},
		{"weight with two values", good, []string{"backend b:80 {", "\tweight 2 3", "}"}, 2, []string{"weight 2", `"3"`}},
		{"weight with a block", good, []string{"backend b:80 {", "\tweight 2 {", "\t\tx", "\t}", "}"}, 3, []string{"weight", "block", `"x"`}},

		{"backend without an address", good, []string{"backend"}, 1, []string{"backend", "missing"}},
		{"backend with three values", good, []string{"backend b:80 2 c:80"}, 1, []string{"backend b:80", `"c:80"`}},
		{"port range", "a:80-82", nil, 0, []string{"backend", `"a:80-82"`, "port range"}},
		{"port range on a line", good, []string{"backend b:80-82"}, 1, []string{"backend", `"b:80-82"`, "port range"}},
		{"port 0", good, []string{"backend b:0"}, 1, []string{"backend", `"b:0"`, `port "0"`}},
		{"port 65536", good, []string{"backend b:65536"}, 1, []string{"backend", `"b:65536"`, `port "65536"`}},
		{"port by name", good, []string{"backend b:http"}, 1, []string{"backend", `"b:http"`, `port "http"`}},
		{"missing port", good, []string{"backend b"}, 1, []string{"backend", `"b"`, "port is missing"}},
		{"empty port", good, []string{"backend b:"}, 1, []string{"backend", `"b:"`, "port is missing"}},
		{"missing host", good, []string{"backend :80"}, 1, []string{"backend", `":80"`, "host is missing"}},
		{"missing brackets", good, []string{"backend ::1:80"}, 1, []string{"backend", `"::1:80"`, "brackets"}},
		{"no IPv6 address in brackets", good, []string{"backend [a:b]:80"}, 1, []string{"backend", `"[a:b]:80"`, "not an IPv6 address"}},
		{"missing path", good, []string{"backend unix/"}, 1, []string{"backend", `"unix/"`, "path is missing"}},
		{"UDP", "udp/a:80", nil, 0, []string{"backend", `"udp/a:80"`, `network "udp"`}},
		{"UDP on a line", good, []string{"backend udp/a:80"}, 1, []string{"backend", `"udp/a:80"`, `network "udp"`}},
		{"a URL", good, []string{"backend http://b:80"}, 1, []string{"backend", `"http://b:80"`}},
		{"not UTF-8", good, []string{"backend b\xff:80"}, 1, []string{"backend", `"b`, "UTF-8"}},
		{"not UTF-8 inline", "b\xff:80", nil, 0, []string{"backend", `"b`, "UTF-8"}},
		{"not UTF-8 beside a placeholder", good, []string{"backend {env.A}\xff:80"}, 1, []string{"backend", `"{env.A}`, "UTF-8"}},
		{"a control character", good, []string{"backend b\a:80"}, 1, []string{"backend", `"b\a:80"`, "printable"}},
		{"a line end in quotes", good, []string{"backend \"b:80", "\""}, 1, []string{"backend", `"b:80\n`, "printable"}},
		{"a control character in a Unix path", good, []string{"backend unix//run/\x1b.sock"}, 1, []string{"backend", `"unix//run/\x1b.sock"`, "printable"}},
		{"a space in the host", good, []string{`backend "b c:80"`}, 1, []string{"backend", `"b c:80"`, "invalid host"}},
		{"empty address", `""`, nil, 0, []string{"backend", `""`}},

		{"unknown policy", good, []string{"lb_policy fastest"}, 1, []string{"lb_policy", "fastest"}},
		{"policy with arguments", good, []string{"lb_policy round_robin 2"}, 1, []string{"lb_policy round_robin", `"2"`}},
		{"policy with a block", good, []string{"lb_policy round_robin {", "\tx", "}"}, 2, []string{"lb_policy round_robin", "block", `"x"`}},

		{"fast interval over interval", good, []string{"health_fast_interval 3s", "health_interval 2s"}, 1, []string{"health_fast_interval 3s", "2s"}},
		{"interval under fast interval", good, []string{"health_interval 2s", "health_fast_interval 3s"}, 2, []string{"health_fast_interval 3s", "2s"}},
		{"fast interval over the default interval", good, []string{"health_fast_interval 11s"}, 1, []string{"health_fast_interval 11s", "10s"}},

		{"lb_retries -1", good, []string{"lb_retries -1"}, 1, []string{"lb_retries -1"}},
		{"lb_retries 1001", good, []string{"lb_retries 1001"}, 1, []string{"lb_retries 1001"}},
		{"health_passes 0", good, []string{"health_passes 0"}, 1, []string{"health_passes 0"}},
		{"health_fails 0", good, []string{"health_fails 0"}, 1, []string{"health_fails 0"}},
		{"health_port 0", good, []string{"health_port 0"}, 1, []string{"health_port 0"}},
		{"health_port 70000", good, []string{"health_port 70000"}, 1, []string{"health_port 70000"}},
		{"max_connections -1", good, []string{"max_connections -1"}, 1, []string{"max_connections -1"}},
		{"max_connections beyond 31 bits", good, []string{"max_connections 2147483648"}, 1, []string{"max_connections 2147483648"}},

		{"empty name", good, []string{`name ""`}, 1, []string{"name", `""`}},
		{"name with a control character", good, []string{"name \"a\tb\""}, 1, []string{"name", `"a\tb"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			requireRefused(t, lbCaddyfile(c.arguments, c.options...), handlerLine+c.line, c.want...)
		})
	}
}

// validOptions has a valid value of each option but backend.
var validOptions = map[string]string{
	"name":                  "web",
	"dynamic":               "a db.internal 5432",
	"lb_policy":             "round_robin",
	"lb_retries":            "3",
	"lb_try_duration":       "1s",
	"lb_try_interval":       "1s",
	"lb_slow_start":         "30s",
	"health_interval":       "10s",
	"health_fast_interval":  "1s",
	"health_timeout":        "1s",
	"health_passes":         "2",
	"health_fails":          "2",
	"health_port":           "8081",
	"health_uri":            "/primary?x=1",
	"health_method":         "HEAD",
	"health_status":         "204",
	"health_headers":        "{\n\t\t\t\t\t\tHost db\n\t\t\t\t\t}",
	"health_body":           "ok$",
	"health_send":           `"PING\r\n"`,
	"health_expect":         "+PONG",
	"health_tls":            "db.internal",
	"health_tls_trust_pool": "file testdata/ca.pem",
	"health_proxy_protocol": "v2",
	"health_check":          "always",
	"proxy_protocol":        "v2",
	"local_address":         "127.0.0.5",
	"tls":                   "",
	"tls_server_name":       "db.internal",
	"tls_trust_pool":        "file testdata/ca.pem",
	"tls_client_auth":       "cert.pem key.pem",
	"tls_timeout":           "1s",
	"tls_alpn":              "postgresql",
	"tls_curves":            "x25519",
	"tls_renegotiation":     "once",
	"max_connections":       "5000",
	"dial_timeout":          "1s",
	"idle_timeout":          "1s",
	"drain_timeout":         "1s",
	"access_log":            "",

	"max_connections_per_client":      "20",
	"max_lifetime":                    "1h",
	"health_follow_redirects":         "",
	"health_initially_unhealthy":      "",
	"close_if_unhealthy":              "10s",
	"fail_duration":                   "10s",
	"max_fails":                       "3",
	"health_tls_insecure_skip_verify": "",
	"tls_insecure_skip_verify":        "",
}

// neededOptions has what an option is refused without.
var neededOptions = map[string]string{
	"health_method": "health_uri /", "health_status": "health_uri /", "health_headers": "health_uri /",
	"health_body": "health_uri /", "health_follow_redirects": "health_uri /", "max_fails": "fail_duration 10s",
	"tls_server_name": "tls", "tls_trust_pool": "tls", "tls_client_auth": "tls", "tls_insecure_skip_verify": "tls", "tls_timeout": "tls",
	"tls_alpn": "tls", "tls_curves": "tls", "tls_renegotiation": "tls",
}

// withNeeded are the lines of an option.
func withNeeded(option string, lines ...string) []string {
	if needed := neededOptions[option]; needed != "" {
		return append([]string{needed}, lines...)
	}
	return lines
}

var (
	validBackendOptions = map[string]string{"weight": "2", "max_connections": "100", "health_port": "8008", "proxy_protocol": "v1", "local_address": "127.0.0.6",
		"tls_server_name": "db.internal", "tls_trust_pool": "file testdata/ca.pem", "tls_client_auth": "cert.pem key.pem", "tls_timeout": "1s",
		"tls_alpn": "postgresql", "tls_curves": "x25519", "tls_renegotiation": "once"}
	validGlobalOptions = map[string]string{"handshake_timeout": "5s", "shutdown_delay": "10s"}
)

var (
	durationOptions = []string{
		"lb_try_duration", "lb_try_interval", "lb_slow_start", "health_interval", "health_fast_interval", "health_timeout",
		"dial_timeout", "idle_timeout", "drain_timeout", "fail_duration", "close_if_unhealthy", "max_lifetime", "tls_timeout",
	}
	// nonzeroDurations can't be 0: they would have a probe or a try without end.
	nonzeroDurations = []string{"lb_try_interval", "health_interval", "health_fast_interval", "health_timeout", "dial_timeout", "tls_timeout"}
	numberOptions    = []string{"lb_retries", "health_passes", "health_fails", "health_port", "max_connections", "max_connections_per_client", "max_fails"}
)

// TestCaddyfileRefusesOfEveryOption has the mistakes that each option can have.
func TestCaddyfileRefusesOfEveryOption(t *testing.T) {
	require.ElementsMatch(t, namesOf(handlerOptions), append(slices.Collect(maps.Keys(validOptions)), "backend"))
	refused := func(mistake, option string, line int, lines []string, want ...string) {
		t.Run(mistake+"/"+option, func(t *testing.T) {
			requireRefused(t, lbCaddyfile("good:80", lines...), handlerLine+line, append(want, option)...)
		})
	}
	for option, value := range validOptions {
		valid := strings.TrimSpace(option + " " + value)
		_, err := adapt(t, lbCaddyfile("good:80", withNeeded(option, valid)...))
		require.NoError(t, err)

		switch option {
		case "health_send", "health_expect":
			_, err := adapt(t, lbCaddyfile("good:80", valid, valid))
			require.NoError(t, err, "each is a step")
		case "health_headers": // of more lines than one
			refused("twice", option, 4, []string{valid, valid}, "twice")
		default:
			refused("twice", option, 2, []string{valid, valid}, "twice")
		}
		switch option {
		case "dynamic", "health_tls_trust_pool", "tls_trust_pool": // whose values and block are the module's
		case "health_headers": // which is a block
		case "tls_alpn", "tls_curves": // which are lists
			refused("block", option, 2, []string{valid + " {", "\tinside", "}"}, "block", `"inside"`)
			refused("extra value", option, 1, []string{valid + " " + value}, value, "twice")
		default:
			refused("block", option, 2, []string{valid + " {", "\tinside", "}"}, "block", `"inside"`)
			refused("extra value", option, 1, []string{valid + " more"}, strings.Trim(value, `"`), `"more"`)
		}
		if value != "" && option != "health_tls" && option != "close_if_unhealthy" {
			refused("missing value", option, 1, []string{option}, "missing")
			refused("missing value before another option", option, 1, []string{option, "backend b:80"}, "missing")
		}
		if value != "" && option != "health_tls" && option != "close_if_unhealthy" && option != "health_headers" {
			refused("missing value before a block", option, 1, []string{option + " {", "\tinside", "}"}, "missing")
		}
	}
	for _, option := range durationOptions {
		refused("negative", option, 1, []string{option + " -5s"}, "-5s")
		for _, value := range []string{"soon", "10", "10 s", "s", "offf"} {
			refused("no duration", option, 1, []string{option + " " + fmt.Sprintf("%q", value)}, value)
		}
	}
	for _, option := range nonzeroDurations {
		refused("zero", option, 1, []string{option + " 0s"}, "0s")
		refused("too short", option, 1, []string{option + " 999us"}, "999µs")
	}
	for _, option := range numberOptions {
		for _, value := range []string{"-1", "many", "1.5", "0x10", "99999999999999999999"} {
			refused("no number", option, 1, []string{option + " " + value}, value)
		}
	}
	refused("off and on", "health_interval", 2, []string{"health_interval off", "health_interval 5s"}, "twice")
}

func TestCaddyfileHealthDirectiveRefuses(t *testing.T) {
	for _, c := range []struct {
		name, directive string
		line            int
		want            []string
	}{
		{"pool twice", "tcp_lb_health /health web db web", 2, []string{"tcp_lb_health", `"web"`, "twice"}},
		{"pool without a name", `tcp_lb_health /health ""`, 2, []string{"tcp_lb_health", "names of pools"}},
		{"block", "tcp_lb_health /health {\n\t\tinside\n\t}", 3, []string{"tcp_lb_health", "block", `"inside"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			requireRefused(t, "http://:9090 {\n\t"+c.directive+"\n}\n", c.line, c.want...)
		})
	}
}

// TestCaddyfileErrorNamesTheImportedPlace has a mistake in a snippet.
func TestCaddyfileErrorNamesTheImportedPlace(t *testing.T) {
	_, err := adapt(t, "(options) {\n\tlb_retries -1\n}\n")
	require.NoError(t, err, "an unused snippet is not looked at")
	text := "{\n\tlayer4 {\n\t\t:8080 {\n\t\t\troute {\n\t\t\t\ttcp_lb a:80 {\n\t\t\t\t\tlb_retries {$TCPLB_TEST_RETRIES}\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n"
	t.Setenv("TCPLB_TEST_RETRIES", "-1")
	requireRefused(t, text, 6, "lb_retries -1")
	t.Setenv("TCPLB_TEST_RETRIES", "4")
	config, err := adapt(t, text)
	require.NoError(t, err)
	require.Equal(t, 4, *handlerOf(t, firstHandler(t, config)).LoadBalancing.Retries)
}
