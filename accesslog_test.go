package tcplb

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap/zaptest/observer"
)

func TestAccessLogBlockIsRefused(t *testing.T) {
	for line, want := range map[string]string{
		"connects yes":       `access_log: connects: takes no value, found "yes"`,
		"connect":            "did you mean connects?",
		"every 5m":           "did you mean interval?",
		"interval":           "access_log: interval: the value is missing",
		"interval 5":         "did you mean 5s?",
		"interval 1ms":       "access_log: interval 1ms: want a duration of at least 1s",
		"interval 0":         "want a duration of at least 1s",
		"interval 5m 6m":     "one value is enough",
		"sampling {\n\t}":    "Caddy's global option log says where its lines go",
		"interval 5m {\n\t}": "takes no block",
	} {
		_, err := adapt(t, lbCaddyfile("good:80", "access_log {", "\t"+strings.ReplaceAll(line, "\n", "\n\t\t\t\t\t"), "}"))
		if strings.Contains(want, "block") && err == nil {
			continue // an empty block is none
		}
		require.ErrorContains(t, err, want, line)
		require.ErrorContains(t, err, fmt.Sprintf("Caddyfile:%d", handlerLine+2), line)
	}
	requireRefused(t, lbCaddyfile("good:80", "access_log {", "\tconnects", "\tconnects", "}"), handlerLine+3, "access_log: connects is set twice")
	const good = `"backends":[{"address":"a:80"}],`
	for options, want := range map[string]string{
		`"access_log_connects":true`:                      "access_log_connects: there is no access log, access_log is missing",
		`"access_log_interval":"5m"`:                      "access_log_interval: there is no access log, access_log is missing",
		`"access_log":true,"access_log_interval":"1ms"`:   "access_log_interval 1ms: want a duration of at least 1s",
		`"access_log":true,"access_log_interval":"never"`: `want a duration such as "10s"; leave it out for none`,
		`"access_log":{"connects":true}`:                  "access_log_connects and access_log_interval stand beside it",
	} {
		require.ErrorContains(t, validate(t, lbConfig("127.0.0.1:0", good+options+"}")), want, options)
	}
}

// withAccessLog has a config write its access log to a file.
func withAccessLog(t testing.TB, config string) (_ string, lines func() []map[string]any) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "access.log")
	config = strings.Replace(config, `"default":{"level":"ERROR"}`, fmt.Sprintf(
		`"default":{"level":"ERROR"},"access":{"include":["layer4.handlers.tcp_lb.access"],"writer":{"output":"file","filename":%q}}`, file), 1)
	return config, func() (lines []map[string]any) {
		b, _ := os.ReadFile(file)
		for d := json.NewDecoder(bytes.NewReader(b)); d.More(); {
			var line map[string]any
			if d.Decode(&line) != nil {
				return lines
			}
			lines = append(lines, line)
		}
		return lines
	}
}

// A connection tells of its beginning, now and then of itself, and of its end.
func TestAccessLogOfOneThatLasts(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			s, lb := echoServer(t), freeAddress(t)
			config, lines := withAccessLog(t, lbConfig(network+lb, `"name":"web","access_log":true,"access_log_connects":true,"access_log_interval":"1s",`+
				checksDisabled+","+backendsJSON(s.address)+"}"))
			runCaddy(t, config)
			c := hold(t, lb)
			eventually(t, func() bool { return len(lines()) >= 3 }, "one when it is connected, and two by and by")
			write(t, c, "more")
			expect(t, c, "more")
			require.NoError(t, c.Close())
			eventually(t, func() bool {
				all := lines()
				return all[len(all)-1]["msg"] == "connection"
			}, "one at the end")
			fields := documentedFields(t)
			all := lines()
			for i, line := range all {
				require.Equal(t, "layer4.handlers.tcp_lb.access.web", line["logger"])
				require.Equal(t, "info", line["level"])
				require.Equal(t, c.LocalAddr().String(), line["client"])
				require.Equal(t, s.address, line["backend"])
				require.Subset(t, keysOf(fields), keys(line))
				switch i {
				case 0:
					require.Equal(t, "connected", line["msg"])
					require.EqualValues(t, 1, line["attempts"])
					require.Positive(t, line["dial_time"])
				case len(all) - 1:
					require.EqualValues(t, 5, line["sent_bytes"])
				default:
					require.Equal(t, "open", line["msg"])
					require.Contains(t, []any{1.0, 5.0}, line["received_bytes"])
					require.Contains(t, []any{1.0, 5.0}, line["sent_bytes"])
					require.GreaterOrEqual(t, line["duration"], float64(i))
					require.Contains(t, line, "idle")
				}
			}
		})
	}
}

// So has one whose client sends no more, and waits for an answer that takes its time.
func TestAccessLogOfOneThatIsHalfClosed(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			answer := make(chan struct{})
			s := startServer(t, func(c *net.TCPConn) {
				_, _ = io.Copy(io.Discard, c)
				<-answer
			})
			lb := freeAddress(t)
			config, lines := withAccessLog(t, lbConfig(network+lb, `"name":"web","access_log":true,"access_log_interval":"1s",`+
				checksDisabled+","+backendsJSON(s.address)+"}"))
			runCaddy(t, config)
			c := dialClient(t, lb)
			defer close(answer)
			require.NoError(t, c.CloseWrite())
			eventually(t, func() bool { return len(lines()) >= 2 }, "two by and by")
			require.Equal(t, "open", lines()[1]["msg"])
		})
	}
}

// Whoever is turned away has a line, whatever the reason, and none that says that
// it was connected.
func TestAccessLogOfWhoIsTurnedAway(t *testing.T) {
	watchLeftovers(t)
	s := echoServer(t)
	for name, c := range map[string]struct {
		options, level string
		backends       []BackendConfig
	}{
		"max_connections":            {`"max_connections":1,`, "warn", backendList(s.address)},
		"max_connections_per_client": {`"max_connections_per_client":1,`, "info", backendList(s.address)},
		"a backend's limit":          {"", "warn", limited(1, s.address)},
		"no_backend":                 {"", "warn", append(limited(1, s.address), backendList(freeAddress(t))...)},
	} {
		t.Run(name, func(t *testing.T) {
			lb := freeAddress(t)
			backends, err := json.Marshal(c.backends)
			require.NoError(t, err)
			config, lines := withAccessLog(t, lbConfig("tcp_lb/"+lb, `"name":"web","access_log":true,"access_log_connects":true,`+c.options+checksDisabled+`,"backends":`+string(backends)+"}"))
			runCaddy(t, config)
			hold(t, lb)
			refused(t, lb)
			eventually(t, func() bool { return len(lines()) == 2 }, "two lines")
			line := lines()[1]
			require.Equal(t, "connection", line["msg"])
			require.Equal(t, c.level, line["level"])
			require.Equal(t, map[string]string{"a backend's limit": "max_connections"}[name]+strings.TrimSuffix(name, "a backend's limit"), line["reason"])
			require.Empty(t, line["backend"])
		})
	}
}

// A line is due each time a connection has got an interval older, once each,
// whenever the looks are.
func TestLinesOfOpenConnectionsAreDueOnce(t *testing.T) {
	began := time.Now()
	s := &session{began: began}
	const interval = 10 * time.Second
	for _, step := range []time.Duration{time.Millisecond, time.Second, 3 * time.Second, 10 * time.Second, 25 * time.Second} {
		for _, shift := range []time.Duration{-time.Hour, -time.Second, 0, time.Second} {
			due, end := 0, began.Add(100*time.Second)
			for at := began.Add(shift); at.Before(end); at = at.Add(step) {
				next := at.Add(step)
				if next.After(end) {
					next = end
				}
				if next.After(began) && s.isDue(at, next, interval) {
					due++
				}
			}
			want := 10
			if step > interval {
				want = min(want, int((100*time.Second-shift+step-1)/step))
				require.LessOrEqual(t, due, want)
				require.GreaterOrEqual(t, due, 3)
				continue
			}
			require.Equal(t, want, due, "step %s, shift %s", step, shift)
		}
	}
}

// Lines of what is open are of the newest config: they begin, change their rhythm and
// end with it.
func TestReloadChangesLinesOfOpenConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		var (
			g   *generation
			all []*observer.ObservedLogs
		)
		next := func(interval time.Duration) {
			old := g
			var logs *observer.ObservedLogs
			g, logs = testGeneration(t, f, func(h *Handler) {
				h.Backends = backendList(one)
				h.AccessLog, h.AccessLogInterval = interval > 0, caddy.Duration(interval)
				checksOff(h)
			})
			all = append(all, logs)
			if g.start(); old != nil {
				old.stop()
			}
		}
		// written is how many lines there are since the last call, and the first of them.
		written := func() (n int, first observer.LoggedEntry) {
			synctest.Wait()
			for _, logs := range all {
				for _, line := range logs.TakeAll() {
					if line.Message != "open" {
						continue
					}
					if n++; n == 1 {
						first = line
					}
				}
			}
			return n, first
		}
		requireWritten := func(least, most int) {
			t.Helper()
			n, _ := written()
			require.GreaterOrEqual(t, n, least)
			require.LessOrEqual(t, n, most)
		}
		next(0)
		s, ended := openSession(t, g, g.members()[0].Backend)
		time.Sleep(time.Hour)
		requireWritten(0, 0)

		next(time.Minute)
		time.Sleep(10*time.Minute + 10*time.Second)
		n, first := written()
		require.Equal(t, 10, n)
		require.Equal(t, time.Hour+time.Minute, first.ContextMap()["duration"])
		require.True(t, strings.HasSuffix(first.LoggerName, "access."+t.Name()))

		for range 60 { // however often: the same rhythm
			time.Sleep(time.Second)
			next(time.Minute)
		}
		requireWritten(1, 1)

		next(time.Hour)
		next(10 * time.Second)
		time.Sleep(time.Minute)
		requireWritten(5, 6)

		next(0)
		time.Sleep(time.Hour)
		requireWritten(0, 0)

		next(time.Minute)
		s.end(reasonKilled)
		require.Equal(t, reasonKilled, <-ended)
		time.Sleep(time.Hour)
		requireWritten(0, 0)
		g.stop()
	})
}
