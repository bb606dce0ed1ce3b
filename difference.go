package tcplb

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// comparedSettings are all of a handler but its backends, by the names that they
// have in a Caddyfile. Their defaults are filled in.
var comparedSettings = []struct {
	option string
	of     func(*Handler) string
}{
	{"lb_policy", func(h *Handler) string { return short(h.LoadBalancing.SelectionPolicyRaw) }},
	{"lb_retries", func(h *Handler) string { return strconv.Itoa(*h.LoadBalancing.Retries) }},
	{"lb_try_duration", func(h *Handler) string { return durationText(h.LoadBalancing.TryDuration) }},
	{"lb_try_interval", func(h *Handler) string { return durationText(h.LoadBalancing.TryInterval) }},
	{"health_interval", func(h *Handler) string {
		if h.HealthChecks.Active.Disabled {
			return "off"
		}
		return durationText(h.HealthChecks.Active.Interval)
	}},
	{"health_fast_interval", func(h *Handler) string { return durationText(h.HealthChecks.Active.FastInterval) }},
	{"health_timeout", func(h *Handler) string { return durationText(h.HealthChecks.Active.Timeout) }},
	{"health_passes", func(h *Handler) string { return strconv.Itoa(h.HealthChecks.Active.Passes) }},
	{"health_fails", func(h *Handler) string { return strconv.Itoa(h.HealthChecks.Active.Fails) }},
	{"health_port", func(h *Handler) string {
		if h.HealthChecks.Active.Port == 0 {
			return "the backend's own"
		}
		return strconv.Itoa(h.HealthChecks.Active.Port)
	}},
	{"max_connections", func(h *Handler) string {
		if h.MaxConnections == 0 {
			return "not set"
		}
		return strconv.Itoa(h.MaxConnections)
	}},
	{"dial_timeout", func(h *Handler) string { return durationText(h.DialTimeout) }},
	{"idle_timeout", func(h *Handler) string { return durationText(*h.IdleTimeout) }},
	{"drain_timeout", func(h *Handler) string { return durationText(*h.DrainTimeout) }},
	{"access_log", func(h *Handler) string {
		if h.AccessLog {
			return "on"
		}
		return "off"
	}},
}

// durationText leaves zeros out at the end: 1h, not 1h0m0s.
func durationText(d caddy.Duration) string {
	text := time.Duration(d).String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// firstDifference says what two handlers' fingerprints differ in, in the words
// of a config.
func firstDifference(one, other string) string {
	var a, b Handler
	if json.Unmarshal([]byte(one), &a) != nil || json.Unmarshal([]byte(other), &b) != nil {
		return "compare them" // never: both come from handlers
	}
	for i := range max(len(a.Backends), len(b.Backends)) {
		switch {
		case i >= len(a.Backends) || i >= len(b.Backends):
			longer := a.Backends
			if len(b.Backends) > len(a.Backends) {
				longer = b.Backends
			}
			return fmt.Sprintf("only one has the backend %q", longer[i].Address)
		case a.Backends[i].Address != b.Backends[i].Address:
			return fmt.Sprintf("backend number %d is %q in one and %q in the other", i+1, a.Backends[i].Address, b.Backends[i].Address)
		case *a.Backends[i].Weight != *b.Backends[i].Weight:
			return fmt.Sprintf("the weight of backend %q is %d in one and %d in the other", a.Backends[i].Address, *a.Backends[i].Weight, *b.Backends[i].Weight)
		}
	}
	for _, s := range comparedSettings {
		if x, y := s.of(&a), s.of(&b); x != y {
			return fmt.Sprintf("%s is %s in one and %s in the other", s.option, x, y)
		}
	}
	return "the options of their policies differ"
}
