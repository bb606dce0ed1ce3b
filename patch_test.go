package tcplb

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// patch changes backends by the admin endpoint, and returns what it answers.
func patch(t testing.TB, admin, query, body string) (status int, changed []backendStatus, text string) {
	t.Helper()
	status, text = request(t, http.MethodPatch, "http://"+admin+"/tcp_lb/backends?"+query, body)
	if status == 200 {
		require.NoError(t, json.Unmarshal([]byte(text), &changed))
	}
	return status, changed, text
}

func TestPatchBackends(t *testing.T) {
	watchLeftovers(t)
	a, b := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := adminConfig(admin, web, lb, `"name":"web",`+checksDisabled+","+backendsJSON(a.address, b.address)+"}")
	runWithAdmin(t, config)
	forget := func() { patch(t, admin, "lb=web", `{"state":"ready","weight":null}`) } // it would outlive the test
	defer forget()
	open := hold(t, lb)         // to a
	eventually(t, func() bool { // a byte is counted when it is on its way to the client
		is := backendStatuses(t)[a.address]
		return is.ReceivedBytes > 0 && is.SentBytes > 0
	}, "the books rest")

	status, changed, body := patch(t, admin, "lb=web&address="+a.address, `{"state":"drain"}`)
	require.Equal(t, 200, status, body)
	require.Len(t, changed, 1)
	is := changed[0]
	require.Equal(t, []any{"web", a.address, "drain", int64(1), 0., true, uint64(1), uint64(0)},
		[]any{is.LB, is.Address, is.State, is.Weight, is.EffectiveWeight, is.Configured, is.Active, is.Connecting})
	require.Equal(t, is, backendStatuses(t)[a.address], "as GET shows it")
	before := a.acceptedCount()
	for range 10 {
		echoed(t, lb, 1)
	}
	require.Equal(t, before, a.acceptedCount(), "no new connections")
	write(t, open, "y")
	expect(t, open, "y")

	reload(t, replaceOnce(t, config, `"name":"web"`, `"name":"web","dial_timeout":"2s"`))
	require.Equal(t, "drain", backendStatuses(t)[a.address].State, "kept")

	// An address without a pool, and both fields at once; then a pool without an address.
	status, changed, body = patch(t, admin, "address="+b.address, `{"state":"ready","weight":256}`)
	require.Equal(t, 200, status, body)
	require.Len(t, changed, 1)
	require.EqualValues(t, 256, changed[0].EffectiveWeight)
	status, changed, body = patch(t, admin, "lb=web", `{"weight":0}`)
	require.Equal(t, 200, status, body)
	require.Len(t, changed, 2)
	for _, is := range changed {
		require.Zero(t, is.EffectiveWeight)
	}
	status, changed, _ = patch(t, admin, "lb=web", `{"state":"ready","weight":null}`)
	require.Equal(t, 200, status)
	for _, is := range changed {
		require.Equal(t, "ready", is.State)
		require.EqualValues(t, 1, is.EffectiveWeight)
	}

	// Of what is wrong nothing is taken.
	eventually(t, func() bool {
		held, short := backendStatuses(t)[a.address], backendStatuses(t)[b.address]
		return short.Active+short.Connecting == 0 && held.ReceivedBytes == 2 && held.SentBytes == 2
	}, "the short connections have ended, and all is counted")
	was := backendStatuses(t)
	for _, c := range []struct {
		query, body string
		status      int
		want        string
	}{
		{"lb=db", `{"state":"drain"}`, 404, "there is no such backend"},
		{"lb=web&address=10.0.0.1:1", `{"state":"drain"}`, 404, "there is no such backend"},
		{"", `{"state":"drain"}`, 400, "which backends? want lb, address or both"},
		{"lb=&address=", `{"state":"drain"}`, 400, "is empty: leave it out for all"},
		{"lb=web&address=", `{"state":"drain"}`, 400, `parameter \"address\" is empty: leave it out for all`},
		{"lb=web&client=10.0.0.1", `{"state":"drain"}`, 400, `unknown parameter \"client\"`},
		{"lb=web&address=db", `{"state":"drain"}`, 400, `address \"db\": want host:port`},
		{"lb=web", `{"state":"drain","weight":257}`, 400, "weight 257: want a number from 0 to 256, or null for the config's"},
		{"lb=web", `{"state":"drain","weight":-1}`, 400, "weight -1: want a number"},
		{"lb=web", `{"state":"drain","weight":1.5}`, 400, "weight 1.5: want a number"},
		{"lb=web", `{"state":"drain","weight":"3"}`, 400, `weight \"3\": want a number`},
		{"lb=web", `{"weight":3,"state":"draining"}`, 400, `unknown state \"draining\": did you mean drain? (there are drain, maint, ready)`},
		{"lb=web", `{"weight":3,"state":null}`, 400, "state null: want one of ready, drain, maint, in quotes"},
		{"lb=web", `{"state":"drain","wieght":3}`, 400, `unknown field \"wieght\": did you mean weight? (there are state, weight)`},
		{"lb=web", `{}`, 400, "nothing to change: want state, weight or both"},
		{"lb=web", ``, 400, "want an object such as"},
		{"lb=web", `null`, 400, "want an object such as"},
		{"lb=web", `[{"state":"drain"}]`, 400, "want an object such as"},
		{"lb=web", `{"state":"drain"`, 400, "want an object such as"},
		{"lb=web", `{"state":"drain"} {}`, 400, "want one object, and nothing after it"},
		{"lb=web", `{"state":"drain"` + strings.Repeat(" ", maxChange) + `}`, 400, "too large"},
	} {
		status, _, body := patch(t, admin, c.query, c.body)
		require.Equal(t, c.status, status, "%s %s: %s", c.query, c.body, body)
		require.Contains(t, body, c.want)
	}
	require.Equal(t, was, backendStatuses(t))
	w := httptest.NewRecorder()
	var refusal caddy.APIError
	require.ErrorAs(t, serveBackends(w, httptest.NewRequest(http.MethodPost, "/tcp_lb/backends", nil)), &refusal)
	require.Equal(t, http.StatusMethodNotAllowed, refusal.HTTPStatus)
	require.Equal(t, "GET, HEAD, PATCH", w.Header().Get("Allow"))
}

// One address in two pools is changed in both, or in the one that is named.
func TestPatchAnAddressInAllPools(t *testing.T) {
	s, other := freeAddress(t), freeAddress(t)
	admin := freeAddress(t)
	pool := func(name string) string {
		return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[%s]}]}`, name, freeAddress(t),
			withHandler(fmt.Sprintf(`"name":%q,`, name)+checksDisabled+","+backendsJSON(s, other)+"}"))
	}
	runWithAdmin(t, replaceOnce(t, layer4Config(pool("web")+","+pool("db")), `"disabled":true`, fmt.Sprintf(`"listen":%q`, admin)))
	defer patch(t, admin, "address="+s, `{"state":"ready"}`)
	_, changed, _ := patch(t, admin, "address="+s, `{"state":"maint"}`)
	require.Len(t, changed, 2)
	require.Equal(t, []string{"db", "web"}, []string{changed[0].LB, changed[1].LB})
	_, changed, _ = patch(t, admin, "lb=db&address="+s, `{"state":"ready"}`)
	require.Len(t, changed, 1)
	_, body := request(t, http.MethodGet, "http://"+admin+"/tcp_lb/backends?address="+s, "")
	var list []backendStatus
	require.NoError(t, json.Unmarshal([]byte(body), &list))
	require.Equal(t, []string{"ready", "maint"}, []string{list[0].State, list[1].State})
}

// Connecting counts connects under way, so that nobody takes a backend for empty
// to which a client is about to be connected.
func TestConnectingIsShown(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
	g.start()
	b := g.members()[0].Backend
	require.Equal(t, wasTaken, b.take())
	require.EqualValues(t, 1, b.status("").Connecting)
	require.Zero(t, b.status("").Active)
	s := &session{}
	b.enter(s)
	require.Zero(t, b.status("").Connecting)
	require.EqualValues(t, 1, b.status("").Active)
	b.leave(s, reasonClientClosed, 0)
	b.release()
	require.Zero(t, b.status("").Connecting)
}
