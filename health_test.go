package tcplb

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// healthConfig has two pools, the first in an HTTP server's listener, and in
// another HTTP server a health endpoint for all of them, for each, and for what
// else is given.
func healthConfig(t testing.TB, web, lb, first, second, more string) string {
	return fmt.Sprintf(`{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"PANIC"}}},
		"apps":{"layer4":{"servers":{"srv":{"listen":[%q],"routes":[{"handle":[%s]}]}}},
		"http":{"servers":{"wrapped":{"listen":[%q],"protocols":["h1"],"automatic_https":{"disable":true},
			"listener_wrappers":[{"wrapper":"layer4","routes":[{"match":[{"regexp":{"pattern":"^SSH-","count":4}}],"handle":[%s]}]}]},
			"web":{"listen":[%q],"protocols":["h1"],"automatic_https":{"disable":true},
			"routes":[{"match":[{"path":["/first"]}],"handle":[{"handler":"tcp_lb_health","pools":["first"]}]},
				{"match":[{"path":["/second"]}],"handle":[{"handler":"tcp_lb_health","pools":["second"]}]},
				{"match":[{"path":["/both"]}],"handle":[{"handler":"tcp_lb_health","pools":["second","first"]}]},%s
				{"handle":[{"handler":"tcp_lb_health"}]}]}}}}}`, lb, withHandler(second), freeAddress(t), withHandler(first), web, more)
}

func TestHealthOfNamedPools(t *testing.T) {
	a, b := namedServer(t, "a"), namedServer(t, "b")
	web := freeAddress(t)
	runCaddy(t, healthConfig(t, web, freeAddress(t),
		`"name":"first",`+fastChecks+","+backendsJSON(a.address)+"}", `"name":"second",`+fastChecks+","+backendsJSON(b.address)+"}", ""))
	is := func(path string, wantStatus int, wantPools ...string) {
		t.Helper()
		var body string
		eventually(t, func() bool {
			var status int
			status, body = request(t, http.MethodGet, "http://"+web+path, "")
			return status == wantStatus
		}, "%s is %d", path, wantStatus)
		var got healthStatus
		require.NoError(t, json.Unmarshal([]byte(body), &got))
		var names []string
		for _, p := range got.Pools {
			names = append(names, p.Name)
		}
		require.Equal(t, wantPools, names, path)
	}
	is("/", 200, "first", "second")
	b.kill()
	is("/", 503, "first", "second")
	is("/both", 503, "second", "first")
	is("/second", 503, "second")
	is("/first", 200, "first")
	b.start()
	is("/second", 200, "second")
	is("/", 200, "first", "second")
}

func TestHealthOfUnknownPool(t *testing.T) {
	noPoolsYet(t)
	pool := func(name string) string {
		return `"name":"` + name + `",` + checksDisabled + "," + backendsJSON("127.0.0.1:1") + "}"
	}
	for name, c := range map[string]struct{ more, want string }{
		"misspelled": {`{"handle":[{"handler":"tcp_lb_health","pools":["frist"]}]},`, `tcp_lb_health: unknown pool "frist": did you mean first? (there are first, second)`},
		"twice":      {`{"handle":[{"handler":"tcp_lb_health","pools":["first","first"]}]},`, `pool "first" is listed twice`},
		"unset":      {`{"handle":[{"handler":"tcp_lb_health","pools":["{env.TCPLB_TEST_UNSET}"]}]},`, `tcp_lb_health: pool "{env.TCPLB_TEST_UNSET}"`},
	} {
		t.Run(name, func(t *testing.T) {
			err := loadOnce(healthConfig(t, freeAddress(t), freeAddress(t), pool("first"), pool("second"), c.more))
			require.ErrorContains(t, err, c.want)
			require.Empty(t, registry.snapshot())
		})
	}
	t.Run("no pool at all", func(t *testing.T) {
		config := `{"admin":{"disabled":true,"config":{"persist":false}},"apps":{"http":{"servers":{"web":{"listen":[%q],"protocols":["h1"],
			"automatic_https":{"disable":true},"routes":[{"handle":[{"handler":"tcp_lb_health"%s}]}]}}}}}`
		web := freeAddress(t)
		require.ErrorContains(t, loadOnce(fmt.Sprintf(config, web, `,"pools":["web"]`)), `unknown pool "web" (there is none)`)
		runCaddy(t, fmt.Sprintf(config, web, ""))
		status, body := request(t, http.MethodGet, "http://"+web+"/", "")
		require.Equal(t, 200, status)
		require.Equal(t, `{"status":"ok","pools":[]}`, strings.TrimSpace(body))
	})
	t.Run("placeholder", func(t *testing.T) {
		t.Setenv("TCPLB_TEST_POOL", "first")
		web := freeAddress(t)
		runCaddy(t, healthConfig(t, web, freeAddress(t), pool("first"), pool("second"),
			`{"match":[{"path":["/named"]}],"handle":[{"handler":"tcp_lb_health","pools":["{env.TCPLB_TEST_POOL}"]}]},`))
		status, body := request(t, http.MethodGet, "http://"+web+"/named", "")
		require.Equal(t, 200, status)
		require.Contains(t, body, `"name":"first"`)
	})
}

// A pool is not available before its config has started and a check has found a
// backend; a reload takes over what is known.
func TestHealthNeedsAVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.latency = time.Second
		available := func(n, of int, g *generation, why string) {
			t.Helper()
			require.Equal(t, poolStatus{Name: g.name, Available: n, Total: of}, g.health(), why)
		}
		first, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two) })
		available(0, 2, first, "not started")
		f.fail(two, errRefused)
		first.begin()
		available(0, 2, first, "not checked")
		time.Sleep(1100 * time.Millisecond)
		available(1, 2, first, "checked")

		// The pool goes on with other backends that no check has seen.
		second, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(three) })
		available(1, 2, second, "not started, the one before serves")
		f.fail(three, errRefused)
		second.begin()
		available(1, 1, second, "the pool's standing holds")
		available(1, 2, first, "still running")
		first.stop()
		available(1, 1, first, "the newest serves")
		time.Sleep(1100 * time.Millisecond)
		available(0, 1, second, "its own verdict")

		// After one that had none, there is nothing to hold.
		third, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		third.begin()
		second.stop()
		available(0, 1, third, "not checked")
		time.Sleep(1100 * time.Millisecond)
		available(1, 1, third, "checked")

		// Checks are off: nothing else will tell.
		fourth, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(two)
			h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Disabled: true}}
		})
		fourth.begin()
		third.stop()
		available(1, 1, fourth, "checks are off")
		fourth.stop()
		available(0, 1, fourth, "no config has it")
	})
}

// While the process exits, whoever is in front is to send nothing more, also
// where the HTTP server still answers for some time.
func TestHealthOnExit(t *testing.T) {
	s := echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := strings.Replace(adminConfig(admin, web, lb, `"name":"web","drain_timeout":"0s",`+backendsJSON(s.address)+"}"),
		`"http":{`, `"http":{"shutdown_delay":"2s",`, 1)
	c := startChild(t, config)
	healthy := func() int {
		resp, err := send(http.MethodGet, "http://"+web+"/health", "")
		if err != nil {
			return 0
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	eventually(t, func() bool { return listens(web) && healthy() == 200 }, "checked")
	c.signal(t, terminate)
	seen := 200
	eventually(t, func() bool { seen = healthy(); return seen != 200 }, "an end")
	require.Equal(t, 503, seen)
	require.Zero(t, c.wait(t))
}
