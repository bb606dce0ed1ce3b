package tcplb

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCaddyfileSaysWhatIsMeantOfChecks(t *testing.T) {
	for line, want := range map[string]string{
		"health_path /health":     "did you mean health_uri?",
		"health_method HEAD":      "health_method: it is of an HTTP check, for which health_uri is missing",
		"health_upstream a:80":    "write health_port <port>, for all or in a backend's block",
		"health_uri http://a/x":   "want a path without scheme and host: did you mean /x?",
		"health_uri health":       `health_uri "health": want a path such as /healthz`,
		"health_status 20x":       "health_status 20x: want a status such as 204, or 2xx",
		"health_status 6xx":       "health_status 6xx: want a status such as 204, or 2xx",
		`health_method "GET /"`:   "want a method such as GET or HEAD",
		"health_body (":           `health_body "(": want a regular expression`,
		"health_headers Host a":   "want the headers in a block, one a line",
		"health_tls db:5432":      "want a server's name, or nothing for the backend's host",
		"health_tls 10.0.0.300":   `health_tls "10.0.0.300": no IP address`,
		"health_tls 10.0.0.1.":    "did you mean 10.0.0.1?",
		"health_tls on":           "health_tls on: write health_tls without a value, or a server's name",
		"health_tls yes":          "write health_tls without a value",
		"health_tls True":         "write health_tls without a value",
		"health_tls no":           "health_tls no: did you mean off?",
		"health_tls false":        "did you mean off?",
		"health_tls of":           "did you mean off?",
		"health_tls OFF":          "did you mean off?",
		"health_tls_ca a.pem":     "did you mean health_tls_trust_pool?",
		"health_proxy_protocol 2": "health_proxy_protocol 2: want v1, v2 or off",
		`health_send "\q"`:        `there is no escape \q (there are \r \n \t \\ \" and \xNN)`,
		`health_send "\x4"`:       `want two hexadecimal digits after \x`,
		`health_send ""`:          "want a text to send, or to expect",
		`health_expect ~"a b"`:    "a pattern with spaces has its ~ inside the quotes, or apart from them",
		"health_expect ~(":        "want a regular expression after the ~",
		"health_expect ~a*":       "it matches no answer at all",
		"health_check http":       "write health_uri <path>",
		"health_check alwys":      "did you mean always?",
	} {
		t.Run(line, func(t *testing.T) {
			requireRefused(t, lbCaddyfile("good:80", line), handlerLine+1, want)
		})
	}
	for _, c := range []struct {
		lines []string
		at    int
		want  string
	}{
		{[]string{`health_send "a"`, "name web", "health_uri /"}, 1, "health_send: a check is by HTTP or a dialogue, and health_uri is there, too"},
		{[]string{"health_uri /", "name web", "health_expect a"}, 3, "health_expect: a check is by HTTP or a dialogue"},
		{[]string{"health_check always", "health_uri /"}, 1, "health_check: one check is enough, and health_uri is there, too"},
		{[]string{"health_expect a", "health_check always"}, 2, "health_check: one check is enough, and health_expect is there, too"},
		{[]string{"health_body x", "health_method HEAD", "health_uri /"}, 1, "health_body: a response to HEAD has no body"},
		{[]string{"backend unix//run/a.sock", "health_tls"}, 2, `health_tls: backend "unix//run/a.sock" has no host`},
		{[]string{"health_headers {", "\tA", "}"}, 2, "health_headers: A: the value is missing"},
		{[]string{"health_headers {", "\tA b {", "\t\tc d", "\t}", "}"}, 3, `health_headers: A: takes no block, found "c"`},
		{[]string{"health_headers {", "\tConnection close", "}"}, 2, "header Connection: it is the check's own to say"},
		{[]string{"name web", "max_fails 3"}, 2, "max_fails: it counts within a time, and fail_duration is missing"},
		{[]string{"health_initially_unhealthy", "health_interval off"}, 1, "health_initially_unhealthy: without checks no backend would ever be up"},
		{[]string{"close_if_unhealthy 5s", "health_interval off"}, 1, "close_if_unhealthy: without checks no backend is ever found down"},
		{[]string{"close_if_unhealthy soon"}, 1, "close_if_unhealthy soon: want a duration such as 10s, or nothing for at once"},
	} {
		requireRefused(t, lbCaddyfile("good:80", c.lines...), handlerLine+c.at, c.want)
	}
}

func TestJSONSaysWhatIsMeantOfChecks(t *testing.T) {
	noPoolsYet(t)
	const good = `"backends":[{"address":"a:80"}],`
	for options, want := range map[string]string{
		good + `"health_checks":{"active":{"path":"/"}}`:                                    `write health_checks.active.uri`,
		good + `"health_checks":{"active":{"status":200,"uri":"/"}}`:                        `health_checks.active: unknown field "status": did you mean expect_status?`,
		good + `"health_checks":{"active":{"method":"HEAD"}}`:                               `health_checks.active.method: it is of an HTTP check, for which health_checks.active.uri is missing`,
		good + `"health_checks":{"active":{"uri":"x"}}`:                                     `health_checks.active.uri "x": want a path such as /healthz`,
		good + `"health_checks":{"active":{"uri":"/","expect_status":6}}`:                   `health_checks.active.expect_status 6: want a status from 100 to 599, or the first digit of one`,
		good + `"health_checks":{"active":{"uri":"/","headers":{"A B":["c"]}}}`:             `health_checks.active.headers: header "A B": want a name`,
		good + `"health_checks":{"active":{"uri":"/","headers":{"Host":"c"}}}`:              `health_checks.active.headers {"Host":"c"}: want an object such as {"Host":["db.internal"]}`,
		good + `"health_checks":{"active":{"dialogue":"PING"}}`:                             `health_checks.active.dialogue "PING": want a list such as [{"send":"PING\\r\\n"},{"expect":"+PONG"}]`,
		good + `"health_checks":{"active":{"dialogue":[]}}`:                                 `health_checks.active.dialogue: no steps`,
		good + `"health_checks":{"active":{"dialogue":[{"send":"a"},{}]}}`:                  `health_checks.active.dialogue: step 2: want a text to send, or to expect`,
		good + `"health_checks":{"active":{"dialogue":[{"send":"a","expect":"b"}]}}`:        `step 1: want a send or an expect, each a step of its own`,
		good + `"health_checks":{"active":{"uri":"/","dialogue":[{"send":"a"}]}}`:           `health_checks.active.dialogue: a check is by HTTP or a dialogue, and health_checks.active.uri is there, too`,
		good + `"health_checks":{"active":{"uri":"/","check":{"check":"always"}}}`:          `health_checks.active.check: one check is enough, and health_checks.active.uri is there, too`,
		good + `"health_checks":{"active":{"check":"http"}}`:                                `health_checks.active.check "http": want an object such as {"check":"http","uri":"/"}`,
		good + `"health_checks":{"active":{"check":{"check":"htp"}}}`:                       `health_checks.active.check: unknown check "htp": did you mean http?`,
		good + `"health_checks":{"active":{"check":{"check":"http","uri":"x"}}}`:            `loading the check: `,
		good + `"health_checks":{"active":{"tls":"db"}}`:                                    `health_checks.active.tls: want an object, found "db"`,
		good + `"health_checks":{"active":{"tls":{"servername":"db"}}}`:                     `health_checks.active.tls: unknown field "servername": did you mean server_name?`,
		good + `"health_checks":{"active":{"tls":{"ca":{"provider":"fil"}}}}`:               `health_checks.active.tls: loading the trust pool: `,
		good + `"health_checks":{"active":{"tls":{"server_name":"10.0.0.300"}}}`:            `health_checks.active.tls.server_name "10.0.0.300": no IP address`,
		good + `"health_checks":{"active":{"tls":{"server_name":"db:1"}}}`:                  `health_checks.active.tls.server_name "db:1": want a server's name`,
		good + `"health_checks":{"active":{"proxy_protocol":"v3"}}`:                         `health_checks.active.proxy_protocol v3: want v1, v2 or off`,
		`"backends":[{"address":"unix//run/a.sock"}],"health_checks":{"active":{"tls":{}}}`: `health_checks.active.tls.server_name: backend "unix//run/a.sock" has no host`,
		`"backends":[{"address":"a:80","health_port":70000}]`:                               `health_port 70000: want a number from 0 to 65535`,
	} {
		t.Run(options, func(t *testing.T) {
			require.ErrorContains(t, validate(t, lbConfig("127.0.0.1:0", `{`+options+`}`)), want)
		})
	}
}
