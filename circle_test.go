package tcplb

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBackendIsThePoolsOwnListener(t *testing.T) {
	t.Setenv("TCPLB_TEST_PORT", "15000")
	const own = "it is the pool's own listener, "
	for name, c := range map[string]struct{ listen, backend, want string }{
		"loopback":                     {"tcp_lb/127.0.0.1:15000", "127.0.0.1:15000", own + "tcp_lb/127.0.0.1:15000"},
		"all addresses":                {"tcp_lb/:15000", "127.0.0.1:15000", own + "tcp_lb/:15000"},
		"another loopback address":     {"tcp_lb/:15000", "127.0.0.7:15000", own},
		"IPv6":                         {"tcp_lb/:15000", "[::1]:15000", own},
		"plain":                        {":15000", "127.0.0.1:15000", own + ":15000"},
		"localhost":                    {"tcp_lb/:15000", "localhost:15000", own},
		"localhost with a dot":         {"tcp_lb/:15000", "Localhost.:15000", own},
		"both localhost":               {"tcp_lb/localhost:15000", "localhost:15000", own},
		"localhost, the address":       {"tcp_lb/localhost:15000", "127.0.0.1:15000", own},
		"unspecified":                  {"tcp_lb/127.0.0.1:15000", "0.0.0.0:15000", own},
		"unspecified, IPv6":            {"tcp_lb/[::]:15000", "[::]:15000", own},
		"IPv4 in IPv6":                 {"tcp_lb/0.0.0.0:15000", "[::ffff:127.0.0.1]:15000", own},
		"its own address":              {"192.0.2.1:15000", "192.0.2.1:15000", own},
		"in a range":                   {"tcp_lb/:14990-15010", "127.0.0.1:15000", own + "tcp_lb/:14990-15010"},
		"placeholders":                 {"tcp_lb/:{env.TCPLB_TEST_PORT}", "127.0.0.1:{env.TCPLB_TEST_PORT}", own},
		"a path":                       {"unix//tmp/x|0222", "unix//tmp/./x", own + "unix//tmp/x"},
		"another port":                 {"tcp_lb/:15000", "127.0.0.1:15001", ""},
		"another host":                 {"tcp_lb/:15000", "192.0.2.1:15000", ""},
		"a name":                       {"tcp_lb/:15000", "db:15000", ""},
		"a listener of another host":   {"tcp_lb/192.0.2.1:15000", "127.0.0.1:15000", ""},
		"one of another loopback":      {"tcp_lb/127.0.0.2:15000", "127.0.0.1:15000", ""},
		"one of another, localhost":    {"tcp_lb/127.0.0.2:15000", "localhost:15000", ""},
		"another family":               {"tcp4/:15000", "[::1]:15000", ""},
		"another family, the other":    {"tcp6/:15000", "127.0.0.1:15000", ""},
		"another path":                 {"unix//tmp/x", "unix//tmp/y", ""},
		"a port that is not known yet": {"tcp_lb/127.0.0.1:0", "127.0.0.1:15000", ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, wrap := range []string{"%", `{"handler":"subroute",` + layer4Routes("%") + `}`} {
				lb := withHandler(`"name":"web",` + backendsJSON("192.0.2.9:1", c.backend) + `}`)
				err := validate(t, layer4Config(`"srv":{"listen":["`+c.listen+`"],`+layer4Routes(strings.Replace(wrap, "%", lb, 1))+`}`))
				if c.want == "" {
					require.NoError(t, err)
					continue
				}
				require.ErrorContains(t, err, c.want)
				require.ErrorContains(t, err, `tcp_lb "web": backend "`)
			}
		})
	}
}

// A pool may stand behind another one, but not behind itself in another server.
func TestBackendIsAnotherListener(t *testing.T) {
	pool := func(server, listen, name, backend string) string {
		return lbAt(server, listen, `"name":"`+name+`",`+backendsJSON(backend)+`}`)
	}
	require.NoError(t, validate(t, layer4Config(
		pool("a", "tcp_lb/:15000", "front", "127.0.0.1:15001")+","+pool("b", "tcp_lb/:15001", "back", "192.0.2.1:80"))))
	for range 10 { // whichever comes first
		require.ErrorContains(t, validate(t, layer4Config(
			pool("a", "tcp_lb/:15000", "web", "127.0.0.1:15001")+","+pool("b", "tcp_lb/:15001", "web", "127.0.0.1:15001"))),
			"the pool's own listener, tcp_lb/:15001")
	}
}
