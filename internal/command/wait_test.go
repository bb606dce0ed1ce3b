package command

import (
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

const drainingBackend = `{"lb":"web","address":"a:1","configured":true,"weight":1,"effective_weight":0,"state":"drain","health":"up",`

// waitingAdmin answers the change, and then each look in turn; the last goes on.
func waitingAdmin(t *testing.T, looks ...string) (a *adminEndpoint, seen *atomic.Int64) {
	t.Helper()
	seen = new(atomic.Int64)
	return startAdmin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPatch {
			_, _ = io.WriteString(w, "["+drainingBackend+`"active":2}]`)
			return
		}
		look := looks[min(int(seen.Add(1)), len(looks))-1]
		if look == "away" {
			c, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_ = c.Close()
			}
			return
		}
		_, _ = io.WriteString(w, look)
	}), seen
}

func TestDrainWaits(t *testing.T) {
	busy := "[" + drainingBackend + `"active":2,"connecting":0}]`
	connecting := "[" + drainingBackend + `"active":0,"connecting":1}]`
	empty := "[" + drainingBackend + `"active":0,"connecting":0}]`
	other := strings.Replace(strings.Replace(busy, `"a:1"`, `"b:1"`, 1), "drain", "ready", 1)
	for name, c := range map[string]struct {
		looks []string
		seen  int
		open  string
	}{
		"connections and connects":  {[]string{busy, connecting, empty}, 4, "0"},
		"a connect that shows late": {[]string{busy, empty, connecting, empty}, 5, "0"},
		"it leaves the config":      {[]string{busy, "[]"}, 3, ""},
		"the endpoint is away":      {[]string{busy, "away", "away", "away", empty}, 6, "0"},
		"another one joins":         {[]string{busy, other}, 3, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, seen := waitingAdmin(t, c.looks...)
			out, code, err := caddyRun(t, "drain", "--lb", "web", "--wait", "30s", "--address", a.address)
			require.NoError(t, err)
			require.Zero(t, code)
			require.EqualValues(t, c.seen, seen.Load())
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if c.open == "" {
				require.Len(t, lines, 1)
				return
			}
			require.Len(t, lines, 2)
			require.Equal(t, c.open, strings.Fields(lines[1])[5])
		})
	}
}

func TestDrainWaitsInVain(t *testing.T) {
	busy := "[" + drainingBackend + `"active":1,"connecting":2}]`
	a, _ := waitingAdmin(t, busy)
	out, code, err := caddyRun(t, "drain", "a:1", "--wait", "300ms", "--json", "--address", a.address)
	require.EqualError(t, err, "after 300ms 3 connections are still open, and there will be no new ones")
	require.Equal(t, exitNotReady, code)
	require.Equal(t, busy, out, "what there is, as it is")

	ready := strings.Replace(busy, "drain", "ready", 1)
	a, _ = waitingAdmin(t, busy, ready)
	_, code, err = caddyRun(t, "drain", "a:1", "--wait", "30s", "--address", a.address)
	require.EqualError(t, err, "a:1 of web was set to ready meanwhile")
	require.Equal(t, 1, code)

	a, _ = waitingAdmin(t, "away")
	_, code, err = caddyRun(t, "drain", "a:1", "--wait", "300ms", "--address", a.address)
	require.Error(t, err)
	require.Equal(t, exitNotReady, code, "nobody knows")

	a, _ = waitingAdmin(t, busy, "no list")
	_, code, err = caddyRun(t, "maint", "a:1", "--wait", "30s", "--address", a.address)
	require.ErrorContains(t, err, "answers what is no list")
	require.Equal(t, 1, code)
}
