package tcplb

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestHandlersOfOneName(t *testing.T) {
	const web = `"name":"web","backends":[{"address":"a:80"},{"address":"b:80","weight":2}]`
	for _, c := range []struct {
		name, first, second string
		refused             string // the name in the error; empty = accepted
		differ              string // what the error names; the two may come in either order
	}{
		{"the same", web, web, "", ""},
		{"other names", web, `"name":"db","backends":[{"address":"a:80"}]`, "", ""},
		{"a default spelled out", web, web + `,"dial_timeout":"3s","idle_timeout":"1h","load_balancing":{"selection_policy": {"policy": "round_robin"},"retries":3}`, "", ""},
		{"one duration in two forms", web + `,"dial_timeout":"1500ms"`, web + `,"dial_timeout":1500000000`, "", ""},
		{"other backends", web, `"name":"web","backends":[{"address":"a:80"}]`, "web", "only one has the backend \"b:80\""},
		{"other weight", web, strings.Replace(web, `"weight":2`, `"weight":3`, 1), "web", "the weight of backend \"b:80\" is "},
		{"other retries", web, web + `,"load_balancing":{"retries":0}`, "web", "lb_retries is "},
		{"other idle timeout", web + `,"idle_timeout":"2h"`, web + `,"idle_timeout":0`, "web", "idle_timeout is "},
		{"other checks", web, web + `,"health_checks":{"active":{"disabled":true}}`, "web", "health_interval is "},
		{"other log", web, web + `,"access_log":true`, "web", "access_log is "},
		{"other interval", web + `,"health_checks":{"active":{"interval":"2m"}}`, web, "web", "health_interval is "},
		{"other limit", web + `,"max_connections":5`, web, "web", "max_connections is "},
		{"no name, the same", backendsJSON("a:80"), backendsJSON("a:80"), "", ""},
		{"no name, other backends", backendsJSON("a:80"), backendsJSON("b:80"), "tcp_lb", "backend number 1 is "},
		{"no name and the default name", backendsJSON("a:80"), `"name":"tcp_lb",` + backendsJSON("b:80"), "tcp_lb", "backend number 1 is "},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := validate(t, layer4Config(
				lbAt("one", "127.0.0.1:0", `{`+c.first+`}`)+`,`+lbAt("two", "127.0.0.1:0", `{`+c.second+`}`)))
			if c.refused == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, fmt.Sprintf("two tcp_lb handlers named %q have different settings", c.refused))
			require.ErrorContains(t, err, c.differ)
		})
	}
}

// Each setting in which two handlers may differ is named.
func TestFirstDifference(t *testing.T) {
	fingerprint := func(options ...string) string {
		config, err := adapt(t, lbCaddyfile("a:80", options...))
		require.NoError(t, err)
		var h Handler
		require.NoError(t, json.Unmarshal([]byte(firstHandler(t, config)), &h))
		require.NoError(t, h.fill())
		f, err := h.fingerprint()
		require.NoError(t, err)
		return f
	}
	plain := fingerprint("health_port 81")
	for line, want := range map[string]string{
		"lb_retries 0":            "lb_retries is 3 in one and 0 in the other",
		"lb_try_duration 90s":     "lb_try_duration is 0s in one and 1m30s in the other",
		"lb_try_interval 1s":      "lb_try_interval is 250ms in one and 1s in the other",
		"lb_slow_start 30s":       "lb_slow_start is 0s in one and 30s in the other",
		"health_interval 20s":     "health_interval is 10s in one and 20s in the other",
		"health_interval off":     "health_interval is 10s in one and off in the other",
		"health_fast_interval 2s": "health_fast_interval is 1s in one and 2s in the other",
		"health_timeout 10m":      "health_timeout is 2s in one and 10m in the other",
		"health_passes 3":         "health_passes is 2 in one and 3 in the other",
		"health_fails 3":          "health_fails is 2 in one and 3 in the other",
		"max_connections 5":       "max_connections is not set in one and 5 in the other",
		"dial_timeout 1s":         "dial_timeout is 3s in one and 1s in the other",
		"idle_timeout 90m":        "idle_timeout is 1h in one and 1h30m in the other",
		"idle_timeout 0":          "idle_timeout is 1h in one and 0s in the other",
		"drain_timeout 1s":        "drain_timeout is 30s in one and 1s in the other",
		"access_log":              "access_log is off in one and on in the other",
		"backend b:80":            `only one has the backend "b:80"`,

		"access_log {\n\t\t\t\t\t\tconnects\n\t\t\t\t\t}":     "access_log is off in one and on, connects in the other",
		"access_log {\n\t\t\t\t\t\tinterval 60s\n\t\t\t\t\t}": "access_log is off in one and on, interval 1m in the other",
		"max_lifetime 1h":              "max_lifetime is none in one and 1h 10% in the other",
		"max_lifetime 90m 0%":          "max_lifetime is none in one and 1h30m 0% in the other",
		"max_connections_per_client 5": "max_connections_per_client is not set in one and 5 in the other",
	} {
		require.Equal(t, want, firstDifference(plain, fingerprint("health_port 81", line)))
	}
	require.Equal(t, "health_port is 81 in one and the backend's own in the other", firstDifference(plain, fingerprint("access_log")))
	policy := func(p string) string { return strings.Replace(plain, `{"policy":"round_robin"}`, p, 1) }
	require.Equal(t, `lb_policy is {"policy":"round_robin"} in one and {"policy":"x","n":1} in the other`, firstDifference(plain, policy(`{"policy":"x","n":1}`)))
	require.Equal(t, "the weight of backend \"a:80\" is 1 in one and 2 in the other", firstDifference(plain, strings.Replace(plain, `"weight":1`, `"weight":2`, 1)))
}
