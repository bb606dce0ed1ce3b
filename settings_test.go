package tcplb

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
)

// validate provisions the config, in JSON, as `caddy validate` does.
func validate(t testing.TB, config string) error {
	t.Helper()
	var c caddy.Config
	require.NoError(t, caddy.StrictUnmarshalJSON([]byte(config), &c))
	return caddy.Validate(&c)
}

// lbAt is a layer4 server with one tcp_lb handler, for layer4Config.
func lbAt(server, listen, handler string) string {
	return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[%s]}]}`, server, listen, withHandler(handler))
}

func duration64(d time.Duration) *caddy.Duration { return new(caddy.Duration(d)) }

func TestDefaults(t *testing.T) {
	h := handlerOf(t, `{"backends":[{"address":"a:80"},{"address":"b:80","weight":7}]}`)
	require.NoError(t, h.fill())
	require.NoError(t, h.check())
	require.Equal(t, &Handler{
		Name:     "tcp_lb",
		Backends: []BackendConfig{{Address: "a:80", Weight: new(1)}, {Address: "b:80", Weight: new(7)}},
		LoadBalancing: &LoadBalancing{
			SelectionPolicyRaw: []byte(`{"policy":"round_robin"}`),
			Retries:            new(3),
			TryDuration:        0,
			TryInterval:        caddy.Duration(250 * time.Millisecond),
		},
		HealthChecks: &HealthChecks{Active: &ActiveHealthChecks{
			Interval:     caddy.Duration(10 * time.Second),
			FastInterval: caddy.Duration(time.Second),
			Timeout:      caddy.Duration(2 * time.Second),
			Passes:       2,
			Fails:        2,
		}, Passive: &PassiveHealthChecks{}},
		DialTimeout:  caddy.Duration(3 * time.Second),
		IdleTimeout:  duration64(time.Hour),
		DrainTimeout: duration64(30 * time.Second),
	}, h)
}

func TestFillLeavesWhatIsSet(t *testing.T) {
	const all = `{"name":"web","backends":[{"address":"a:80","weight":256}],
		"load_balancing":{"selection_policy":{"policy":"other"},"retries":1,"try_duration":"1s","try_interval":"2s","slow_start":"3s"},
		"health_checks":{"active":{"disabled":true,"interval":"3s","fast_interval":"2s","timeout":"4s","passes":5,"fails":6,"port":7},"passive":{"fail_duration":"5s","max_fails":2}},"close_if_unhealthy":"1s",
		"max_connections":8,"dial_timeout":"9s","idle_timeout":"10s","drain_timeout":"11s","access_log":true}`
	h := handlerOf(t, all)
	require.NoError(t, h.fill())
	require.Equal(t, handlerOf(t, all), h)
}

func TestDefaultFastIntervalKeepsWithinTheInterval(t *testing.T) {
	for _, c := range []struct {
		interval string
		want     time.Duration
	}{
		{"500ms", 500 * time.Millisecond},
		{"1s", time.Second},
		{"1m", time.Second},
	} {
		h := handlerOf(t, `{`+backendsJSON("a:80")+`,"health_checks":{"active":{"interval":"`+c.interval+`"}}}`)
		require.NoError(t, h.fill())
		require.NoError(t, h.check())
		require.Equal(t, c.want, time.Duration(h.HealthChecks.Active.FastInterval), "interval %s", c.interval)
	}
}

// noPoolsYet waits for the last connections of earlier tests, which hold pools.
func noPoolsYet(t testing.TB) {
	t.Helper()
	eventually(t, func() bool { return len(registry.snapshot()) == 0 }, "the end of the last test's pools")
	forgetDeparted()
}

// forgetDeparted ends the series of earlier tests.
func forgetDeparted() {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	registry.departed.prune(time.Now().Add(maxDuration))
}

// loaded runs a config of the one handler and returns what serves it.
func loaded(t *testing.T, handler string) *generation {
	t.Helper()
	noPoolsYet(t)
	runCaddy(t, lbConfig(freeAddress(t), handler))
	views := registry.snapshot()
	require.Len(t, views, 1)
	g := registry.newest(views[0].name)
	require.NotNil(t, g)
	return g
}

const checksDisabled = `"health_checks":{"active":{"disabled":true}}`

func TestZeroIsNotAbsent(t *testing.T) {
	t.Run("absent", func(t *testing.T) {
		g := loaded(t, `{`+checksDisabled+`,`+backendsJSON("127.0.0.1:1")+`}`)
		require.Equal(t, "tcp_lb", g.name)
		require.Equal(t, 3, g.retries)
		require.Equal(t, time.Hour, g.idleTimeout)
		require.Equal(t, 30*time.Second, g.drainTimeout)
		require.Zero(t, g.limit)
	})
	t.Run("zero", func(t *testing.T) {
		g := loaded(t, `{`+checksDisabled+`,`+backendsJSON("127.0.0.1:1")+`,
			"load_balancing":{"retries":0},"idle_timeout":0,"drain_timeout":"0s","max_connections":0}`)
		require.Zero(t, g.retries)
		require.Zero(t, g.idleTimeout)
		require.Zero(t, g.drainTimeout)
		require.Zero(t, g.limit)
	})
}

// TestSettingsReachTheGeneration has a value of its own for each setting.
func TestSettingsReachTheGeneration(t *testing.T) {
	g := loaded(t, `{"name":"web","backends":[{"address":"127.0.0.1:1","weight":3},{"address":"127.0.0.1:2"},{"address":"127.0.0.1:3","weight":0}],
		"load_balancing":{"selection_policy":{"policy":"round_robin"},"retries":1,"try_duration":"1s","try_interval":"2s","slow_start":"13s"},
		"health_checks":{"active":{"disabled":true,"interval":"4s","fast_interval":"3s","timeout":"5s","passes":6,"fails":7,"port":8}},
		"max_connections":9,"dial_timeout":"10s","idle_timeout":"11s","drain_timeout":"12s","access_log":true}`)
	require.Equal(t, "web", g.name)
	require.Equal(t, 1, g.retries)
	require.Equal(t, time.Second, g.tryDuration)
	require.Equal(t, 2*time.Second, g.tryInterval)
	require.Equal(t, 13*time.Second, g.slowStart)
	require.Equal(t, checkSettings{
		enabled: false, interval: 4 * time.Second, fastInterval: 3 * time.Second, timeout: 5 * time.Second,
		passes: 6, fails: 7, port: 8,
		asks: "{}",
	}, g.checks)
	require.EqualValues(t, 9, g.limit)
	require.Equal(t, 10*time.Second, g.dialTimeout)
	require.Equal(t, 11*time.Second, g.idleTimeout)
	require.Equal(t, 12*time.Second, g.drainTimeout)
	require.True(t, g.accessLog)
	require.Len(t, g.members(), 3)
	require.Equal(t, "127.0.0.1:1", g.members()[0].Backend.Address())
	require.Equal(t, []int{3, 1, 0}, []int{g.members()[0].weight, g.members()[1].weight, g.members()[2].weight})
}

func TestJSONRefuses(t *testing.T) {
	noPoolsYet(t)
	const backends = `"backends":[{"address":"a:80"}]`
	active := func(options string) string { return backends + `,"health_checks":{"active":{` + options + `}}` }
	balancing := func(options string) string { return backends + `,"load_balancing":{` + options + `}` }
	for _, c := range []struct {
		name, options string
		want          []string
	}{
		{"no backends", `"name":"web"`, []string{"no backends"}},
		{"empty backends", `"backends":[]`, []string{"no backends"}},
		{"backend without an address", `"backends":[{}]`, []string{`backend ""`}},
		{"duplicate", `"backends":[{"address":"a:80"},{"address":"b:80"},{"address":"a:80"}]`, []string{`backend "a:80"`, "twice"}},
		{"duplicate IPv6 in another form", `"backends":[{"address":"[::1]:80"},{"address":"[0:0::1]:80"}]`, []string{`backend "[0:0::1]:80"`, "twice"}},
		{"weight 257", `"backends":[{"address":"a:80"},{"address":"b:80","weight":257}]`, []string{`backend "b:80"`, "weight 257"}},
		{"weight -1", `"backends":[{"address":"a:80","weight":-1}]`, []string{`backend "a:80"`, "weight -1"}},
		{"port range", `"backends":[{"address":"a:80-82"}]`, []string{`backend "a:80-82"`, "port range"}},
		{"port 0", `"backends":[{"address":"a:0"}]`, []string{`backend "a:0"`, `port "0"`}},
		{"port 65536", `"backends":[{"address":"a:65536"}]`, []string{`backend "a:65536"`, `port "65536"`}},
		{"missing port", `"backends":[{"address":"a"}]`, []string{`backend "a"`, "port is missing"}},
		{"missing host", `"backends":[{"address":":80"}]`, []string{`backend ":80"`, "host is missing"}},
		{"UDP", `"backends":[{"address":"udp/a:80"}]`, []string{`backend "udp/a:80"`, `network "udp"`}},
		{"address that is not UTF-8", "\"backends\":[{\"address\":\"a\xff:80\"}]", []string{`backend "a`, "UTF-8"}},
		{"address with a control character", `"backends":[{"address":"a\u0000:80"}]`, []string{`backend "a\x00:80"`, "printable"}},
		{"address with a space that has no width", `"backends":[{"address":"a\u200b:80"}]`, []string{`backend "a\u200b:80"`, "printable"}},
		{"address with a space before", `"backends":[{"address":" a:80"}]`, []string{`backend " a:80"`, `invalid host " a"`}},
		{"Unix path with a control character", `"backends":[{"address":"unix//run/a\tb"}]`, []string{`backend "unix//run/a\tb"`, "printable"}},
		{"Unix path that is not UTF-8", "\"backends\":[{\"address\":\"unix//run/\xff\"}]", []string{`backend "unix//run/`, "UTF-8"}},
		{"name with a control character", `"name":"a\nb",` + backends, []string{"name", `"a\nb"`}},

		{"retries -1", balancing(`"retries":-1`), []string{"load_balancing.retries -1"}},
		{"retries 1001", balancing(`"retries":1001`), []string{"load_balancing.retries 1001"}},
		{"try_duration", balancing(`"try_duration":"-1s"`), []string{"load_balancing.try_duration -1s"}},
		{"try_interval", balancing(`"try_interval":"-1s"`), []string{"load_balancing.try_interval -1s"}},
		{"short try_interval", balancing(`"try_interval":5`), []string{"load_balancing.try_interval 5ns"}},
		{"slow_start", balancing(`"slow_start":"-1s"`), []string{"load_balancing.slow_start -1s"}},
		{"short slow_start", balancing(`"slow_start":30`), []string{"load_balancing.slow_start 30ns"}},
		{"unknown policy", balancing(`"selection_policy":{"policy":"fastest"}`), []string{"selection policy", "fastest"}},
		{"policy without a name", balancing(`"selection_policy":{}`), []string{"selection policy"}},
		{"policy null", balancing(`"selection_policy":null`), []string{"selection policy"}},

		{"interval", active(`"interval":"-1s"`), []string{"health_checks.active.interval -1s"}},
		{"short interval", active(`"interval":5`), []string{"health_checks.active.interval 5ns"}},
		{"fast_interval", active(`"fast_interval":"-1s"`), []string{"health_checks.active.fast_interval -1s"}},
		{"fast_interval over interval", active(`"interval":"2s","fast_interval":"3s"`), []string{"health_checks.active.fast_interval 3s", "2s"}},
		{"fast_interval over the default", active(`"fast_interval":"11s"`), []string{"health_checks.active.fast_interval 11s", "10s"}},
		{"timeout", active(`"timeout":"-1s"`), []string{"health_checks.active.timeout -1s"}},
		{"passes", active(`"passes":-1`), []string{"health_checks.active.passes -1"}},
		{"passes 1001", active(`"passes":1001`), []string{"health_checks.active.passes 1001"}},
		{"fails", active(`"fails":-1`), []string{"health_checks.active.fails -1"}},
		{"fails 1001", active(`"fails":1001`), []string{"health_checks.active.fails 1001"}},
		{"port -1", active(`"port":-1`), []string{"health_checks.active.port -1"}},
		{"port 70000", active(`"port":70000`), []string{"health_checks.active.port 70000"}},

		{"max_connections", backends + `,"max_connections":-1`, []string{"max_connections -1"}},
		{"dial_timeout", backends + `,"dial_timeout":"-1s"`, []string{"dial_timeout -1s"}},
		{"short dial_timeout", backends + `,"dial_timeout":5`, []string{"dial_timeout 5ns"}},
		{"idle_timeout in nanoseconds", backends + `,"idle_timeout":3600`, []string{"idle_timeout 3.6µs: want 0 or a duration of at least 1ms", `write "3600s" (a number without a unit counts nanoseconds)`}},
		{"drain_timeout in nanoseconds", backends + `,"drain_timeout":30`, []string{"drain_timeout 30ns", `write "30s"`}},
		{"dial_timeout in nanoseconds", backends + `,"dial_timeout":3`, []string{"dial_timeout 3ns: want a duration of at least 1ms", `write "3s"`}},
		{"try_duration in nanoseconds", balancing(`"try_duration":5`), []string{"load_balancing.try_duration 5ns", `write "5s"`}},
		{"interval in nanoseconds", active(`"interval":10`), []string{"health_checks.active.interval 10ns", `write "10s"`}},
		{"idle_timeout", backends + `,"idle_timeout":"-1s"`, []string{"idle_timeout -1s"}},
		{"drain_timeout", backends + `,"drain_timeout":"-1s"`, []string{"drain_timeout -1s"}},
		{"all that is wrong at once", `"backends":[{"address":"a"}],"max_connections":-1,"dial_timeout":"-1s"`,
			[]string{`backend "a"`, "max_connections -1", "dial_timeout -1s"}},

		{"unknown field", backends + `,"idle_timout":"1s"`, []string{"unknown field", "idle_timout"}},
		{"unknown field of a backend", `"backends":[{"address":"a:80","wieght":2}]`, []string{"unknown field", "wieght"}},
		{"unknown field of load_balancing", balancing(`"retry":2`), []string{"unknown field", "retry"}},
		{"unknown field of the checks", active(`"path":"/"`), []string{"unknown field", "path"}},
		{"unknown field of health_checks", backends + `,"health_checks":{"reactive":{}}`, []string{"unknown field", "reactive"}},
		{"unknown field of the policy", balancing(`"selection_policy":{"policy":"round_robin","choose":2}`), []string{"unknown field", "choose"}},
		{"number for a text", `"name":5,` + backends, []string{"name"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := validate(t, lbConfig("127.0.0.1:0", `{`+c.options+`}`))
			require.Error(t, err)
			for _, w := range c.want {
				require.ErrorContains(t, err, w)
			}
			require.NotContains(t, err.Error(), "\n")
			require.Empty(t, registry.snapshot())
		})
	}
}

func TestHandlersOfOneNameShareOnePool(t *testing.T) {
	noPoolsYet(t)
	a, b := namedServer(t, "a"), namedServer(t, "b")
	handler := `{"name":"shared",` + checksDisabled + `,` + backendsJSON(a.address, b.address) + `}`
	first, second := freeAddress(t), freeAddress(t)
	runCaddy(t, layer4Config(lbAt("one", first, handler)+`,`+lbAt("two", second, handler)))

	require.Len(t, registry.snapshot(), 1)
	registry.mu.Lock()
	generations := len(registry.pools["shared"].generations)
	registry.mu.Unlock()
	require.Equal(t, 1, generations)
	for range 4 {
		got := ""
		for _, listener := range []string{first, second} {
			answer, err := ask(listener)
			require.NoError(t, err)
			got += answer
		}
		require.Equal(t, "ab", got, "one rotation over both listeners")
	}
}

func TestPlaceholders(t *testing.T) {
	for _, c := range []struct {
		name, address, value string
		refused              []string
	}{
		{"a whole address", "{env.TCPLB_TEST_BACKEND}", "127.0.0.1:3001", nil},
		{"a host", "{env.TCPLB_TEST_BACKEND}:3001", "127.0.0.1", nil},
		{"a port", "127.0.0.1:{env.TCPLB_TEST_BACKEND}", "3001", nil},
		{"unset", "{env.TCPLB_TEST_BACKEND}", "", []string{`backend "{env.TCPLB_TEST_BACKEND}"`, "empty"}},
		{"unknown", "{nobody.knows}:80", "", []string{`backend "{nobody.knows}:80"`, "unrecognized placeholder {nobody.knows}"}},
		{"not closed", "{env.TCPLB_TEST_BACKEND", "127.0.0.1:3001", []string{`backend "{env.TCPLB_TEST_BACKEND"`, "placeholder"}},
		{"to another placeholder", "{env.TCPLB_TEST_BACKEND}", "{env.HOME}:80", []string{`backend "{env.HOME}:80"`, "placeholder"}},
		{"to a bad address", "{env.TCPLB_TEST_BACKEND}", "127.0.0.1", []string{`backend "127.0.0.1"`, "port is missing"}},
		{"to a port range", "127.0.0.1:{env.TCPLB_TEST_BACKEND}", "1-2", []string{`backend "127.0.0.1:1-2"`, "port range"}},
		{"to bytes that are not UTF-8", "{env.TCPLB_TEST_BACKEND}:80", "a\xff", []string{`backend "a\xff:80"`, "UTF-8"}},
		{"to a control character", "{env.TCPLB_TEST_BACKEND}", "a\a:80", []string{`backend "a\a:80"`, "printable"}},
		{"to a line end", "{env.TCPLB_TEST_BACKEND}", "a:80\n", []string{`backend "a:80\n"`, "printable"}},
		{"to one that is there", "{env.TCPLB_TEST_BACKEND}", "other:80", []string{`backend "other:80"`, "twice"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("TCPLB_TEST_BACKEND", c.value)
			handler := `{"name":"web",` + checksDisabled + `,` + backendsJSON("other:80", c.address) + `}`
			if c.refused == nil {
				g := loaded(t, handler)
				require.Equal(t, "127.0.0.1:3001", g.members()[1].Backend.Address())
				return
			}
			err := validate(t, lbConfig("127.0.0.1:0", handler))
			require.ErrorContains(t, err, `tcp_lb "web"`)
			for _, w := range c.refused {
				require.ErrorContains(t, err, w)
			}
		})
	}
}

// provisionHook is a handler that calls atProvision when it is provisioned,
// which is after the handlers that come before it in its route.
type provisionHook struct{}

var atProvision func()

func init() { caddy.RegisterModule(provisionHook{}) }

func (provisionHook) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.tcplb_test_provision_hook",
		New: func() caddy.Module { return new(provisionHook) },
	}
}

func (provisionHook) Provision(caddy.Context) error {
	atProvision()
	return nil
}

func (provisionHook) Handle(*layer4.Connection, layer4.Handler) error { return nil }

func TestValidateConnectsNowhere(t *testing.T) {
	noPoolsYet(t)
	s := startServer(t, func(*net.TCPConn) {})
	handler := `{"health_checks":{"active":{"interval":"10ms","fast_interval":"1ms"}},` + backendsJSON(s.address) + `}`
	listen := freeAddress(t)
	provisioned := 0
	atProvision = func() {
		provisioned++
		require.Empty(t, registry.snapshot(), "a pool, and so a checker, while the config is only provisioned")
	}
	for range 3 {
		require.NoError(t, validate(t, layer4Config(fmt.Sprintf(
			`"srv":{"listen":[%q],"routes":[{"handle":[%s,{"handler":"tcplb_test_provision_hook"}]}]}`, listen, withHandler(handler)))))
		require.Empty(t, registry.snapshot())
	}
	require.Equal(t, 3, provisioned)
	// A connection of the test's own, after which any earlier one is counted, too.
	_, err := ask(s.address)
	require.NoError(t, err)
	require.Equal(t, 1, s.acceptedCount())
	_, err = net.DialTimeout("tcp", listen, hangTimeout)
	require.Error(t, err, "nor does it listen")

	// The same config does connect once it runs.
	runCaddy(t, lbConfig(listen, handler))
	eventually(t, func() bool { return s.acceptedCount() > 1 }, "a health check")
}

func TestRefusedLoadLeavesNothing(t *testing.T) {
	noPoolsYet(t)
	require.Error(t, caddy.Load([]byte(lbConfig(freeAddress(t), `{`+backendsJSON("a:80")+`,"max_connections":-1}`)), true))
	require.Empty(t, registry.snapshot())
	// One good handler, provisioned before or after the bad one, isn't started either.
	require.Error(t, caddy.Load([]byte(layer4Config(
		lbAt("good", freeAddress(t), `{"name":"good",`+backendsJSON("127.0.0.1:1")+`}`)+`,`+
			lbAt("bad", freeAddress(t), `{"name":"bad"}`))), true))
	require.Empty(t, registry.snapshot())
}

func TestFingerprintIgnoresSpelling(t *testing.T) {
	fingerprint := func(addresses ...string) string {
		h := &Handler{Backends: backendList(addresses...)}
		require.NoError(t, h.fill())
		f, err := h.fingerprint()
		require.NoError(t, err)
		return f
	}
	require.Equal(t, fingerprint("[::1]:80", "HOST:80"), fingerprint("[0:0::1]:80", "host:80"))
	require.NotEqual(t, fingerprint("a:80", "b:80"), fingerprint("b:80", "a:80"))
}
