package tcplb

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Without checks a backend that refuses everybody is not called healthy.
func TestUncheckedBackend(t *testing.T) {
	noPoolsYet(t)
	dead := freeAddress(t)
	lb := freeAddress(t)
	config := func(checks string) string { return lbConfig(lb, `"name":"web",`+checks+","+backendsJSON(dead)+"}") }
	runCaddy(t, config(checksDisabled))
	of := labels("backend", dead)
	s := backendStatuses(t)[dead]
	require.Equal(t, "unchecked", s.Health)
	require.True(t, s.Healthy, "connections may go to it")
	require.Nil(t, s.LastConnect)
	require.Zero(t, metric(t, "backend_checked", of))

	_, err := ask(lb)
	require.NoError(t, err)
	s = backendStatuses(t)[dead]
	require.Equal(t, "unchecked", s.Health)
	require.Contains(t, s.LastConnectError, "refused")
	require.NotNil(t, s.LastConnect)
	require.WithinDuration(t, time.Now(), *s.LastConnect, hangTimeout)

	reload(t, config(fastChecks))
	eventually(t, func() bool { return backendStatuses(t)[dead].Health == "down" }, "checked")
	require.Equal(t, 1.0, metric(t, "backend_checked", of))
	reload(t, config(checksDisabled))
	require.Equal(t, "unchecked", backendStatuses(t)[dead].Health, "what checks found out is no news any more")
	require.Zero(t, metric(t, "backend_checked", of))
}

func TestUncheckedUntilTheFirstProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		f.latency = time.Second
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		b := g.members()[0].Backend
		synctest.Wait()
		require.Equal(t, "unchecked", b.health())
		time.Sleep(1100 * time.Millisecond)
		require.Equal(t, "up", b.health())
		l, err := connect(g)
		require.NoError(t, err)
		l.release()
		require.Empty(t, b.status("").LastConnectError)
		f.fail(one, errRefused)
		_, err = connect(g)
		require.Error(t, err)
		require.Equal(t, time.Now().UTC(), *b.status("").LastConnect)
		require.Equal(t, "refused", b.status("").LastConnectError)
		time.Sleep(3 * time.Second)
		require.Equal(t, "down", b.health())
		require.Equal(t, "refused", b.status("").LastConnectError)
		f.fail(one, nil)
		_, err = connect(g) // which has it probed: each probe takes a second
		require.Error(t, err)
		time.Sleep(5 * time.Second)
		require.Equal(t, "up", b.health())
		l, err = connect(g)
		require.NoError(t, err)
		l.release()
		require.Empty(t, b.status("").LastConnectError, "it worked")
	})
}

// Without checks it is the next connect that tells that an error is over; no page
// calls it a check's.
func TestConnectErrorWithoutChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			checksOff(h)
		})
		g.start()
		b := g.members()[0].Backend
		f.fail(one, errRefused)
		_, err := connect(g)
		require.Error(t, err)
		require.Equal(t, "refused", b.status("").LastError)
		require.Empty(t, b.pageStatus(true).CheckError)
		require.Equal(t, "refused", b.pageStatus(true).ConnectError)
		f.fail(one, nil)
		l, err := connect(g)
		require.NoError(t, err)
		l.release()
		require.Empty(t, b.status("").LastError, "it worked")
		require.Empty(t, b.status("").LastConnectError)
	})
}

// What this side lacks says nothing of a backend: neither that it refuses, nor that
// it no longer does.
func TestScarcityIsNoConnectOfTheBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		synctest.Wait()
		b := g.members()[0].Backend
		require.True(t, b.isChecked())
		f.fail(one, shortageErrnos[0])
		_, err := connect(g)
		require.Error(t, err)
		require.Nil(t, b.status("").LastConnect)
		require.Empty(t, b.status("").LastConnectError)
		require.NotEmpty(t, b.status("").LastError, "but it is told")
		require.EqualValues(t, 1, b.stats.dialErrors())

		// A check that can't be made is not one that failed, but says why there is none.
		b.forgetChecks()
		b.checking.Load().judged.Store(false)
		time.Sleep(time.Minute)
		require.Equal(t, "unchecked", b.health())
		require.NotEmpty(t, b.pageStatus(true).CheckError)
	})
}

// poolSummaries is what GET /tcp_lb/pools answers.
func poolSummaries(t testing.TB) map[string]poolSummary {
	t.Helper()
	w := httptest.NewRecorder()
	require.NoError(t, servePools(w, httptest.NewRequest(http.MethodGet, "/tcp_lb/pools", nil)))
	var list []poolSummary
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &list))
	byName := make(map[string]poolSummary, len(list))
	for _, s := range list {
		byName[s.LB] = s
	}
	return byName
}

func TestPoolsEndpoint(t *testing.T) {
	noPoolsYet(t)
	a, b := echoServer(t), echoServer(t)
	dead := freeAddress(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := func(addresses ...string) string {
		return adminConfig(admin, web, lb, `"name":"web","max_connections":2,`+checksDisabled+","+backendsJSON(addresses...)+"}")
	}
	runWithAdmin(t, config(a.address, dead, b.address))
	const rounds = 6
	for range rounds {
		echoed(t, lb, 100)
	}
	eventually(t, func() bool { return open.n.Load() == 0 }, "room for two")
	held := []interface{ Close() error }{hold(t, lb), hold(t, lb)}
	refused(t, lb)
	eventually(t, func() bool {
		s := poolSummaries(t)["web"]
		return s.Active == 2 && s.MaxConnections == 1 && s.ReceivedBytes == rounds*100+2 && s.SentBytes == rounds*100+2
	}, "counted")
	s := poolSummaries(t)["web"]
	require.Equal(t, 3, s.Backends)
	require.Equal(t, 3, s.Available)
	require.Zero(t, s.Draining)
	require.EqualValues(t, rounds+2, s.ConnectionsTotal)
	require.Equal(t, metric(t, "connection_errors_total", labels("error_type", "dial_refused")), float64(s.ErrorsTotal))
	require.Positive(t, s.ErrorsTotal)
	require.Equal(t, metric(t, "retries_total", nil), float64(s.RetriesTotal))

	// Two backends leave, one with a connection: the sums don't fall.
	status, body := request(t, http.MethodPost, "http://"+admin+"/load", config(a.address))
	require.Equal(t, 200, status, body)
	status, body = request(t, http.MethodGet, "http://"+admin+"/tcp_lb/pools", "")
	require.Equal(t, 200, status)
	var after []poolSummary
	require.NoError(t, json.Unmarshal([]byte(body), &after))
	require.Len(t, after, 1)
	s.Backends, s.Available, s.Draining = 1, 1, 1
	s.EffectiveWeight, s.States = 1, map[string]int{"ready": 1, "drain": 0, "maint": 0}
	require.Equal(t, s, after[0])
	for _, c := range held {
		require.NoError(t, c.Close())
	}
	eventually(t, func() bool { return poolSummaries(t)["web"].Draining == 0 }, "drained")
	s.Active, s.Draining = 0, 0
	require.Equal(t, s, poolSummaries(t)["web"])
	status, _ = request(t, http.MethodDelete, "http://"+admin+"/tcp_lb/pools", "")
	require.Equal(t, 405, status)
}

func TestPoolsEndpointCountsClientsWithoutABackend(t *testing.T) {
	noPoolsYet(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, `"name":"web",`+fastChecks+","+backendsJSON(freeAddress(t))+"}"))
	checked(t)
	refused(t, lb)
	eventually(t, func() bool { return poolSummaries(t)["web"].NoBackend == 1 }, "counted")
	require.Zero(t, poolSummaries(t)["web"].Available)
}

// The weight of a backend is set by POST whether the config has one, as JSON may,
// or not, as one from a Caddyfile; PATCH wants one to be there.
func TestWeightThroughTheConfigAPI(t *testing.T) {
	readme := readFile(t, "examples/json/README.md")
	require.NotContains(t, readme, "curl -X PATCH")
	require.Contains(t, readme, "$ curl -X POST -H 'Content-Type: application/json' -d 3 \\\n    http://localhost:2019/config/apps/layer4/servers/srv0/routes/0/handle/0/backends/0/weight\n")
	for _, born := range []string{"Caddyfile", "JSON"} {
		t.Run(born, func(t *testing.T) {
			a, b := namedServer(t, "a"), namedServer(t, "b")
			admin, lb := freeAddress(t), freeAddress(t)
			config, err := adapt(t, fmt.Sprintf("{\n\tadmin %s\n\tpersist_config off\n\tlayer4 {\n\t\ttcp_lb/%s {\n\t\t\troute {\n\t\t\t\ttcp_lb %s %s {\n\t\t\t\t\tname web\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n", admin, lb, a.address, b.address))
			require.NoError(t, err)
			if born == "JSON" {
				config = replaceOnce(t, config, fmt.Sprintf(`{"address":%q}`, a.address), fmt.Sprintf(`{"address":%q,"weight":1}`, a.address))
			}
			runWithAdmin(t, config)
			path := "http://" + admin + "/config/apps/layer4/servers/srv0/routes/0/handle/0/backends/0"
			for _, weight := range []string{"3", "2"} {
				status, body := request(t, http.MethodPost, path+"/weight", weight)
				require.Equal(t, 200, status, body)
				require.Equal(t, weight, fmt.Sprint(backendStatuses(t)[a.address].Weight))
			}
			status, body := request(t, http.MethodPost, path+"/weight", "300")
			require.GreaterOrEqual(t, status, 400)
			require.Contains(t, body, "weight 300: want a number from 0 to 256")
			require.EqualValues(t, 2, backendStatuses(t)[a.address].Weight)
			// A whole backend is replaced by PATCH, and added and taken out.
			status, body = request(t, http.MethodPatch, path, fmt.Sprintf(`{"address":%q,"weight":5}`, a.address))
			require.Equal(t, 200, status, body)
			require.EqualValues(t, 5, backendStatuses(t)[a.address].Weight)
			status, body = request(t, http.MethodDelete, path, "")
			require.Equal(t, 200, status, body)
			require.NotContains(t, backendStatuses(t), a.address)
			status, body = request(t, http.MethodPost, "http://"+admin+"/config/apps/layer4/servers/srv0/routes/0/handle/0/backends", fmt.Sprintf(`{"address":%q}`, a.address))
			require.Equal(t, 200, status, body)
			require.EqualValues(t, 1, backendStatuses(t)[a.address].Weight)
		})
	}
}
