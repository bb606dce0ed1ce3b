package tcplb

import (
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest/observer"
)

// A pool tells of itself when it starts and when it changes, and not again when
// a reload leaves it as it is.
func TestPoolTellsOfItself(t *testing.T) {
	f := newFakeNet()
	begin := func(change func(*Handler)) (*generation, []observer.LoggedEntry) {
		g, logs := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one, two, three, "10.0.0.4:80", "10.0.0.5:80")
			h.MaxConnections = 100
			change(h)
		})
		g.begin()
		var lines []observer.LoggedEntry
		for _, l := range logs.All() {
			if l.Message == "pool started" || l.Message == "pool changed" {
				lines = append(lines, l)
			}
		}
		return g, lines
	}
	first, lines := begin(func(*Handler) {})
	require.Len(t, lines, 1)
	require.Equal(t, "pool started", lines[0].Message)
	require.Equal(t, "info", lines[0].Level.String())
	require.Equal(t, map[string]any{
		"lb": t.Name(), "backends": int64(5), "addresses": []any{one, two, three, "and 2 more"}, "policy": "round_robin", "sum_of_weights": int64(5),
		"retries": int64(3), "try_duration": time.Duration(0), "checks": "tcp every 10s", "max_connections": int64(100),
		"dial_timeout": 3 * time.Second, "idle_timeout": time.Hour, "drain_timeout": 30 * time.Second,
	}, lines[0].ContextMap())

	second, lines := begin(func(*Handler) {})
	first.stop()
	require.Empty(t, lines, "nothing has changed")
	third, lines := begin(func(h *Handler) {
		h.Backends = backendList(one)
		h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Disabled: true}}
	})
	second.stop()
	require.Len(t, lines, 1)
	require.Equal(t, "pool changed", lines[0].Message)
	require.Equal(t, "off", lines[0].ContextMap()["checks"])
	third.stop()
	fourth, lines := begin(func(h *Handler) {
		h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Port: 81, Interval: caddy.Duration(time.Minute)}}
	})
	require.Len(t, lines, 1)
	require.Equal(t, "pool started", lines[0].Message, "anew")
	require.Equal(t, "tcp to port 81 every 1m0s", lines[0].ContextMap()["checks"])
	fourth.stop()
	fifth, lines := begin(func(h *Handler) {
		h.Backends = []BackendConfig{{Address: "unix//run/x"}}
		h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Port: 81}}
	})
	require.Equal(t, "connect every 10s", lines[0].ContextMap()["checks"], "a Unix socket has no port")
	sixth, lines := begin(func(h *Handler) {
		h.Backends = []BackendConfig{{Address: "unix//run/x", Weight: new(3)}}
	})
	fifth.stop()
	require.EqualValues(t, 3, lines[0].ContextMap()["sum_of_weights"], "another weight shows")
	sixth.stop()
	require.NotContains(t, lines[0].ContextMap(), "tls")
	seventh, lines := begin(func(h *Handler) {
		h.TLS, h.ProxyProtocol = new(BackendTLS), "v2"
		h.Backends[1].TLS = &BackendTLS{TLSConfig: reverseproxy.TLSConfig{InsecureSkipVerify: true}}
		h.Backends[2].TLS, h.Backends[2].ProxyProtocol = &BackendTLS{Off: true}, "v1"
		h.Backends[3].ProxyProtocol = proxyOff
	})
	require.Equal(t, "not verified (1 of 5), verified (3 of 5)", lines[0].ContextMap()["tls"])
	require.Equal(t, "v1 (1 of 5), v2 (3 of 5)", lines[0].ContextMap()["proxy_protocol"])
	require.Equal(t, "tls every 10s", lines[0].ContextMap()["checks"])
	seventh.stop()
	eighth, lines := begin(func(h *Handler) { h.TLS, h.ProxyProtocol = new(BackendTLS), "v2" })
	require.Equal(t, "verified", lines[0].ContextMap()["tls"])
	require.Equal(t, "v2", lines[0].ContextMap()["proxy_protocol"])
	eighth.stop()
	_, lines = begin(func(*Handler) {})
	require.Len(t, lines, 1)

	stopped, logs := testGeneration(t, f, func(h *Handler) { h.Name, h.Backends = "never", backendList(one) })
	stopped.stop()
	stopped.begin()
	require.Empty(t, logs.All())
}
