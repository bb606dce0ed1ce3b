package tcplb

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestSpreadOfLifetimes(t *testing.T) {
	const limit = 100 * time.Minute
	for _, c := range []struct {
		spread int
		random float64
		want   time.Duration
	}{
		{0, 0, limit}, {0, .99, limit},
		{10, 0, 90 * time.Minute}, {10, .5, limit}, {10, .75, 105 * time.Minute},
		{50, 0, 50 * time.Minute},
	} {
		require.Equal(t, c.want, lifetime{limit, c.spread}.draw(c.random), "%+v", c)
	}
	require.Zero(t, lifetime{0, 10}.draw(.9), "none, however it is spread")
	var least, most time.Duration = limit, 0
	for range 1000 {
		d := lifetime{limit, 10}.draw(rand.Float64())
		least, most = min(least, d), max(most, d)
	}
	require.GreaterOrEqual(t, least, 90*time.Minute)
	require.Less(t, most, 110*time.Minute)
	require.Greater(t, most-least, 15*time.Minute)
}

func TestLifetimeIsRefused(t *testing.T) {
	for line, want := range map[string]string{
		"max_lifetime 1h 10":     "max_lifetime 1h 10: did you mean 10%?",
		"max_lifetime 1h x%":     `want a spread after it such as 10%, or nothing, found "x%"`,
		"max_lifetime 1h 51%":    "max_lifetime 1h 51%: want a spread from 0% to 50%",
		"max_lifetime 1h -1%":    "max_lifetime 1h -1%: want a spread from 0% to 50%",
		"max_lifetime 0 5%":      "max_lifetime 0 5%: there is nothing to spread",
		"max_lifetime 1h 5% 6%":  `max_lifetime 1h 5%: a duration and a spread are enough, found "6%"`,
		"max_lifetime 10% 1h":    "want a duration such as 10s",
		"max_lifetime 3600":      "did you mean 3600ms or 3600s?",
		"max_lifetime unlimited": "leave it out for none",
	} {
		requireRefused(t, lbCaddyfile("good:80", line), handlerLine+1, want)
	}
	const good = `"backends":[{"address":"a:80"}],`
	for options, want := range map[string]string{
		`"max_lifetime_spread":10`:                       "max_lifetime_spread 10: there is nothing to spread, max_lifetime is missing",
		`"max_lifetime":"1h","max_lifetime_spread":51`:   "max_lifetime_spread 51: want a spread from 0% to 50%",
		`"max_lifetime":"1h","max_lifetime_spread":"5%"`: `max_lifetime_spread "5%": want a number, without quotes`,
		`"max_lifetime":3600`:                            `write "3600s"`,
		`"max_lifetime":"-1s"`:                           "want a duration that is not negative",
	} {
		require.ErrorContains(t, validate(t, lbConfig("127.0.0.1:0", good+options+"}")), want, options)
	}
}

// A connection that has reached its age is cut, counted and told, and that is no
// failure of its backend's.
func TestMaxLifetime(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			s, lb := echoServer(t), freeAddress(t)
			config, warnings := withWarnings(t, lbConfig(network+lb, `"name":"web","max_lifetime":"100ms","max_lifetime_spread":0,"access_log":true,
				"health_checks":{"active":{"disabled":true},"passive":{"fail_duration":"1h"}},`+backendsJSON(s.address)+"}"))
			runCaddy(t, config)
			require.Contains(t, exposition(t), `reason="max_lifetime"} 0`, "there before the first end, for rates")
			began := time.Now()
			c := dialClient(t, lb)
			expectReset(t, c)
			require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond)
			requireBooksBalance(t, 1)
			require.EqualValues(t, 1, closedFor(t, s, reasonMaxLifetime))
			require.Zero(t, metric(t, "backend_ejected", nil))
			require.Empty(t, warnings())

			reload(t, lbConfig(network+lb, `"name":"web",`+checksDisabled+","+backendsJSON(s.address)+"}"))
			require.EqualValues(t, 1, closedFor(t, s, reasonMaxLifetime), "the sum still holds")
		})
	}
}

// Who never had one has no series of it.
func TestNoLifetimeNoSeries(t *testing.T) {
	s, lb := echoServer(t), freeAddress(t)
	runCaddy(t, lbConfig(lb, checksDisabled+","+backendsJSON(s.address)+"}"))
	echoed(t, lb, 1)
	require.NotContains(t, exposition(t), `reason="max_lifetime"`)
}

// As with idle_timeout, a connection has the lifetime of the config by which it
// came to its backend.
func TestReloadLeavesLifetimes(t *testing.T) {
	watchLeftovers(t)
	s, lb := echoServer(t), freeAddress(t)
	config := func(lifetime string) string {
		return lbConfig("tcp_lb/"+lb, `"max_lifetime":"`+lifetime+`",`+checksDisabled+","+backendsJSON(s.address)+"}")
	}
	runCaddy(t, config("0s"))
	old := hold(t, lb)
	reload(t, config("50ms"))
	expectReset(t, dialClient(t, lb))
	write(t, old, "still here")
	expect(t, old, "still here")
	young := dialClient(t, lb)
	eventually(t, func() bool { return metric(t, "connections_total", nil) == 3 }, "it has its backend")
	reload(t, config("0s"))
	expectReset(t, young)
	write(t, old, "still here")
	expect(t, old, "still here")
}

// The time in line is none of the connection's.
func TestLifetimeBeginsWithTheBackend(t *testing.T) {
	watchLeftovers(t)
	s := echoServer(t)
	s.kill()
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, `"max_lifetime":"1s","max_lifetime_spread":0,"load_balancing":{"try_duration":"1h","try_interval":"1100ms"},`+checksDisabled+","+backendsJSON(s.address)+"}"))
	c := dialClient(t, lb)
	eventually(t, func() bool { return metric(t, "connection_errors_total", nil) >= 2 }, "it has waited for longer than it may live")
	s.start()
	write(t, c, "x")
	expect(t, c, "x")
	expectReset(t, c)
}
