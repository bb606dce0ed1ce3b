package tcplb

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"
)

var fuzzPlace = regexp.MustCompile(`at Fuzz:(\d+)`)

// FuzzCaddyfile: an error names a line of the input, and what the parser
// accepts provisioning accepts, too.
func FuzzCaddyfile(f *testing.F) {
	for option, value := range validOptions {
		f.Add("a:80", option+" "+value)
	}
	f.Add("a:80 [::1]:80", "backend unix//run/x.sock 3\nbackend b:80 {\n\tweight 2\n}\nname \"a b\"")
	f.Add("", "backend {env.A}:80 256 # comment\nhealth_interval off\nhealth_fast_interval 9s")
	f.Add("a:80", "health_uri /x\nhealth_headers {\n\tHost {env.A}\n}\nhealth_method HEAD\nhealth_status 3xx")
	f.Add("a:80", "health_send \"a\\x00\"\nhealth_expect ~ \"b c\"\nhealth_expect ~`d`\nhealth_uri /")
	f.Add("unix//a", "health_tls\nhealth_proxy_protocol v1\nhealth_tls_trust_pool file x {\n}")
	f.Add("a:80", "health_fast_interval 3s\nhealth_interval 2s")
	f.Add("a:80", "backend b:80 0\nbackend c:80 {\n\tweight 0\n}")
	f.Add("a:080 a:80", "idle_timeout 1d12h\nlb_policy round_robin {\n}\n{\n}")
	f.Add("`a:80`", "name <<END\n\ttext\n\tEND\nbackend b:80 {")
	f.Fuzz(func(t *testing.T, arguments, options string) {
		text := "tcp_lb " + arguments + " {\n" + options + "\n}\n"
		tokens, err := caddyfile.Tokenize([]byte(text), "Fuzz")
		if err != nil {
			return
		}
		var h Handler
		if err := h.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
			place := fuzzPlace.FindStringSubmatch(err.Error())
			require.NotNil(t, place, "no line in the error: %v", err)
			line, _ := strconv.Atoi(place[1])
			require.GreaterOrEqual(t, line, 1)
			require.LessOrEqual(t, line, 1+strings.Count(text, "\n"))
			return
		}

		raw, err := json.Marshal(&h)
		require.NoError(t, err)
		var again Handler
		require.NoError(t, caddy.StrictUnmarshalJSON(raw, &again))
		require.Equal(t, h, again)
		if slices.ContainsFunc(placed(&h), hasPlaceholder) {
			return
		}
		require.NoError(t, again.fill())
		require.NoError(t, again.check())
		requireInRange(t, &again)
	})
}

// FuzzJSON: what is accepted is in its documented range.
func FuzzJSON(f *testing.F) {
	files, err := filepath.Glob("testdata/caddyfile/*.caddytest")
	require.NoError(f, err)
	for _, file := range files {
		content, err := os.ReadFile(file)
		require.NoError(f, err)
		_, config, _ := strings.Cut(string(content), goldenSeparator)
		if strings.Contains(config, `"layer4"`) {
			raw := firstHandler(f, config)
			f.Add([]byte(strings.Replace(raw, `"handler": "tcp_lb",`, "", 1)))
		}
	}
	f.Add([]byte(`{"backends":[{"address":"a:80","weight":0}],"idle_timeout":"-1s","load_balancing":null,"health_checks":{"active":null}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var h Handler
		if caddy.StrictUnmarshalJSON(raw, &h) != nil {
			return
		}
		if slices.ContainsFunc(placed(&h), func(s string) bool { return strings.Contains(s, "{file.") }) {
			return // it would read this machine's files
		}
		if h.fill() != nil || h.check() != nil {
			return
		}
		requireInRange(t, &h)
		_, err := h.fingerprint()
		require.NoError(t, err)
	})
}

// placed are the texts in which placeholders are resolved.
func placed(h *Handler) []string {
	list := []string{h.Name, h.LocalAddress, h.checkTLS().ServerName}
	of := []*BackendTLS{h.TLS}
	for _, b := range h.Backends {
		list, of = append(list, b.Address, b.LocalAddress), append(of, b.TLS)
	}
	for _, t := range of {
		if t != nil {
			list = append(list, t.ServerName, t.ClientCertificateFile, t.ClientCertificateKeyFile, t.ClientCertificateAutomate)
		}
	}
	return list
}

// requireApproach wants what a backend can be connected to by.
func requireApproach(t testing.TB, c ApproachConfig, to ...target) {
	t.Helper()
	require.Contains(t, []checks.ProxyVersion{"", "off", "v1", "v2"}, c.ProxyProtocol)
	if c.LocalAddress == "" || c.LocalAddress == "off" {
		return
	}
	local, err := netip.ParseAddr(c.LocalAddress)
	require.NoError(t, err)
	require.Equal(t, c.LocalAddress, local.Unmap().String(), "in canonical form")
	for _, each := range to {
		require.Empty(t, each.unix)
		require.True(t, !each.literal.IsValid() || each.literal.Is4() == local.Is4(), "%s from %s", each, local)
	}
}

// requireInRange has the documented range of every setting, with the defaults
// filled in.
func requireInRange(t testing.TB, h *Handler) {
	t.Helper()
	number := func(option string, n, low, high int) {
		require.True(t, low <= n && n <= high, "%s %d", option, n)
	}
	atLeast := func(option string, d caddy.Duration, low time.Duration) {
		require.GreaterOrEqual(t, time.Duration(d), low, option)
		require.True(t, d == 0 || time.Duration(d) >= time.Millisecond, "%s %s", option, time.Duration(d))
	}
	require.NotEmpty(t, h.Name)
	require.False(t, strings.ContainsFunc(h.Name, unicode.IsControl), "name %q", h.Name)
	require.NotZero(t, len(h.Backends)+len(h.DynamicBackendsRaw))
	seen := make(map[string]bool)
	for _, b := range h.Backends {
		target, err := parseTarget(b.Address)
		require.NoError(t, err)
		require.False(t, seen[target.String()], "%s twice", target)
		seen[target.String()] = true
		requireScrapable(t, h.Name, target.String())
		number("weight", *b.Weight, 0, 256)
		number("health_port", b.HealthPort, 0, 65535)
		requireApproach(t, b.ApproachConfig.over(h.ApproachConfig), target)
	}
	lb, a := h.LoadBalancing, h.HealthChecks.Active
	require.NotEmpty(t, lb.SelectionPolicyRaw)
	number("retries", *lb.Retries, 0, 1000)
	atLeast("try_duration", lb.TryDuration, 0)
	atLeast("try_interval", lb.TryInterval, time.Millisecond)
	atLeast("slow_start", lb.SlowStart, 0)
	atLeast("interval", a.Interval, time.Millisecond)
	atLeast("fast_interval", a.FastInterval, time.Millisecond)
	require.LessOrEqual(t, a.FastInterval, a.Interval)
	atLeast("timeout", a.Timeout, time.Millisecond)
	number("passes", a.Passes, 1, 1000)
	number("fails", a.Fails, 1, 1000)
	number("port", a.Port, 0, 65535)
	if a.ExpectStatus >= 10 {
		number("expect_status", a.ExpectStatus, 100, 599)
	} else {
		number("expect_status", a.ExpectStatus, 0, 5)
	}
	if a.URI != "" {
		require.True(t, strings.HasPrefix(a.URI, "/"), "uri %q", a.URI)
	}
	require.False(t, a.URI != "" && len(a.Dialogue) > 0, "two checks")
	for _, s := range a.Dialogue {
		require.NotEqual(t, s.Send == "", s.Expect == "", "a step is one of two")
	}
	requireApproach(t, h.ApproachConfig)
	require.Contains(t, []checks.ProxyVersion{"", "off", "v1", "v2"}, a.ProxyProtocol)
	atLeast("fail_duration", h.passiveChecks().FailDuration, 0)
	number("max_fails", h.passiveChecks().MaxFails, 0, 1000)
	if h.CloseIfUnhealthy != nil {
		atLeast("close_if_unhealthy", *h.CloseIfUnhealthy, 0)
	}
	number("max_connections", h.MaxConnections, 0, 1<<31-1)
	number("max_connections_per_client", h.MaxConnectionsPerClient, 0, 1<<31-1)
	atLeast("dial_timeout", h.DialTimeout, time.Millisecond)
	atLeast("idle_timeout", *h.IdleTimeout, 0)
	atLeast("max_lifetime", h.MaxLifetime, 0)
	if require.Equal(t, h.MaxLifetime != 0, h.MaxLifetimeSpread != nil); h.MaxLifetimeSpread != nil {
		number("max_lifetime_spread", *h.MaxLifetimeSpread, 0, 50)
	}
	atLeast("drain_timeout", *h.DrainTimeout, 0)
}

// requireScrapable has the metrics endpoint serve the names as labels.
func requireScrapable(t testing.TB, lb, backend string) {
	t.Helper()
	r := prometheus.NewRegistry()
	gauge := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "probe"}, []string{"lb", "backend"})
	require.NoError(t, r.Register(gauge))
	g, err := gauge.GetMetricWithLabelValues(lb, backend)
	require.NoError(t, err)
	g.Set(1)
	w := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, w.Code, "%q %q: %s", lb, backend, w.Body)
}

// FuzzParseTarget: the canonical form of an address is its own canonical form,
// and names the same target.
func FuzzParseTarget(f *testing.F) {
	for _, address := range []string{
		"a:80", "A.example.:080", "10.0.0.1:1", "[::1]:65535", "[0:0::1]:80", "[::ffff:10.0.0.1]:80", "[fe80::1%eth0]:80",
		"unix//run/x.sock", "unix//run/a b", "a\xff:80", "unix//\xff", "a\x00:80", "[fe80::1%\xff]:80", "UNIX/x", "tcp/a:80", "udp/a:80", "a:80-82", "[a:b]:80", "::1:80", ":80", "a:", "/a:80", "{env.A}:80",
	} {
		f.Add(address)
	}
	f.Fuzz(func(t *testing.T, address string) {
		parsed, err := parseTarget(address)
		if err != nil {
			return
		}
		canonical := parsed.String()
		requireScrapable(t, "web", canonical)
		again, err := parseTarget(canonical)
		require.NoError(t, err, "%q, which is the canonical form of %q", canonical, address)
		require.Equal(t, canonical, again.String())
		require.Equal(t, parsed.unix, again.unix)
		require.Equal(t, parsed.port, again.port)
		require.Equal(t, parsed.literal, again.literal)
		require.Equal(t, parsed.unix == "", parsed.host != "" && parsed.port != 0)
		if parsed.unix == "" {
			require.True(t, strings.HasSuffix(canonical, ":"+strconv.Itoa(int(parsed.port))))
			other, err := parseTarget(parsed.withPort(1).String())
			require.NoError(t, err)
			require.EqualValues(t, 1, other.port)
		}
	})
}

// FuzzVerdict compares the verdict with the rule as its documentation says it:
// the first result decides, then as many in a row as are needed against it.
func FuzzVerdict(f *testing.F) {
	f.Add([]byte{0, 1, 1, 0, 0, 0}, uint8(2), uint8(3))
	f.Add([]byte{1, 0, 0, 1, 1}, uint8(1), uint8(1))
	f.Add([]byte{1, 0, 0, 1, 0, 0, 0}, uint8(3), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, passes, fails uint8) {
		needPasses, needFails := 1+int(passes)%10, 1+int(fails)%10
		results := make([]bool, len(data))
		for i, b := range data {
			results[i] = b%2 == 1
		}
		want := modelVerdicts(results, needPasses, needFails)
		var v verdict
		for i, passed := range results {
			v = v.next(passed, needPasses, needFails)
			require.Equal(t, want[i], !v.down, "after %v, %d passes, %d fails", results[:i+1], needPasses, needFails)
			require.True(t, v.settled)
			if passed == want[i] {
				require.Zero(t, v.run, "a result for the verdict, or the one that made it, ends the run")
			} else {
				require.Positive(t, v.run)
			}
		}
	})
}

// modelVerdicts returns whether the backend is up after each result.
func modelVerdicts(results []bool, passes, fails int) []bool {
	var verdicts []bool
	up, since := false, 0 // since: the first result that this verdict stands against
	for i, result := range results {
		needed := passes
		if up {
			needed = fails
		}
		lately := results[max(0, i+1-needed) : i+1]
		switch {
		case i == 0:
			up, since = result, 1
		case i+1-since >= needed && !slices.Contains(lately, up):
			up, since = !up, i+1
		}
		verdicts = append(verdicts, up)
	}
	return verdicts
}
