package tcplb

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

// What is wrong in a config is told with what was probably meant.

func init() {
	// In a site block Caddy would call the name unrecognized, and no more.
	httpcaddyfile.RegisterDirective("tcp_lb", func(h httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
		h.Next()
		return nil, h.Err(`tcp_lb: not a site's directive: write it in a route of the global option layer4, "{ layer4 { tcp_lb/:8080 { route { tcp_lb <address>... } } } }"`)
	})
}

const (
	meantBackend = "write backend <address>"
	meantPolicy  = "write lb_policy <policy>"
	meantPassive = "write fail_duration <duration> and max_fails <number>"
	meantBackup  = "it belongs to a backend: write it in the block of one, backend <address> { backup }"
	meantLimit   = "write max_connections in a backend's block"
	meantTLS     = "write tls, and what else it takes on lines of their own, such as tls_trust_pool file <path>"
	meantCA      = "write tls_trust_pool file <path>"
	meantCert    = "write tls_client_auth <cert_file> <key_file>"
	meantProxy   = "write proxy_protocol v1 or v2"
	noSemicolons = "there are no semicolons at the ends of lines"
	notNeeded    = "leave it out, it is TCP anyway"
	setsChecks   = "write health_interval <duration>, or health_interval off"
	meantDynamic = "write dynamic a <name> <port>, or dynamic srv <name>"
	ofDynamic    = "it belongs to a source of backends: write it in the block of dynamic a <name> <port>"
	setsTimeouts = "there are dial_timeout, idle_timeout, drain_timeout and health_timeout"
)

// meantOptions says what to write for names that other balancers, other handlers
// of Caddy, or this one's JSON have: an option, or a hint.
var meantOptions = map[string]string{
	"to": meantBackend, "upstream": meantBackend, "upstreams": meantBackend, "dial": meantBackend, "server": meantBackend, "servers": meantBackend,
	"backends": meantBackend, "address": meantBackend, "addresses": meantBackend, "host": meantBackend, "target": meantBackend, "targets": meantBackend,
	"member": meantBackend, "proxy_pass": meantBackend, "proxy": meantBackend,
	"dynamic_backends": meantDynamic, "dynamic_upstreams": meantDynamic, "server_template": meantDynamic, "dns": meantDynamic, "srv": meantDynamic, "a": meantDynamic,
	"aaaa": meantDynamic, "discovery": meantDynamic, "resolver": ofDynamic, "resolvers": ofDynamic, "refresh": ofDynamic, "versions": ofDynamic,
	"weight": "it belongs to a backend: write backend <address> <weight>", "backup": meantBackup,

	"lb": "lb_policy", "policy": "lb_policy", "balance": "lb_policy", "algorithm": "lb_policy", "lb_algorithm": "lb_policy", "method": "lb_policy",
	"load_balancing": "there are lb_policy, lb_retries, lb_try_duration, lb_try_interval and lb_slow_start, each on a line of its own", "selection_policy": "lb_policy", "strategy": "lb_policy", "scheduler": "lb_policy",
	"round_robin": meantPolicy, "roundrobin": meantPolicy, "least_conn": meantPolicy, "leastconn": meantPolicy, "random": meantPolicy, "hash": meantPolicy,
	"ip_hash": meantPolicy, "first": meantPolicy, "source": meantPolicy,

	"retries": "lb_retries", "redispatch": "lb_retries", "proxy_next_upstream_tries": "lb_retries", "max_retries": "lb_retries", "lb_retry": "lb_retries", "retry": "lb_retries",
	"try_duration": "lb_try_duration", "proxy_next_upstream_timeout": "lb_try_duration", "timeout_queue": "lb_try_duration", "queue_timeout": "lb_try_duration",
	"try_interval": "lb_try_interval", "retry_interval": "lb_try_interval",
	"slowstart": "lb_slow_start", "slow_start": "lb_slow_start", "warmup": "lb_slow_start", "slow_start_duration": "lb_slow_start",

	"interval": "health_interval", "inter": "health_interval", "check_interval": "health_interval",
	"fast_interval": "health_fast_interval", "fastinter": "health_fast_interval",
	"check_timeout": "health_timeout", "timeout_check": "health_timeout",
	"rise": "health_passes", "passes": "health_passes", "health_rise": "health_passes",
	"fall": "health_fails", "fails": "health_fails", "health_fall": "health_fails",
	"check_port": "health_port", "port": "health_port",
	"check": setsChecks, "checks": setsChecks, "health": setsChecks, "health_check": setsChecks, "health_checks": setsChecks, "active": setsChecks,
	"health_path": "health_uri", "uri": "health_uri", "httpchk": "health_uri", "http_check": "health_uri", "health_header": "health_headers", "expect_status": "health_status", "expect_body": "health_body",
	"health_upstream": "write health_port <port>, for all or in a backend's block", "health_request_body": "HTTP checks send no body",
	"tcp_check": "write health_send <text> and health_expect <text>", "send": "health_send", "expect": "health_expect", "health_dialogue": "write health_send <text> and health_expect <text>",
	"check_ssl": "health_tls", "check_sni": "write health_tls <server name>", "health_tls_server_name": "write health_tls <server name>", "health_tls_ca": "health_tls_trust_pool", "check_send_proxy": "health_proxy_protocol",
	"passive": meantPassive, "fail_timeout": "fail_duration", "unhealthy_status": meantPassive, "outlier_detection": meantPassive, "error_limit": "max_fails",
	"unhealthy_latency": meantPassive, "observe": meantPassive, "on_marked_down": "close_if_unhealthy", "shutdown_sessions": "close_if_unhealthy", "health_initially_down": "health_initially_unhealthy", "initially_unhealthy": "health_initially_unhealthy",

	"maxconn": "max_connections", "max_conn": "max_connections", "max_conns": "max_connections", "max_clients": "max_connections", "limit": "max_connections",
	"max_connections_per_ip": "max_connections_per_client", "max_conns_per_client": "max_connections_per_client", "max_connections_per_source": "max_connections_per_client", "limit_conn": "max_connections_per_client",
	"maxconn_per_client": "max_connections_per_client", "conn_limit": "max_connections_per_client", "connection_limit": "max_connections_per_client",
	"unhealthy_connection_count": meantLimit, "unhealthy_request_count": meantLimit,
	"connect_timeout": "dial_timeout", "proxy_connect_timeout": "dial_timeout", "timeout_connect": "dial_timeout",
	"proxy_timeout": "idle_timeout", "read_timeout": "idle_timeout", "write_timeout": "idle_timeout", "client_timeout": "idle_timeout",
	"server_timeout": "idle_timeout", "timeout_client": "idle_timeout", "timeout_server": "idle_timeout", "timeout_tunnel": "idle_timeout",
	"lifetime": "max_lifetime", "max_age": "max_lifetime", "max_connection_age": "max_lifetime", "max_connection_duration": "max_lifetime", "server_lifetime": "max_lifetime", "conn_max_lifetime": "max_lifetime",
	"max_lifetime_spread": "write max_lifetime <duration> <percent>%",
	"timeout":             setsTimeouts, "timeouts": setsTimeouts,
	"grace_period": "drain_timeout", "shutdown_timeout": "drain_timeout", "hard_stop_after": "drain_timeout", "shutdown_delay": "it is a global option: write tcp_lb { shutdown_delay <duration> } beside layer4",
	"drain": "drain_timeout", "handshake_timeout": "it is a global option: write tcp_lb { handshake_timeout <duration> } beside layer4",
	"log": "access_log", "logs": "access_log", "logging": "access_log", "logger": "access_log",
	"pool": "name", "label": "name", "id": "name",

	"ssl": meantTLS, "proxy_ssl": meantTLS, "transport": meantTLS, "tls_trusted_ca_certs": meantCA, "tls_ca": meantCA, "ca_file": meantCA, "proxy_ssl_trusted_certificate": meantCA,
	"tls_except_ports": "write tls off in the block of a backend that has none", "sni": "tls_server_name", "tls_sni": "tls_server_name", "proxy_ssl_name": "tls_server_name",
	"alpn": "tls_alpn", "verify": "write tls: it verifies unless tls_insecure_skip_verify is there", "crt": meantCert, "tls_cert": meantCert, "proxy_ssl_certificate": meantCert,
	"send_proxy": meantProxy, "send_proxy_v2": meantProxy, "sendproxy": meantProxy, "proxy_header": meantProxy, "haproxy": meantProxy,
	"bind_address": "local_address", "bind": "local_address", "proxy_bind": "local_address", "source_address": "local_address", "local_addr": "local_address", "usesrc": "local_address",
	"mode": notNeeded, "option": notNeeded, "protocol": notNeeded, "network": notNeeded,
}

// meantOfBackend is meantOptions for a backend's block.
var meantOfBackend = map[string]string{
	"down": "take the backend out of the config, and reload", "maxconn": "max_connections", "max_conn": "max_connections", "max_conns": "max_connections",
	"max_requests": "max_connections", "limit": "max_connections", "max_connections_per_client": "it counts a client's connections to all backends: write it outside of this block", "ssl": meantTLS, "sni": "tls_server_name", "send_proxy": meantProxy, "send_proxy_v2": meantProxy,
	"address": "the address stands before the block: write backend <address> { }", "dial": "the address stands before the block: write backend <address> { }",
	"name": "backends have no names of their own", "check": "checks are on unless health_interval is off",
}

// meantInBackend has what is meant by a name that is no option of a backend.
func meantInBackend(name string) map[string]string {
	name = plainName(name)
	if o := named(handlerOptions, name); o == nil || o.repeats || meantOfBackend[name] != "" {
		return meantOfBackend
	}
	return map[string]string{name: "it holds for all backends: write it outside of this block"}
}

// unknown describes a name that is not one of those there are. What was meant
// is an entry of synonyms, or the name most alike.
func unknown(kind, name string, there []string, synonyms map[string]string) string {
	hint := ""
	if meant := synonyms[plainName(name)]; slices.Contains(there, meant) || strings.Contains(meant, " ") {
		hint = meant
	} else {
		hint = closest(name, there)
	}
	switch {
	case hint == "":
	case strings.Contains(hint, " "):
		hint = ": " + hint
	default:
		hint = ": did you mean " + hint + "?"
	}
	verb := "are"
	switch len(there) {
	case 0:
		return fmt.Sprintf("unknown %s %q%s (there is none)", kind, name, hint)
	case 1:
		verb = "is"
	}
	list := slices.Clone(there)
	slices.Sort(list)
	return fmt.Sprintf("unknown %s %q%s (there %s %s)", kind, name, hint, verb, strings.Join(list, ", "))
}

// plainName is a name as it is spelled here.
func plainName(name string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimSuffix(name, ":")), "-", "_")
}

// closest returns the name most alike, or nothing if none is.
func closest(name string, names []string) string {
	if name = plainName(name); len(name) > 64 {
		return ""
	}
	best, least := "", 2+len(name)/5
	for _, n := range names {
		if d := distance(name, n); d < least {
			best, least = n, d
		}
	}
	return best
}

// distance counts the bytes to insert, delete, replace, or swap with their
// neighbour, that turn a into b.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		for j := range rows[i] {
			switch {
			case i == 0 || j == 0:
				rows[i][j] = i + j
				continue
			case a[i-1] == b[j-1]:
				rows[i][j] = rows[i-1][j-1]
			default:
				rows[i][j] = 1 + min(rows[i-1][j-1], rows[i-1][j], rows[i][j-1])
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], 1+rows[i-2][j-2])
			}
		}
	}
	return rows[len(a)][len(b)]
}

const policyNamespace = "layer4.tcp_lb.selection_policies"

var meantPolicies = map[string]string{
	"rr": "round_robin", "wrr": "round_robin", "static_rr": "round_robin", "weighted": "round_robin", "weighted_round_robin": "round_robin", "default": "round_robin",
	"leastconn": "least_conn", "least_connections": "least_conn", "least_request": "least_conn", "least_time": "least_conn", "lc": "least_conn", "wlc": "least_conn",
	"p2c": "random_choose", "two": "random_choose", "random_two": "random_choose", "power_of_two": "random_choose",
	"source": "ip_hash", "hash": "ip_hash", "iphash": "ip_hash", "client_ip_hash": "ip_hash", "maglev": "ip_hash", "consistent": "ip_hash", "sticky": "ip_hash",
}

// checkPolicyName refuses a policy that nothing provides.
func checkPolicyName(name string) error {
	return checkModuleName("policy", policyNamespace, name, meantPolicies)
}

// meantSources has what is meant by the names of others for sources of backends.
var meantSources = map[string]string{"aaaa": "a", "dns": "a", "host": "a", "A": "a", "SRV": "srv", "upstreams": "a"}

// checkSourceName refuses a source of backends that nothing provides.
func checkSourceName(name string) error {
	return checkModuleName("source", discovery.Namespace, name, meantSources)
}

func checkModuleName(what, namespace, name string, meant map[string]string) error {
	var there []string
	for _, m := range caddy.GetModules(namespace) {
		there = append(there, m.ID.Name())
	}
	if slices.Contains(there, name) {
		return nil
	}
	return fmt.Errorf("%s", unknown(what, name, there, meant))
}

// valueHint says what could be meant by a value that is no number or duration;
// it begins with a separator, or is empty.
func valueHint(s spec, value string) string {
	if bare := strings.TrimRight(value, ";"); bare != value {
		return fmt.Sprintf(": write %s: %s", bare, noSemicolons)
	}
	if hasPlaceholder(value) {
		variable := "NAME"
		if inner, ok := strings.CutPrefix(value, "{env."); ok {
			variable = strings.TrimSuffix(inner, "}")
		}
		return fmt.Sprintf("; placeholders are resolved in addresses and names only: write {$%s} in a Caddyfile, which is filled in from the environment when that is read", variable)
	}
	switch {
	case isNone(value) && s.zero != "":
		return "; 0 means " + s.zero
	case isNone(value) && s.unset != "":
		return "; leave it out for " + s.unset
	case isNone(value):
		return ""
	}
	if strings.ContainsAny(value, "0123456789") && strings.ContainsAny(value, ",_kKmM") {
		return ", in digits alone"
	}
	return ""
}

// isNone reports whether the value stands for none, or for what there is without
// it.
func isNone(value string) bool {
	switch plainName(value) {
	case "off", "none", "never", "no", "false", "disabled", "unlimited", "infinite", "inf", "infinity", "forever", "auto", "default":
		return true
	}
	return false
}

// durationHint is valueHint with a guess at the unit.
func durationHint(s spec, value string) string {
	number := strings.TrimRight(value, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
	n, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return valueHint(s, value)
	}
	if number == value && n >= 1000 {
		return fmt.Sprintf(": did you mean %sms or %ss? (HAProxy's bare numbers are milliseconds)", number, number)
	}
	unit := "s"
	switch strings.ToLower(strings.TrimSpace(value[len(number):])) {
	case "", "sec", "secs", "second", "seconds", "s":
	case "millisecond", "milliseconds", "msec", "msecs", "ms":
		unit = "ms"
	case "min", "mins", "minute", "minutes", "m":
		unit = "m"
	case "hour", "hours", "hr", "hrs", "h":
		unit = "h"
	case "day", "days", "d":
		unit = "d"
	default:
		return ""
	}
	return fmt.Sprintf(": did you mean %s%s?", number, unit)
}

// parseBackend parses a backend's address; an error says what could be meant.
func parseBackend(address string) (target, error) {
	if strings.HasPrefix(address, "tcp_lb/") {
		return target{}, fmt.Errorf("is the listener %s meant? Clients connect there, and it stands before the route; a backend is a server, host:port", address)
	}
	if port, ok := strings.CutPrefix(address, "tcp_lb:"); ok {
		return target{}, fmt.Errorf("is the listener tcp_lb/:%s meant? Clients connect there, and it stands before the route; a server whose name is tcp_lb is tcp/%s", port, address)
	}
	t, err := parseTarget(address)
	if err == nil && t.host != "*" {
		return t, nil
	}
	return t, misspelled(address, err)
}

// misspelled adds to the error of an address what could be meant by it.
func misspelled(address string, err error) error {
	name := plainName(address)
	scheme, rest, isURL := strings.Cut(address, "://")
	rest = strings.TrimSuffix(rest, "/")
	path, isUnix := strings.CutPrefix(address, "unix:")
	host, _, hasPath := strings.Cut(address, "/")
	_, isNumber := strconv.Atoi(address)
	switch {
	case hasPlaceholder(address):
		return err
	case name == "weight" || isNumber == nil:
		return fmt.Errorf("%w; a weight is written in the block { }, on a line of its own: backend <address> <weight>", err)
	case named(handlerOptions, name) != nil:
		return fmt.Errorf("%w; if the option %s is meant, it goes into the block { }, on a line of its own", err, name)
	case meantOptions[name] == meantBackend:
		return fmt.Errorf("%w; addresses follow tcp_lb or backend without %q", err, address)
	case isUnix:
		return fmt.Errorf("want unix//path: did you mean unix//%s?", strings.TrimLeft(path, "/"))
	case isURL && strings.Contains(rest, ":"):
		return fmt.Errorf("want host:port, not a URL: did you mean %s?", rest)
	case isURL:
		return fmt.Errorf("want host:port, not a URL: did you mean %s:%s?", rest, cmp.Or(schemePorts[scheme], "<port>"))
	case strings.ContainsAny(address, ",;"):
		return fmt.Errorf("want host:port, without %q: after tcp_lb addresses are separated by spaces, after backend there is one a line", address[strings.IndexAny(address, ",;")])
	case hasPath && strings.Contains(host, ":"):
		return fmt.Errorf("want host:port, without a path: did you mean %s?", host)
	case err == nil:
		return errors.New("want the address of a server, * is where one listens")
	}
	return err
}

var schemePorts = map[string]string{"http": "80", "https": "443", "redis": "6379", "postgres": "5432", "postgresql": "5432", "mysql": "3306", "mqtt": "1883", "amqp": "5672", "ssh": "22"}

// backendLineError is for what follows the address on a backend's line and is
// no weight.
func backendLineError(address, found, next string) error {
	word, value, isPair := strings.Cut(found, "=")
	if !isPair {
		value = next
	}
	word = plainName(word)
	_, wrong := parseTarget(address)
	if _, err := parseTarget(found); err == nil && wrong != nil && !hasPlaceholder(address) {
		return fmt.Errorf("backends have no names of their own: write backend %s", found)
	} else if err == nil {
		return fmt.Errorf("one address a line, found %q as well: write backend %s on the next", found, found)
	}
	switch meant := meantOptions[word]; {
	case word == "weight" && value != "":
		return fmt.Errorf("the weight follows the address by itself: write backend %s %s", address, value)
	case word == "weight":
		return fmt.Errorf("the weight follows the address by itself: write backend %s <weight>", address)
	case named(backendOptions, word) != nil:
		return fmt.Errorf("%s: write it in the block, backend %s { %s }", found, address, strings.TrimSpace(word+" "+value))
	case meant == "max_connections":
		return fmt.Errorf("%s: write it in the block, backend %s { %s }", found, address, strings.TrimSpace(meant+" "+value))
	case word == "check" || meant == setsChecks:
		return fmt.Errorf("%s: checks are on unless health_interval is off", found)
	case strings.Contains(meant, " ") && meant != meantBackend:
		return fmt.Errorf("%s: %s", found, meant)
	case meant != "" && meant != meantBackend:
		return fmt.Errorf("%s: it holds for all backends: write %s on a line of its own", found, meant)
	case named(handlerOptions, word) != nil && word != "backend":
		return fmt.Errorf("%s: it holds for all backends: write it on a line of its own", found)
	case word != "" && unicode.IsLetter(rune(word[0])):
		return fmt.Errorf("unknown word %q after the address: only a weight may stand there, a number from 0 to %d", found, maxWeight)
	}
	return nil
}

// twoOfOneName says which name two handlers of different settings have, and
// what to do.
func twoOfOneName(h *Handler) string {
	if h.Name == defaultName {
		return fmt.Sprintf("two tcp_lb handlers named %q have different settings: a handler without a name has this one; give each a name of its own (the option name), or both the same settings", h.Name)
	}
	return fmt.Sprintf("two tcp_lb handlers named %q have different settings: give one another name, or both the same settings", h.Name)
}
