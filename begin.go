package tcplb

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"go.uber.org/zap"
)

// begin starts the generation as its config starts, and says so unless the
// config before had the same pool.
func (g *generation) begin() {
	prev := registry.newest(g.name)
	g.standing = prev != nil && prev.health().Available > 0
	g.start()
	switch {
	case !isClosed(g.started):
	case prev == nil:
		g.logPool("pool started")
	case prev.fingerprint != g.fingerprint:
		g.logPool("pool changed")
	}
}

// addressesInLog is how many addresses a line has at most.
const addressesInLog = 3

func (g *generation) logPool(message string) {
	weights, members := 0, g.members()
	for _, m := range members {
		weights += m.weight
	}
	addresses := make([]string, 0, addressesInLog+1)
	for i, m := range members {
		if i == addressesInLog {
			addresses = append(addresses, fmt.Sprintf("and %d more", len(members)-i))
			break
		}
		addresses = append(addresses, m.target.String())
	}
	sources := zap.Skip()
	if len(g.sources) > 0 {
		sources = zap.Strings("sources", g.sourceNames())
	}
	lifetime := zap.Skip()
	if limit := g.lifetime.limit; limit > 0 {
		lifetime = zap.Duration("max_lifetime", limit)
	}
	g.logger.Info(message,
		zap.String("lb", g.name),
		zap.Int("backends", len(members)),
		zap.Strings("addresses", addresses),
		sources,
		zap.Int("sum_of_weights", weights),
		zap.String("policy", g.policyName),
		zap.Int("retries", g.retries),
		zap.Duration("try_duration", g.tryDuration),
		zap.String("checks", g.checksText()),
		unlessEmpty("tls", g.approachText(members, (*approach).tlsText)),
		unlessEmpty("proxy_protocol", g.approachText(members, (*approach).proxyText)),
		zap.Int64("max_connections", g.connections()),
		unlessZero("max_connections_per_client", g.clientLimit),
		zap.Duration("dial_timeout", g.dialTimeout),
		zap.Duration("idle_timeout", g.idleTimeout),
		lifetime,
		zap.Duration("drain_timeout", g.drainTimeout))
}

// unlessZero is a field for what is off as a rule.
func unlessZero(name string, n int64) zap.Field {
	if n == 0 {
		return zap.Skip()
	}
	return zap.Int64(name, n)
}

// unlessEmpty is likewise.
func unlessEmpty(name, text string) zap.Field {
	if text == "" {
		return zap.Skip()
	}
	return zap.String(name, text)
}

// approachText says what is so of how backends are connected to, and of how many
// where it is not so of all.
func (g *generation) approachText(members []enrolled, what func(*approach) string) string {
	if len(members) == 0 { // those that are found yet
		return what(g.approach)
	}
	of := make(map[string]int)
	for _, m := range members {
		of[what(m.approach)]++
	}
	var list []string
	for text, n := range of {
		switch {
		case n == len(members):
			return text
		case text != "":
			list = append(list, fmt.Sprintf("%s (%d of %d)", text, n, len(members)))
		}
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

func (a *approach) tlsText() string {
	switch {
	case a == nil || a.security == nil:
		return ""
	case a.security.config.InsecureSkipVerify:
		return "not verified"
	}
	return "verified"
}

func (a *approach) proxyText() string {
	if a == nil {
		return ""
	}
	return string(a.proxy)
}

// connections returns how many connections the generation serves at most.
func (g *generation) connections() int64 {
	if g.limit > 0 {
		return min(g.limit, files.Process.Connections())
	}
	return files.Process.Connections()
}

// checksText says what is checked, and how often.
func (g *generation) checksText() string {
	somePort := len(g.sources) > 0 || slices.ContainsFunc(g.config, func(m member) bool { return m.target.unix == "" })
	c := g.checks
	if g.approach != nil && g.approach.security != nil && !g.inquiry.ofOwn && c.port == 0 {
		c.text = strings.TrimSpace("tls " + c.text)
	}
	switch {
	case !c.enabled:
		return "off"
	case c.port != 0 && somePort: // a Unix socket has none
		return fmt.Sprintf("%s to port %d every %s", cmp.Or(c.text, "tcp"), c.port, c.interval)
	case !somePort:
		return fmt.Sprintf("%s every %s", cmp.Or(c.text, "connect"), c.interval)
	default:
		return fmt.Sprintf("%s every %s", cmp.Or(c.text, "tcp"), c.interval)
	}
}
