package tcplb

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestGlobalOption(t *testing.T) {
	const layer4Block = "\n\tlayer4 {\n\t\ttcp_lb/127.0.0.1:15000 {\n\t\t\troute {\n\t\t\t\ttcp_lb 127.0.0.1:1\n\t\t\t}\n\t\t}\n\t}"
	for name, c := range map[string]struct {
		caddyfile string
		want      string // of the app's JSON
	}{
		"no option":            {"{\n\ttcp_lb\n}\n", `{}`},
		"an empty block":       {"{\n\ttcp_lb {\n\t}\n}\n", `{}`},
		"with no handler":      {"{\n\ttcp_lb {\n\t\thandshake_timeout 1500ms\n\t}\n}\n", `{"handshake_timeout":1500000000}`},
		"no limit":             {"{\n\ttcp_lb {\n\t\thandshake_timeout 0\n\t}\n}\n", `{"handshake_timeout":0}`},
		"with a handler":       {"{\n\ttcp_lb {\n\t\thandshake_timeout 2s\n\t}" + layer4Block + "\n}\n", `{"handshake_timeout":2000000000}`},
		"a delay":              {"{\n\ttcp_lb {\n\t\tshutdown_delay 10s\n\t}\n}\n", `{"shutdown_delay":10000000000}`},
		"a handler without it": {"{" + layer4Block + "\n}\n", ``},
	} {
		t.Run(name, func(t *testing.T) {
			config, err := adapt(t, c.caddyfile)
			require.NoError(t, err)
			var parsed struct{ Apps map[string]json.RawMessage }
			require.NoError(t, json.Unmarshal([]byte(config), &parsed))
			if c.want == "" {
				require.NotContains(t, parsed.Apps, "tcp_lb")
			} else {
				require.JSONEq(t, c.want, string(parsed.Apps["tcp_lb"]))
			}
			require.NoError(t, validate(t, config))
		})
	}
}

func TestGlobalOptionErrors(t *testing.T) {
	for block, want := range map[string][]string{
		"tcp_lb 5s":                                                         {"takes a block", `"5s"`, "Caddyfile:2"},
		"tcp_lb {\n\t\ttimeout 5s\n\t}":                                     {"unknown global option", `"timeout": did you mean handshake_timeout? (there are handshake_timeout, shutdown_delay)`, "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timout 5s\n\t}":                            {`"handshake_timout": did you mean handshake_timeout?`, "Caddyfile:3"},
		"tcp_lb {\n\t\tidle_timeout 5s\n\t}":                                {`unknown global option "idle_timeout": it belongs to the handler`, "Caddyfile:3"},
		"tcp_lb {\n\t\tbackend a:1\n\t}":                                    {`"backend": it belongs to the handler`, "Caddyfile:3"},
		"tcp_lb {\n\t\tmatching_timeout 5s\n\t}":                            {"it belongs to a server", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout never\n\t}":                        {"such as 10s; 0 means none", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout\n\t}":                              {"handshake_timeout", "missing", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout soon\n\t}":                         {"handshake_timeout soon", "such as 10s", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout -1s\n\t}":                          {"handshake_timeout -1s", "not negative", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout 9000h\n\t}":                        {"handshake_timeout 9000h", "at most", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout 9us\n\t}":                          {"handshake_timeout 9µs: want 0 or a duration of at least 1ms", "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout 1s 2s\n\t}":                        {"handshake_timeout 1s", `"2s"`, "Caddyfile:3"},
		"tcp_lb {\n\t\thandshake_timeout 1s {\n\t\t\tx\n\t\t}\n\t}":         {"handshake_timeout", "no block", "Caddyfile:4"},
		"tcp_lb {\n\t\thandshake_timeout 1s\n\t\thandshake_timeout 2s\n\t}": {"handshake_timeout is set twice", "Caddyfile:4"},
		"tcp_lb {\n\t\tshutdown_delay soon\n\t}":                            {"shutdown_delay soon", "such as 10s", "Caddyfile:3"},
		"tcp_lb {\n\t\tdelay 5s\n\t}":                                       {"did you mean shutdown_delay?", "Caddyfile:3"},
		"tcp_lb {\n\t}\n\ttcp_lb {\n\t}":                                    {"set twice", "Caddyfile:4"},
	} {
		t.Run(block, func(t *testing.T) {
			_, err := adapt(t, "{\n\t"+block+"\n}\n")
			for _, part := range want {
				require.ErrorContains(t, err, part)
			}
		})
	}
}

func TestHandshakeTimeoutInJSON(t *testing.T) {
	with := func(value string) string {
		return strings.Replace(lbConfig("tcp_lb/127.0.0.1:15000", toNowhere), `"apps":{`, `"apps":{"tcp_lb":{"handshake_timeout":`+value+`},`, 1)
	}
	for _, value := range []string{`0`, `"0s"`, `"1m"`, `null`} {
		require.NoError(t, validate(t, with(value)), value)
	}
	for value, want := range map[string]string{
		`-1`:      "not negative",
		`10`:      `handshake_timeout 10ns: want 0 or a duration of at least 1ms: write "10s"`,
		`"9000h"`: "at most",
		`"soon"`:  `handshake_timeout "soon": want a duration such as "10s"`,
		`"never"`: `handshake_timeout "never": want a duration such as "10s"; 0 means none`,
		`true`:    `handshake_timeout true: want a duration such as "10s"`,
	} {
		require.ErrorContains(t, validate(t, with(value)), want)
	}
	require.ErrorContains(t, validate(t, strings.Replace(with(`0`), "handshake_timeout", "handshake", 1)), `unknown field "handshake"`)
	require.Equal(t, 10*time.Second, defaultHandshakeTimeout)
}
