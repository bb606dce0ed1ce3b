package tcplb

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

func TestCaddyfileSaysWhatIsMeantOfApproaches(t *testing.T) {
	for _, c := range []struct {
		lines []string
		at    int
		want  string
	}{
		{[]string{"proxy_protocol v3"}, 1, "proxy_protocol v3: want v1, v2 or off"},
		{[]string{"proxy_protocol"}, 1, "proxy_protocol: the value is missing, want v1, v2 or off"},
		{[]string{"proxy_protocol 2"}, 1, "proxy_protocol 2: want v1, v2 or off"},
		{[]string{"send-proxy-v2"}, 1, "write proxy_protocol v1 or v2"},
		{[]string{"backend a:1 {", "\tproxy_protocol on", "}"}, 2, "backend a:1: proxy_protocol on: want v1, v2 or off"},
		{[]string{"backend a:1 {", "\tsend-proxy", "}"}, 2, "write proxy_protocol v1 or v2"},
		{[]string{"backend a:1 send-proxy"}, 1, "write proxy_protocol v1 or v2"},
		{[]string{"local_address 10.0.0.9:80"}, 1, "local_address 10.0.0.9:80: want an IP address without a port"},
		{[]string{"local_address 10.0.0.9 10.0.0.8"}, 1, `local_address 10.0.0.9: one value is enough, found "10.0.0.8"`},
		{[]string{"proxy_bind 10.0.0.9"}, 1, "did you mean local_address?"},
		{[]string{"local_address 10.0.0.9", "backend unix//run/a.sock"}, 1, `backend "unix//run/a.sock": local_address 10.0.0.9: a Unix socket is not connected to from an IP address: leave that out, or have local_address off for it`},
		{[]string{"local_address 10.0.0.9", "backend [::1]:80"}, 1, `backend "[::1]:80": local_address 10.0.0.9 is an IPv4 address, and this an IPv6 one: leave that out, or have local_address off for it`},
		{[]string{"backend 10.0.0.1:80 {", "\tlocal_address fd00::9", "}"}, 2, `backend 10.0.0.1:80: local_address fd00::9 is an IPv6 address, and this an IPv4 one`},
		{[]string{"proxy_protocol v2", "backend unix//run/a.sock"}, 1, `backend "unix//run/a.sock": proxy_protocol v2: a Unix socket gets no PROXY header: leave that out, or have proxy_protocol off for it`},
		{[]string{"backend unix//run/a.sock {", "\tweight 2", "\tproxy_protocol v1", "}"}, 3, `backend unix//run/a.sock: proxy_protocol v1: a Unix socket gets no PROXY header`},
	} {
		t.Run(c.want, func(t *testing.T) {
			requireRefused(t, lbCaddyfile("good:80", c.lines...), handlerLine+c.at, c.want)
		})
	}
	_, err := adapt(t, lbCaddyfile("good:80", "proxy_protocol v2", "local_address 10.0.0.9",
		"backend unix//run/a.sock {", "\tproxy_protocol off", "\tlocal_address off", "}", "backend [::1]:80 {", "\tlocal_address ::1", "}"))
	require.NoError(t, err)
}

func TestJSONSaysWhatIsMeantOfApproaches(t *testing.T) {
	noPoolsYet(t)
	for options, want := range map[string]string{
		`"backends":[{"address":"a:80"}],"proxy_protocol":"v3"`:                                                 `tcp_lb "tcp_lb": proxy_protocol v3: want v1, v2 or off`,
		`"backends":[{"address":"a:80"}],"proxy_protocol":2`:                                                    `proxy_protocol 2: want a text in quotes`,
		`"backends":[{"address":"a:80"}],"local_address":"eth0"`:                                                `local_address eth0: want an IP address of this machine`,
		`"backends":[{"address":"a:80"}],"local_address":"{env.TCPLB_NONE}"`:                                    `local_address "{env.TCPLB_NONE}": evaluated placeholder {env.TCPLB_NONE} is empty`,
		`"backends":[{"address":"a:80"}],"health_checks":{"active":{"tls":{"server_name":"{env.TCPLB_NONE}"}}}`: `health_checks.active.tls.server_name: evaluated placeholder {env.TCPLB_NONE} is empty`,
		`"backends":[{"address":"a:80"}],"health_checks":{"active":{"tls":{"server_name":"{db.internal"}}}`:     `health_checks.active.tls.server_name: "{db.internal": a brace is left over`,
		`"backends":[{"address":"a:80"}],"tls":{"server_name":"db}.internal"}`:                                  `tls.server_name: "db}.internal": a brace is left over`,
		`"backends":[{"address":"[::1]:80"}],"local_address":"10.0.0.9"`:                                        `backend "[::1]:80": local_address 10.0.0.9 is an IPv4 address`,
		`"backends":[{"address":"a:80"}],"source_address":"10.0.0.9"`:                                           `unknown field "source_address": did you mean local_address?`,
		`"backends":[{"address":"a:80"}],"send_proxy":"v2"`:                                                     `unknown field "send_proxy": did you mean proxy_protocol?`,
		`"backends":[{"address":"a:80","proxy_protocol":"on"}]`:                                                 `backend "a:80": proxy_protocol on: want v1, v2 or off`,
		`"backends":[{"address":"a:80","proxy_protocol":true}]`:                                                 `backends[0].proxy_protocol true: want a text in quotes`,
		`"backends":[{"address":"unix/{env.HOME}/sock"}],"proxy_protocol":"v2"`:                                 `proxy_protocol v2: a Unix socket gets no PROXY header`,
		`"backends":[{"address":"unix//run/a","proxy_protocol":"v1"}]`:                                          `backend "unix//run/a": proxy_protocol v1: a Unix socket gets no PROXY header`,
		`"backends":[{"address":"a:80"}],"health_checks":{"proxy_protocol":"v2"}`:                               `health_checks: unknown field "proxy_protocol"`,
		`"backends":[{"address":"a:80"}],"upstream_proxy_protocol":"v2"`:                                        `unknown field "upstream_proxy_protocol" (there are `,
	} {
		t.Run(options, func(t *testing.T) {
			require.ErrorContains(t, validate(t, lbConfig("127.0.0.1:0", `{`+options+`}`)), want)
		})
	}
}

// What a source finds can't have what a config refuses.
func TestFoundBackendsThatOptionsCanNotBeOf(t *testing.T) {
	g, logs := testGeneration(t, newFakeNet(), func(h *Handler) {
		h.Backends = backendList(one)
		h.ProxyProtocol = "v2"
		checksOff(h)
	})
	s := newToldSource()
	has(g, s)
	g.start()
	(<-s.update)([]discovery.Found{{Address: two}, {Address: "unix//run/a"}})
	require.Equal(t, []string{one, two}, addressesOf(g))
	require.Equal(t, g.approach, g.members()[1].Backend.approach.Load())
	require.NotNil(t, g.approach)
	entries := logs.FilterMessage("a source found backends that can't be used").All()
	require.Len(t, entries, 1)
	require.Equal(t, `backend "unix//run/a": proxy_protocol v2: a Unix socket gets no PROXY header`, entries[0].ContextMap()["error"])
}
