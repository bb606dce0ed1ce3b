package tcplb

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestCaddyfileSaysWhatIsMeant has what one writes who is new to this, or comes
// from another balancer.
func TestCaddyfileSaysWhatIsMeant(t *testing.T) {
	t.Setenv("TCPLB_TEST_UNSET", "")
	for line, want := range map[string]string{
		// Options by other names, or misspelled.
		"max_connection 5":        `unknown option "max_connection": did you mean max_connections? (there are access_log, backend, close_if_unhealthy, `,
		"maxconn 5":               "did you mean max_connections?",
		"limit_conn 5":            "did you mean max_connections_per_client?",
		"shutdown_delay 5s":       "it is a global option: write tcp_lb { shutdown_delay <duration> } beside layer4",
		"max_age 1h":              "did you mean max_lifetime?",
		"max_lifetime_spread 5":   "write max_lifetime <duration> <percent>%",
		"to a:1":                  `unknown option "to": write backend <address>`,
		"upstream a:1":            "write backend <address>",
		"dial a:1":                "write backend <address>",
		"server web1 a:1 check":   "write backend <address>",
		"servers a:1 b:1":         "write backend <address>",
		"server-template s 3 a:1": `unknown option "server-template": write dynamic a <name> <port>, or dynamic srv <name>`,
		"srv _pg._tcp.db":         "write dynamic a <name> <port>, or dynamic srv <name>",
		"resolvers 10.0.0.53":     "it belongs to a source of backends: write it in the block of dynamic a <name> <port>",
		"backend a:1 resolvers x": "resolvers: it belongs to a source of backends",
		"dynamic A a 1":           "did you mean a?",
		"dynamic dns a 1":         "did you mean a?",
		"dynamic a b:5432":        "write dynamic a b 5432",
		"dynamic a b 1 2":         `dynamic a b: want a name and a port, found "2" as well`,
		"weight 3":                "it belongs to a backend: write backend <address> <weight>",
		"backup a:1":              "write it in the block of one, backend <address> { backup }",
		"Name web":                "did you mean name?",
		"nmae web":                "did you mean name?",
		"lb-retries 3":            "did you mean lb_retries?",
		"lb_retry 3":              "did you mean lb_retries?",
		"health_intervall 3s":     "did you mean health_interval?",
		"drain-timout: 3s":        "did you mean drain_timeout?",
		"balance roundrobin":      "did you mean lb_policy?",
		"policy round_robin":      "did you mean lb_policy?",
		"least_conn":              "write lb_policy <policy>",
		"retries 3":               "did you mean lb_retries?",
		"inter 2s":                "did you mean health_interval?",
		"rise 2":                  "did you mean health_passes?",
		"fall 3":                  "did you mean health_fails?",
		"health_checks off":       "write health_interval <duration>, or health_interval off",
		"max_fails 3":             "max_fails: it counts within a time, and fail_duration is missing",
		"proxy_connect_timeout 3": "did you mean dial_timeout?",
		"proxy_timeout 10m":       "did you mean idle_timeout?",
		"timeout connect 5s":      "there are dial_timeout, idle_timeout, drain_timeout and health_timeout",
		"grace_period 10s":        "did you mean drain_timeout?",
		"log":                     "did you mean access_log?",
		"transport tls":           "write tls, and what else",
		"tls_trusted_ca_certs a":  "write tls_trust_pool file <path>",
		"tls_except_ports 80":     "write tls off in the block of a backend",
		"send-proxy":              "write proxy_protocol v1 or v2",
		"mode tcp":                "leave it out, it is TCP anyway",
		"sticky":                  `unknown option "sticky" (there are access_log, `,

		// Values.
		"lb_policy fastest":                  `unknown policy "fastest" (there are `,
		"lb_policy leastconn":                "did you mean least_conn?",
		"lb_policy source":                   "did you mean ip_hash?",
		"lb_policy two":                      "did you mean random_choose?",
		"lb_policy random_choose 1":          "random_choose 1: want a number from 2 to 100",
		"lb_policy random_choose two":        "random_choose two: want a number from 2 to 100",
		"lb_policy random_choose 2 3":        "random_choose 2: one value is enough, found \"3\"",
		"lb_policy ip_hash 64":               "takes no arguments, found \"64\"",
		"lb_policy rr":                       "did you mean round_robin?",
		"lb_policy round-robin":              "did you mean round_robin?",
		"lb_policy roundrobin":               "did you mean round_robin?",
		"lb_policy weighted_round_robin":     "did you mean round_robin?",
		"health_interval 0":                  "health_interval 0: want a duration such as 10s, or off",
		"health_interval never":              "want a duration such as 10s, or off",
		"dial_timeout 3":                     "dial_timeout 3: want a duration such as 10s: did you mean 3s?",
		"dial_timeout 3sec":                  "did you mean 3s?",
		`drain_timeout "2 min"`:              "did you mean 2m?",
		"idle_timeout never":                 "0 means never",
		"drain_timeout none":                 "0 means at once",
		"health_fast_interval off":           "leave it out for 1s, or the interval if less",
		"max_connections unlimited":          "leave it out for as many as the limit of open files allows",
		"max_connections 5k":                 "want a number from 0 to 2147483647, in digits alone",
		"max_connections 10,000":             "in digits alone",
		"max_connections {env.MAX}":          "placeholders are resolved in addresses and names only: write {$MAX}",
		"dial_timeout {env.DIAL}":            "write {$DIAL}",
		"lb_retries {file./run/retries}":     "write {$NAME}",
		"health_port {$TCPLB_TEST_UNSET}":    "health_port: the value is missing",
		"health_port http":                   "health_port http: want a number from 1 to 65535",
		"access_log off":                     "it is off unless it is there",
		"access_log /var/log/lb.log":         "Caddy's global option log says where its lines go",
		"name two words":                     `name two: one value is enough, found "words"`,
		"health_fast_interval 30s":           "may not exceed the interval, 10s",
		"lb_try_interval 0":                  "lb_try_interval 0s: want a duration of at least 1ms",
		"idle_timeout 1ns":                   "idle_timeout 1ns: want 0 or a duration of at least 1ms",
		"drain_timeout 5us":                  "drain_timeout 5µs: want 0 or a duration of at least 1ms",
		"lb_try_duration 5ns":                "lb_try_duration 5ns: want 0 or a duration of at least 1ms",
		"backend a:1 weight 3":               "the weight follows the address by itself: write backend a:1 3",
		"backend a:1 weight=3":               "write backend a:1 3",
		"backend a:1 weight":                 "write backend a:1 <weight>",
		"backend a:1 backup":                 "backup: write it in the block, backend a:1 { backup }",
		"backend a:1 3 backup":               "backup: write it in the block, backend a:1 { backup }",
		"backend a:1 check":                  "checks are on unless health_interval is off",
		"backend a:1 max_conns=30":           "max_conns=30: write it in the block, backend a:1 { max_connections 30 }",
		"backend a:1 inter 2s":               "write health_interval on a line of its own",
		"backend a:1 health_port=81":         "health_port=81: write it in the block, backend a:1 { health_port 81 }",
		"backend web1 10.0.0.1:80 check":     "backends have no names of their own: write backend 10.0.0.1:80",
		"backend a:1 b:1":                    `one address a line, found "b:1" as well: write backend b:1 on the next`,
		"backend 10.0.0.300:80 b:80":         `backend "10.0.0.300:80": host "10.0.0.300": no IP address`,
		"backend a:1, b:1":                   "without ',': after tcp_lb addresses are separated by spaces, after backend there is one a line",
		"backend a:80;":                      "without ';'",
		"backend a:1 {env.WEIGHT}":           "write {$WEIGHT}",
		"backend a:1 heavy":                  `unknown word "heavy" after the address`,
		"backend a:1 5k":                     "weight 5k: want a number from 0 to 256, in digits alone",
		"slowstart 30s":                      "did you mean lb_slow_start?",
		"lb_slow_start 30":                   "lb_slow_start 30: want a duration such as 10s",
		"backend a:1 slow_start=30s":         "write lb_slow_start on a line of its own",
		"backend a:1 disabled":               `unknown word "disabled" after the address`,
		"backend a:1 3 resolve":              `unknown word "resolve" after the address`,
		"backend a:1 slowstart 30s":          "write lb_slow_start on a line of its own",
		"backend a:1 weight=5;":              "write backend a:1 5: there are no semicolons",
		"backend a:1 3;":                     "write backend a:1 3: there are no semicolons",
		"backend a:1 backup;":                "backup: write it in the block",
		"dial_timeout 5s;":                   "write 5s: there are no semicolons",
		"lb_retries 3;":                      "write 3: there are no semicolons",
		"dial_timeout 5000":                  "did you mean 5000ms or 5000s? (HAProxy's bare numbers are milliseconds)",
		"10.0.0.1:2 3":                       `unknown option "10.0.0.1:2": write backend 10.0.0.1:2 3`,
		"b:1":                                "write backend b:1",
		"b:1 c:1":                            "write backend b:1, one a line",
		"load_balancing {\n}":                "there are lb_policy, lb_retries, lb_try_duration, lb_try_interval and lb_slow_start",
		"health_interval OFF":                "did you mean off?",
		"health_rise 2":                      "did you mean health_passes?",
		"health_fall 2":                      "did you mean health_fails?",
		"drain 30s":                          "did you mean drain_timeout?",
		"handshake_timeout 5s":               "it is a global option: write tcp_lb { handshake_timeout <duration> } beside layer4",
		"backend unix/run/a.sock":            "from the root: did you mean unix//run/a.sock?",
		`backend ""`:                         "the address is missing",
		"backend http://a:80/":               "not a URL: did you mean a:80?",
		"backend https://a":                  "did you mean a:443?",
		"backend mqtts://a":                  "did you mean a:<port>?",
		"backend a:80/path":                  "without a path: did you mean a:80?",
		"backend unix:/run/a.sock":           "did you mean unix//run/a.sock?",
		"backend unix:///run/a.sock":         "did you mean unix//run/a.sock?",
		"backend /run/a.sock":                "unix//path",
		"backend a":                          "the port is missing",
		"backend *:80":                       "want the address of a server",
		"backend tcp_lb:8080":                "is the listener tcp_lb/:8080 meant?",
		"backend tcp_lb/:8080":               "is the listener tcp_lb/:8080 meant?",
		"backend tcp_lb/127.0.0.1:8080 {\n}": "is the listener tcp_lb/127.0.0.1:8080 meant?",
	} {
		t.Run(line, func(t *testing.T) {
			requireRefused(t, lbCaddyfile("good:80", line), handlerLine+1, want)
		})
	}
	for arguments, want := range map[string]string{
		"to a:1":                   `addresses follow tcp_lb or backend without "to"`,
		"a:1,b:1":                  "without ',': after tcp_lb addresses are separated by spaces, after backend there is one a line",
		"a:1 3":                    "a weight is written in the block { }, on a line of its own: backend <address> <weight>",
		"a:1 weight 3":             "a weight is written in the block { }",
		"a:1 name web":             "if the option name is meant, it goes into the block { }, on a line of its own",
		"backend a:1":              "if the option backend is meant",
		"a:1 access_log":           "if the option access_log is meant",
		"tcp_lb/:8080 a:1":         "is the listener tcp_lb/:8080 meant?",
		"localhost":                "the port is missing",
		"redis://cache":            "did you mean cache:6379?",
		"{env.TCPLB_TEST_UNSET} 3": "a weight is written in the block { }",
	} {
		t.Run("tcp_lb "+arguments, func(t *testing.T) {
			requireRefused(t, lbCaddyfile(arguments), handlerLine, want)
		})
	}
	for option, want := range map[string]string{
		"max_conns 30":  "did you mean max_connections? (there are backup, health_port, local_address, max_connections, proxy_protocol, tls, tls_alpn,",
		"wieght 3":      "did you mean weight?",
		"backups":       "did you mean backup?",
		"down":          "take the backend out of the config",
		"health_uri /x": "it holds for all backends: write it outside of this block",
		"Access-log":    "it holds for all backends: write it outside of this block",
		"name web1":     "backends have no names of their own",
	} {
		t.Run("in a backend's block: "+option, func(t *testing.T) {
			requireRefused(t, lbCaddyfile("good:80", "backend a:1 {", "\t"+option, "}"), handlerLine+2, `backend a:1: unknown option`, want)
		})
	}
	t.Run("a log in access_log", func(t *testing.T) {
		requireRefused(t, lbCaddyfile("good:80", "access_log {", "\toutput file /var/log/lb.log", "}"), handlerLine+2, "Caddy's global option log says where its lines go")
	})
	t.Run("in a site", func(t *testing.T) {
		requireRefused(t, "http://:9090 {\n\ttcp_lb a:1\n}\n", 2, "tcp_lb: not a site's directive", "layer4")
	})
}

// The policy's own message has the option's name before it.
func TestPolicyIsNamedOnce(t *testing.T) {
	for _, line := range []string{"lb_policy round_robin x", "lb_policy round_robin {\n\t\t\t\t\t\tx\n\t\t\t\t\t}"} {
		_, err := adapt(t, lbCaddyfile("a:80", line))
		require.ErrorContains(t, err, "lb_policy round_robin: takes no ")
		require.Equal(t, 1, strings.Count(err.Error(), "lb_policy"), err)
	}
}

// A server may well be called tcp_lb.
func TestBackendOfTheNameOfTheListener(t *testing.T) {
	config, err := adapt(t, lbCaddyfile("tcp/tcp_lb:8080"))
	require.NoError(t, err)
	require.NoError(t, validate(t, config))
}

func TestJSONSaysWhatIsMeant(t *testing.T) {
	noPoolsYet(t)
	const good = `"backends":[{"address":"a:80"}],`
	for options, want := range map[string]string{
		`"backends":["a:80"]`:                                          `backends[0]: want an object such as {"address":"host:port"}, found "a:80"`,
		`"backends":"a:80"`:                                            `backends: want a list such as [{"address":"host:port"}], found "a:80"`,
		`"backends":{"address":"a:80"}`:                                `backends: want a list`,
		`"backend":[{"address":"a:80"}]`:                               `unknown field "backend": did you mean backends? (there are access_log, access_log_connects, `,
		`"backends":[{"address":"b:80"},{"dial":"a:80"}]`:              `backends[1]: unknown field "dial": did you mean address? (there are address, backup, health_port, local_address, max_connections, proxy_protocol, tls, weight)`,
		`"backends":[{"address":"a:80","weight":"3"}]`:                 `backends[0].weight "3": want a number, without quotes`,
		`"backends":[{"address":"a:80","wieght":3}]`:                   `backends[0]: unknown field "wieght": did you mean weight?`,
		`"backends":[{"address":"a:80","weight":1.5}]`:                 `backends[0].weight 1.5: want a whole number`,
		`"backends":[{"address":"10.0.5.300:80"}]`:                     `backend "10.0.5.300:80": host "10.0.5.300": no IP address`,
		`"backends":[{"address":"tcp_lb/:8080"}]`:                      `is the listener tcp_lb/:8080 meant?`,
		`"backends":[{"address":"http://a"}]`:                          `did you mean a:80?`,
		good + `"max_connection":3`:                                    `unknown field "max_connection": did you mean max_connections?`,
		good + `"max_connections":"{env.MAX}"`:                         `max_connections "{env.MAX}": want a number; placeholders are resolved in addresses and names only: write {$MAX} in a Caddyfile`,
		good + `"max_connections":[5]`:                                 `max_connections [5]: want a whole number`,
		good + `"dial_timeout":"3"`:                                    `dial_timeout "3": want a duration such as "10s": did you mean 3s?`,
		good + `"dial_timeout":true`:                                   `dial_timeout true: want a duration such as "10s"`,
		good + `"access_log":"on"`:                                     `access_log "on": want true or false`,
		good + `"lb_policy":"round_robin"`:                             `write load_balancing.selection_policy`,
		good + `"health_interval":"5s"`:                                `write health_checks.active.interval`,
		good + `"load_balancing":"round_robin"`:                        `load_balancing: want an object, found "round_robin"`,
		good + `"load_balancing":{"policy":"round_robin"}`:             `load_balancing: unknown field "policy": write load_balancing.selection_policy`,
		good + `"load_balancing":{"selection_policy":"rr"}`:            `selection policy "rr": want an object such as {"policy":"round_robin"}`,
		good + `"load_balancing":{"selection_policy":{}}`:              `selection policy {}: want an object such as {"policy":"round_robin"}`,
		good + `"load_balancing":{"selection_policy":{"policy":"rr"}}`: `selection policy: unknown policy "rr": did you mean round_robin?`,
		good + `"health_checks":{"interval":"2s"}`:                     `health_checks: unknown field "interval": write health_checks.active.interval`,
		good + `"health_checks":{"active":{"intervall":1}}`:            `health_checks.active: unknown field "intervall": did you mean interval?`,
		good + `"health_checks":{"passive":{"max_fails":2}}`:           `health_checks.passive.max_fails: it counts within a time, and health_checks.passive.fail_duration is missing`,
		good + `"passive":{}`:                                          `write health_checks.passive`,
		good + `"health_checks":false`:                                 `health_checks: want an object, found false; {"active":{"disabled":true}} turns checks off`,
		good + `"health_checks":{"active":"off"}`:                      `health_checks.active: want an object, found "off"; {"disabled":true} turns checks off`,
		good + `"health_checks":{"active":{"interval":"off"}}`:         `health_checks.active.interval "off": want a duration such as "10s"; "disabled": true turns checks off`,
		good + `"idle_timeout":"never"`:                                `want a duration such as "10s"; 0 means never`,
		good + `"load_balancing":{"retries":"none"}`:                   `load_balancing.retries "none": want a number; 0 means none`,
		good + `"handshake_timeout":"5s"`:                              `write apps.tcp_lb.handshake_timeout`,
		`"backends":[{"weight":3}]`:                                    `backend "": the address is missing`,
		good + `"name":5`:                                              `name 5: want a text in quotes`,
		good + `"drain_timeout":"{env.DRAIN}"`:                         `write {$DRAIN} in a Caddyfile`,
	} {
		t.Run(options, func(t *testing.T) {
			require.ErrorContains(t, validate(t, lbConfig("127.0.0.1:0", `{`+options+`}`)), want)
		})
	}
}

// Two pools without a name are one to the balancer, as their writer can't know.
func TestUnnamedPoolsAreTold(t *testing.T) {
	config, err := adapt(t, "{\n\tlayer4 {\n\t\t:8080 {\n\t\t\troute {\n\t\t\t\ttcp_lb a:80\n\t\t\t}\n\t\t}\n\t\t:5432 {\n\t\t\troute {\n\t\t\t\ttcp_lb b:5432\n\t\t\t}\n\t\t}\n\t}\n}\n")
	require.NoError(t, err)
	err = validate(t, config)
	for _, want := range []string{`"tcp_lb"`, "a handler without a name has this one", "give each a name of its own", `"a:80"`, `"b:5432"`} {
		require.ErrorContains(t, err, want)
	}
}

func TestNameResolvesPlaceholders(t *testing.T) {
	t.Setenv("TCPLB_TEST_NAME", "web-7")
	g := loaded(t, `{"name":"{env.TCPLB_TEST_NAME}",`+checksDisabled+`,`+backendsJSON("127.0.0.1:1")+`}`)
	require.Equal(t, "web-7", g.name)
	for name, want := range map[string]string{
		"{env.TCPLB_TEST_UNSET}": "empty",
		"{nobody.knows}":         "unrecognized placeholder {nobody.knows}",
	} {
		err := validate(t, lbConfig("127.0.0.1:0", `{"name":"`+name+`",`+backendsJSON("a:80")+`}`))
		require.ErrorContains(t, err, `tcp_lb "`+name+`": name: `)
		require.ErrorContains(t, err, want)
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "ab", 2}, {"ab", "ab", 0}, {"ab", "ba", 1}, {"name", "nmae", 1}, {"kitten", "sitting", 3}, {"abc", "", 3}} {
		require.Equal(t, c.want, distance(c.a, c.b), "%s %s", c.a, c.b)
		require.Equal(t, c.want, distance(c.b, c.a), "%s %s", c.b, c.a)
	}
}
