package statuspage

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestVerdicts(t *testing.T) {
	two := func(change ...func(*Backend)) Pool {
		return pool("web", backend("10.0.0.1:80", change...), backend("10.0.0.2:80"))
	}
	with := func(p Pool, change func(*Pool)) Pool {
		change(&p)
		return p
	}
	set := func(change func(*Backend)) func(*Backend) { return change }
	failed := func(before time.Duration) func(*Backend) {
		return func(b *Backend) { b.ConnectError, b.ConnectAt = "refused", ago(before) }
	}
	for name, c := range map[string]struct {
		pool  Pool
		level level
		want  string
	}{
		"well":     {two(), well, ""},
		"one down": {two(down), warn, "1 of 2 down (10.0.0.1:80)"},
		"all down": {
			with(pool("web", backend("10.0.0.1:80", down)), func(p *Pool) { p.Outage = &Outage{Since: ago(8 * time.Minute), TurnedAway: 1412} }),
			bad, "no backend available since 14:02:30 (8m00s); 1,412 clients turned away since; 1 of 1 down (10.0.0.1:80)",
		},
		"since yesterday": {
			with(pool("web", backend("10.0.0.1:80", down)), func(p *Pool) { p.Outage = &Outage{Since: ago(26 * time.Hour)} }),
			bad, "no backend available since 23 Nov 12:10 (1d02h); 1 of 1 down (10.0.0.1:80)",
		},
		"set aside": {
			with(pool("web", backend("a:80", set(func(b *Backend) { b.State, b.Available = "drain", false }))), func(p *Pool) { p.Outage = &Outage{Since: ago(time.Minute), Wanted: true} }),
			warn, "no backend takes connections since 14:09:30 (1m00s): all are set aside by hand, or by a weight of 0; 1 of 1 drained by hand (a:80)",
		},
		"not checked yet": {pool("web", backend("a:80", set(func(b *Backend) { b.Health, b.Available = "unchecked", false }))), bad, "no backend has been found up yet"},
		"none found":      {pool("web"), bad, "no backend has been found yet"},
		"backups":         {pool("web", backend("a:80", down), backend("b:80", set(func(b *Backend) { b.Backup = true }))), warn, "only backups serve; 1 of 2 down (a:80)"},
		"all are backups": {pool("web", backend("b:80", set(func(b *Backend) { b.Backup = true }))), well, ""},
		"out":             {two(set(func(b *Backend) { b.EjectedUntil, b.Available = noon, false })), warn, "1 of 2 out for a while since clients' connections failed (10.0.0.1:80)"},
		"refusing":        {two(failed(59 * time.Second)), warn, "1 of 2 refusing connects that checks say should work (10.0.0.1:80)"},
		"refused once":    {two(failed(time.Minute)), well, ""},
		"never turned":    {two(failed(time.Second), set(func(b *Backend) { b.HealthSince = time.Time{} })), warn, "1 of 2 refusing connects that checks say should work (10.0.0.1:80)"},
		"back since":      {two(failed(10*time.Second), set(func(b *Backend) { b.HealthSince = ago(9 * time.Second) })), well, ""},
		"without checks":  {two(failed(time.Second), set(func(b *Backend) { b.Health, b.Checked = "unchecked", time.Time{} })), well, ""},
		"full":            {two(set(func(b *Backend) { b.MaxConnections, b.Open, b.Connecting = 10, 9, 1 })), warn, "1 of 2 full (10.0.0.1:80)"},
		"drained":         {two(set(func(b *Backend) { b.State = "drain" })), note, "1 of 2 drained by hand (10.0.0.1:80)"},
		"maintained":      {two(down, set(func(b *Backend) { b.State = "maint" })), note, "1 of 2 in maintenance (10.0.0.1:80)"},
		"leaving":         {pool("web", backend("a:80"), backend("b:80", set(func(b *Backend) { b.Configured = false }))), note, "1 leaving, with connections that are drained (b:80)"},
		"waiting":         {with(two(), func(p *Pool) { p.Waiting = 1 }), warn, "1 client waits for a backend"},
		"near its limit":  {with(two(), func(p *Pool) { p.Connections = 4500 }), warn, "4,500 of at most 5,000 connections"},
		"below that":      {with(two(), func(p *Pool) { p.Connections = 4499 }), well, ""},
		"limit before down": {
			with(two(down), func(p *Pool) { p.Connections = 5000 }), bad, "at its limit of 5,000 connections; 1 of 2 down (10.0.0.1:80)",
		},
		"wanted comes last": {
			with(two(set(func(b *Backend) { b.State = "drain" })), func(p *Pool) { p.Refused = []Refusal{{Reason: "no_backend", Recent: 1, Total: 1}} }),
			warn, "1 client turned away in the last 20m (no_backend); 1 of 2 drained by hand (10.0.0.1:80)",
		},
		"at its limit": {with(two(), func(p *Pool) { p.Connections = 5000 }), bad, "at its limit of 5,000 connections"},
		"refusals": {
			with(two(), func(p *Pool) {
				p.Refused = []Refusal{{Reason: "no_backend", Recent: 3, Total: 9}, {Reason: "max_connections", Recent: 1, Total: 1}, {Reason: "client_closed", Recent: 7, Total: 7, ByClient: true}, {Reason: "error", Total: 5}}
			}),
			warn, "4 clients turned away in the last 20m (no_backend, max_connections)",
		},
		"source": {
			with(two(), func(p *Pool) {
				p.Sources = []Source{{Name: "a db 1", Error: "no such\nhost", Failing: ago(time.Minute)}, {Name: "b"}}
			}),
			warn, "source a db 1 fails since 14:09:30 (1m00s): no such\uFFFDhost",
		},
		"many are not named": {pool("web", backend("a:1", down), backend("b:1", down), backend("c:1", down), backend("d:1", down), backend("e:1")), warn, "4 of 5 down"},
		"left":               {Pool{Name: "old", Connections: 2, DrainUntil: noon.Add(9 * time.Second)}, note, "left the config, 2 connections are drained until 14:10:39"},
	} {
		t.Run(name, func(t *testing.T) {
			v := c.pool.verdict(noon, 20*time.Minute)
			require.Equal(t, c.want, v.String())
			require.Equal(t, c.level, v.level)
		})
	}
}

func TestProcessVerdict(t *testing.T) {
	turned := []Refusal{{Reason: "files_short", Recent: 1, Total: 1}, {Reason: "handshake_timeout", Recent: 2, Total: 5}, {Reason: "max_connections", Total: 7}}
	for want, p := range map[string]Page{
		"": {Files: 89, MaxFiles: 100, TurnedAway: turned[2:]},
		"3 clients turned away before they came to a pool, in the last 20m (files_short, handshake_timeout)": {TurnedAway: turned, Window: 20 * time.Minute},
		"900 of the 1,000 files that connections may use are in use":                                         {Files: 900, MaxFiles: 1000},
		"all 1,000 files that connections may use are in use: raise the limit of open files":                 {Files: 1000, MaxFiles: 1000},
		"the process is ending": {Exiting: true},
	} {
		v := p.process()
		require.Equal(t, want, v.String())
	}
	p := quiet()
	p.TurnedAway = turned
	d := p.document(View{})
	require.Equal(t, "warn", d.Level)
	require.Equal(t, "The process: 3 clients turned away before they came to a pool, in the last 20m (files_short, handshake_timeout)", d.Headline)
	require.Empty(t, d.Problems, "that is all")
	html, err := p.Render(View{})
	require.NoError(t, err)
	require.Contains(t, string(html), "<p>Turned away by listeners: <bdi>files_short: 1 in 20m, 1 in all</bdi> · <bdi>handshake_timeout: 2 in 20m, 5 in all</bdi>")
}

func TestHeadlines(t *testing.T) {
	busy := quiet()
	busy.Files = busy.MaxFiles
	both := troubled()
	both.Exiting = true
	for want, p := range map[string]*Page{
		"The pool is well: 2 of 2 backends available": quiet(),
		"All 2 pools are well":                        page(pool("a", backend("a:1")), pool("b", backend("a:1"))),
		"There is no pool":                            page(),
		"web: 10 of 1,000 down":                       many(1000),
		"Trouble with 2 of 4 pools":                   troubled(),
		"The process: all 260,000 files that connections may use are in use: raise the limit of open files": busy,
		"Trouble with the process, and with 2 of 4 pools":                                                   both,
	} {
		require.Equal(t, want, p.document(View{}).Headline)
	}
	d := troubled().document(View{LB: "orders"})
	require.Equal(t, "orders: no backend available since 14:02:20 (8m10s)", d.Headline)
	require.Equal(t, "1,412 clients turned away since", d.Problems[0].Text, "the rest of it follows")
	require.Equal(t, "bad", d.Level)
}

// What is red comes first, be it a pool's or the process's, and what follows the
// headline has its own color.
func TestWorstIsFirst(t *testing.T) {
	full := page(pool("web", backend("a:1", down), backend("b:1")))
	full.Pools[0].Connections = full.Pools[0].MaxConnections
	d := full.document(View{})
	require.Equal(t, "web: at its limit of 5,000 connections", d.Headline)
	require.Equal(t, []problem{{Level: "warn", Text: "1 of 2 down (a:1)"}}, d.Problems)

	full.Pools = append(full.Pools, pool("amber", backend("a:1", down), backend("b:1")))
	full.Exiting = true
	d = full.document(View{})
	require.Len(t, d.Problems, 3)
	require.Equal(t, []string{"web", "", "amber"}, []string{d.Problems[0].Pool, d.Problems[1].Pool, d.Problems[2].Pool})
	full.Files = full.MaxFiles
	d = full.document(View{})
	require.Equal(t, problem{Level: "bad", Text: "all 260,000 files that connections may use are in use: raise the limit of open files; the process is ending"}, d.Problems[0])
}

// A name is no part of a command but a word of it.
func TestCommandsAreQuoted(t *testing.T) {
	for text, want := range map[string]string{
		"web": "web", "10.0.0.1:5432": "10.0.0.1:5432", "unix//run/x.sock": "unix//run/x.sock",
		"[::1]:80": "'[::1]:80'", "a b": "'a b'", "": "''", "-x": "'-x'", "$(rm -rf ~)": "'$(rm -rf ~)'", "it's": `'it'\''s'`, "a\x1bb\n": "'a\uFFFDb\uFFFD'",
	} {
		require.Equal(t, want, argument(text))
	}
	require.Equal(t, []string{
		"caddy tcp-lb connections 10.0.0.1:5432 --lb=orders", "caddy tcp-lb drain 10.0.0.1:5432 --lb=orders",
		"caddy tcp-lb maint 10.0.0.1:5432 --lb=orders", "caddy tcp-lb ready 10.0.0.1:5432 --lb=orders",
	}, troubled().document(View{}).Commands)
	require.Empty(t, page().document(View{}).Commands)
}

func TestNumbersForPeople(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 999: "999", 1000: "1,000", 9_999_999: "9,999,999", 10_000_000: "10M", 123_456: "123,456"} {
		require.Equal(t, want, amount(n))
	}
	for v, want := range map[float64]string{0: "0/s", 0.01: "0.1/s", 4.25: "4.2/s", 9.96: "10/s", 1234.5: "1,235/s", 250_000: "250,000/s", 25_000_000: "25M/s"} {
		require.Equal(t, want, rate(v))
	}
	for d, want := range map[time.Duration]string{-time.Second: "0s", 900 * time.Millisecond: "0s", 3900 * time.Millisecond: "3s", 90 * time.Second: "1m30s"} {
		require.Equal(t, want, age(noon, noon.Add(-d)))
	}
}

// A row is amber for as long as the verdict says why.
func TestFailedConnectExpires(t *testing.T) {
	b := backend("a:1", func(b *Backend) { b.ConnectError, b.ConnectAt = "refused", ago(30*time.Second) })
	require.Equal(t, warn, b.level(noon))
	require.Equal(t, well, b.level(noon.Add(30*time.Second)))
	require.Equal(t, []string{"connect 30s ago: refused"}, b.troubles(noon), "it says when")
	b.NameError = "lookup a: i/o timeout; using its addresses of noon"
	require.Equal(t, warn, b.level(noon.Add(30*time.Second)))
	require.Equal(t, "name: "+b.NameError, b.troubles(noon)[0])
}
