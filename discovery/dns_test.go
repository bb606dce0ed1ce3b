package discovery

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// load makes a source of its JSON, as Caddy does.
func load(t testing.TB, name, config string) (Source, error) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	module, err := ctx.LoadModuleByID(Namespace+"."+name, json.RawMessage(config))
	if err != nil {
		return nil, err
	}
	return module.(Source), nil
}

func TestSources(t *testing.T) {
	t.Setenv("DB", "DB.internal")
	t.Setenv("PORT", "5432")
	t.Setenv("DNS", "10.0.0.53")
	source, err := load(t, "a", `{"name":"{env.DB}","port":"{env.PORT}","resolvers":["{env.DNS}"]}`)
	require.NoError(t, err)
	require.Equal(t, &A{
		Name: "db.internal", Port: "5432",
		DNS: DNS{Refresh: caddy.Duration(30 * time.Second), Resolvers: []string{"10.0.0.53"}, Versions: []string{"ipv4", "ipv6"}},
	}, &A{Name: source.(*A).Name, Port: source.(*A).Port, DNS: source.(*A).DNS})
	require.Equal(t, Status{Source: "a db.internal 5432", Lookups: map[string]uint64{"success": 0, "partial": 0, "empty": 0, "failure": 0}}, source.(Reporter).Status())

	source, err = load(t, "a", `{"name":"db.internal.","port":1,"versions":["ipv6"],"refresh":"1s"}`)
	require.NoError(t, err)
	require.Equal(t, &addressFinder{name: "db.internal.", port: 1, wanted: families{v6: true}}, source.(*A).lookups.finder)
	require.Equal(t, time.Second, source.(*A).lookups.refresh)

	source, err = load(t, "srv", `{"name":"_pg._tcp.{env.DB}"}`)
	require.NoError(t, err)
	require.Equal(t, "srv _pg._tcp.db.internal", source.(Reporter).Status().Source)
}

func TestMistakesInJSON(t *testing.T) {
	for _, c := range []struct{ name, config, message string }{
		{"a", `{}`, "the name is missing"},
		{"a", `{"name":"db.internal"}`, "the port is missing, want a number from 1 to 65535"},
		{"a", `{"name":"db.internal","port":0}`, "port 0: want a number from 1 to 65535"},
		{"a", `{"name":"db.internal","port":65536}`, "port 65536: want"},
		{"a", `{"name":"db.internal","port":-1}`, "port -1: want"},
		{"a", `{"name":"db.internal","port":true}`, "port true: want"},
		{"a", `{"name":"db.internal","port":"{env.NO_SUCH}"}`, "env.NO_SUCH"},
		{"a", `{"name":"{env.NO_SUCH}","port":1}`, "env.NO_SUCH"},
		{"a", `{"name":"10.0.0.1","port":1}`, "for an address write backend 10.0.0.1"},
		{"a", `{"name":"10.0.0.300","port":1}`, `name "10.0.0.300": no IP address`},
		{"srv", `{"name":"10.0.0.1."}`, "did you mean 10.0.0.1?"},
		{"a", `{"name":"a b","port":1}`, `name "a b": want a name in DNS`},
		{"a", `{"name":"db","port":1,"refresh":"999ms"}`, "refresh 999ms: want a duration of at least 1s"},
		{"a", `{"name":"db","port":1,"refresh":30}`, `write "30s" (a number without a unit counts nanoseconds)`},
		{"a", `{"name":"db","port":1,"refresh":"9000h"}`, "at most 8760h"},
		{"a", `{"name":"db","port":1,"resolvers":["tls://10.0.0.1"]}`, "DNS is asked without TLS"},
		{"a", `{"name":"db","port":1,"resolvers":["{env.NO_SUCH}"]}`, "env.NO_SUCH"},
		{"a", `{"name":"db","port":1,"versions":["v4"]}`, "did you mean ipv4?"},
		{"a", `{"name":"db","port":1,"version":["ipv4"]}`, `unknown field "version"`},
		{"srv", `{}`, "the name is missing"},
		{"srv", `{"name":"_pg._tcp.db","port":1}`, `unknown field "port"`},
		{"srv", `{"name":"fd00::1"}`, "want a name in DNS, such as _postgres._tcp.db.internal"},
	} {
		t.Run(c.config, func(t *testing.T) {
			_, err := load(t, c.name, c.config)
			require.ErrorContains(t, err, c.message)
		})
	}
	shared.Range(func(key, _ any) bool {
		t.Errorf("%v is left over", key)
		return true
	})
}

func TestPortsInJSON(t *testing.T) {
	for in, out := range map[string]string{`80`: `80`, `"80"`: `80`, `"{env.PORT}"`: `"{env.PORT}"`} {
		var p Port
		require.NoError(t, json.Unmarshal([]byte(in), &p))
		b, err := json.Marshal(p)
		require.NoError(t, err)
		require.Equal(t, out, string(b))
	}
}

// TestASourceRuns from its config to its end, over one reload.
func TestASourceRuns(t *testing.T) {
	s := startNameServer(t, "db.internal. 1 A 10.0.0.1")
	config := `{"name":"db.internal","port":5432,"refresh":"1s","versions":["ipv4"],"resolvers":["` + s.address + `"]}`
	source, err := load(t, "a", config)
	require.NoError(t, err)
	require.Empty(t, s.questions(), "loading asks nobody")

	ctx, cancel := context.WithCancel(context.Background())
	answers := make(chan []Found, 100)
	var wg sync.WaitGroup
	wg.Go(func() { source.Run(ctx, func(found []Found) { answers <- found }) })
	require.Equal(t, []Found{{Address: "10.0.0.1:5432"}}, <-answers)
	s.set("db.internal. 1 A 10.0.0.2", "db.internal. 1 A 10.0.0.1")
	require.Equal(t, []string{"10.0.0.1:5432", "10.0.0.2:5432"}, addressesOf(<-answers))
	s.set("db.internal. 1 A 10.0.0.2")
	require.Equal(t, []string{"10.0.0.2:5432"}, addressesOf(<-answers))

	s.set()
	require.Eventually(t, func() bool { return source.(Reporter).Status().Lookups[StatusEmpty] > 0 }, time.Minute, time.Millisecond)
	s.deviates(silence)
	require.Empty(t, answers)
	again, err := load(t, "a", config)
	require.NoError(t, err)
	wg.Go(func() { again.Run(ctx, func(found []Found) { answers <- found }) })
	require.Equal(t, []string{"10.0.0.2:5432"}, addressesOf(<-answers), "what was known serves on")
	cancel() // in the middle of a lookup, or just before it
	wg.Wait()
	require.Empty(t, slots)
	require.Empty(t, troubleSlots)
}

func parse(t testing.TB, text string) (any, error) {
	t.Helper()
	d := caddyfile.NewTestDispenser(text)
	d.Next()
	source, ok := map[string]caddyfile.Unmarshaler{"a": new(A), "srv": new(SRV)}[d.Val()]
	require.True(t, ok)
	return source, source.UnmarshalCaddyfile(d.NewFromNextSegment())
}

func TestCaddyfile(t *testing.T) {
	for text, want := range map[string]string{
		"a db.internal 5432":              `{"name":"db.internal","port":5432}`,
		"a {env.DB} {env.PORT}":           `{"name":"{env.DB}","port":"{env.PORT}"}`,
		"srv _pg._tcp.db.internal":        `{"name":"_pg._tcp.db.internal"}`,
		"srv db {\n\trefresh 1d\n}":       `{"name":"db","refresh":86400000000000}`,
		"a db 1 {\n\tversions ipv6\n}":    `{"name":"db","port":1,"versions":["ipv6"]}`,
		"a db 1 {\n\tresolvers {$X:b}\n}": `{"name":"db","port":1,"resolvers":["b"]}`,
		"a db. 1 {\n\trefresh 1m\n\tresolvers 10.0.0.53 [fd00::53]:5353\n\tversions ipv4 ipv6\n}": `{"name":"db.","port":1,"refresh":60000000000,"resolvers":["10.0.0.53","[fd00::53]:5353"],"versions":["ipv4","ipv6"]}`,
	} {
		t.Run(text, func(t *testing.T) {
			source, err := parse(t, text)
			require.NoError(t, err)
			b, err := json.Marshal(source)
			require.NoError(t, err)
			require.Equal(t, want, string(b))
		})
	}
}

func TestMistakesInACaddyfile(t *testing.T) {
	for text, message := range map[string]string{
		"a":                                              "dynamic a: the name is missing, want one in DNS such as db.internal, at Testfile:1",
		"a db.internal":                                  "dynamic a db.internal: the port is missing, want a number from 1 to 65535",
		"a db.internal:5432":                             "write dynamic a db.internal 5432",
		"a db.internal http":                             "dynamic a db.internal: port http: want a number from 1 to 65535",
		"a db.internal 5432 3":                           `want a name and a port, found "3" as well`,
		"a 10.0.0.1 5432":                                "for an address write backend 10.0.0.1:5432",
		"a 10.0.0.300 5432":                              `dynamic a: name "10.0.0.300": no IP address`,
		"srv 10.0.0.300":                                 `name "10.0.0.300": no IP address`,
		"a db 1 {\n\tresolvers 10.0.0.0x1\n}":            "want an address such as 10.0.0.53",
		"a _pg._tcp.db":                                  "did you mean dynamic srv _pg._tcp.db?",
		"a münchen.example 1":                            "IDNs as xn--...",
		"a -db 1":                                        "want a name in DNS",
		"a db..internal 1":                               "want a name in DNS",
		"a *.internal 1":                                 "want a name in DNS",
		"srv":                                            "dynamic srv: the name is missing",
		"srv _pg._tcp.db 5432":                           `found "5432" as well: ports are in the SRV records`,
		"srv _pg._tcp.db x":                              `want a name alone, found "x" as well`,
		"a db 1 {\n\trefresh\n}":                         "dynamic a db: refresh: the value is missing, at Testfile:2",
		"a db 1 {\n\trefresh 0\n}":                       "dynamic a db: refresh 0s: want a duration of at least 1s, at Testfile:2",
		"a db 1 {\n\trefresh 30\n}":                      "did you mean 30s?",
		"a db 1 {\n\trefresh soon\n}":                    "want a duration such as 30s",
		"a db 1 {\n\trefresh 1s 2s\n}":                   `refresh 1s: one value is enough, found "2s"`,
		"a db 1 {\n\trefresh 1s\n\trefresh 1s\n}":        "dynamic a db: option refresh is set twice, at Testfile:3",
		"a db 1 {\n\trefresh 1s {\n\t\tx\n\t}\n}":        `refresh: takes no block, found "x"`,
		"a db 1 {\n\tinterval 1s\n}":                     `unknown option "interval": did you mean refresh? (there are refresh, resolvers, versions)`,
		"srv db {\n\tresolver 10.0.0.1\n}":               "did you mean resolvers?",
		"srv db {\n\tx\n}":                               `dynamic srv db: unknown option "x" (there are`,
		"a db 1 {\n\tresolvers\n}":                       "resolvers: the value is missing",
		"a db 1 {\n\tresolvers 10.0.0.1 10.0.0.1:53\n}":  "resolvers 10.0.0.1:53: it is listed twice",
		"a db 1 {\n\tresolvers udp/10.0.0.1:53\n}":       "write 10.0.0.1:53: UDP comes first",
		"a db 1 {\n\tresolvers https://dns.example/q\n}": "DNS is asked without TLS",
		"a db 1 {\n\tresolvers 10.0.0.1:x\n}":            `port "x" is not a number`,
		"a db 1 {\n\tresolvers 10.0.0.256\n}":            "want an address such as 10.0.0.53",
		"a db 1 {\n\tresolvers dns://10.0.0.1\n}":        "did you mean 10.0.0.1?",
		"a db 1 {\n\tversions 4\n}":                      "versions 4: want ipv4, ipv6 or both: did you mean ipv4?, at Testfile:2",
		"a db 1 {\n\tversions both\n}":                   "both are the default",
		"a db 1 {\n\tversions ipv4 ipv4\n}":              "versions ipv4: it is listed twice",
	} {
		t.Run(text, func(t *testing.T) {
			_, err := parse(t, text)
			require.ErrorContains(t, err, message)
			require.ErrorContains(t, err, "at Testfile:")
		})
	}
}

// docs/options.md has a row for each option, and what is its default.
func TestOptionsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/options.md")
	require.NoError(t, err)
	_, table, ok := strings.Cut(string(text), "| in a block of `dynamic` | default | JSON | meaning |\n|---|---|---|---|\n")
	require.True(t, ok)
	table, _, _ = strings.Cut(table, "\n\n")
	var documented []string
	for row := range strings.Lines(table) {
		cells := strings.Split(row, " | ")
		option, _, _ := strings.Cut(strings.TrimPrefix(cells[0], "| `"), " ")
		documented = append(documented, option)
		require.Equal(t, "`"+option+"`", cells[2])
		if option == "refresh" {
			require.Equal(t, defaultRefresh.String(), cells[1])
		}
	}
	require.ElementsMatch(t, slices.Collect(maps.Keys(readers)), documented)
}

// FuzzOptions: what a Caddyfile may have can be loaded.
func FuzzOptions(f *testing.F) {
	f.Add("db.internal", "5432", "1s", "10.0.0.53", "ipv4")
	f.Add("db.", "1", "100d", "[fd00::1]:53", "ipv6")
	f.Add("_pg._tcp.db", "65535", "1.5h", "dns.internal:53", "ipv4")
	f.Fuzz(func(t *testing.T, name, port, refresh, resolver, version string) {
		if strings.ContainsAny(name+port+refresh+resolver+version, "{}\"`\\ \t\r\n#<") || name == "" || port == "" {
			return // several tokens, or a placeholder
		}
		options := " {\n\trefresh " + refresh + "\n\tresolvers " + resolver + "\n\tversions " + version + "\n}"
		for kind, text := range map[string]string{"a": name + " " + port, "srv": name} {
			source, err := parse(t, kind+" "+text+options)
			if err != nil {
				continue
			}
			b, err := json.Marshal(source)
			require.NoError(t, err)
			_, err = load(t, kind, string(b))
			require.NoError(t, err)
		}
	})
}
