//go:build unix

package tcplb

import (
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// runRecipe runs an example, with other addresses and times in it.
func runRecipe(t testing.TB, file string, replacements map[string]string) {
	t.Helper()
	text := readFile(t, file)
	for from, to := range replacements {
		require.Contains(t, text, from)
		text = strings.ReplaceAll(text, from, to)
	}
	runSnippet(t, text)
}

// runSnippet runs a Caddyfile without an admin endpoint.
func runSnippet(t testing.TB, text string) {
	t.Helper()
	noPoolsYet(t)
	runCaddy(t, snippetConfig(t, text))
}

// snippetConfig is the JSON of that.
func snippetConfig(t testing.TB, text string) string {
	t.Helper()
	config, err := adapt(t, string(caddyfile.Format([]byte(text))))
	require.NoError(t, err)
	return strings.Replace(config, "{", `{"admin":{"disabled":true,"config":{"persist":false}},"logging":{"logs":{"default":{"level":"ERROR"}}},`, 1)
}

// snippetWith returns the one snippet that has the text in it.
func snippetWith(t testing.TB, snippets []string, text string) (found string) {
	t.Helper()
	for _, s := range snippets {
		if strings.Contains(s, text) {
			require.Empty(t, found, "one alone has %s", text)
			found = s
		}
	}
	require.NotEmpty(t, found, text)
	return found
}

// lastErrors is what the checks of the pool's backends found, by address.
func lastErrors(pool string) map[string]string {
	errors := make(map[string]string)
	for _, m := range registry.newest(pool).members() {
		errors[m.Backend.address] = m.Backend.status(pool).LastError
	}
	return errors
}

// eventuallySays waits until the check of the pool's backend says this.
func eventuallySays(t testing.TB, pool, address, text string) {
	t.Helper()
	eventually(t, func() bool { return strings.Contains(lastErrors(pool)[address], text) },
		"%s: %s: %v", pool, text, lazily(func() any { return lastErrors(pool) }))
}

// requireCut waits for a client that loses its connection.
func requireCut(t testing.TB, client *process) {
	t.Helper()
	out, err := client.wait()
	require.Error(t, err, out)
	require.NotContains(t, err.Error(), "hung", "by itself")
}
