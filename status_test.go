package tcplb

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// statusConfig has a pool in a layer4 server, another in a listener of HTTP's, and
// the page with the options.
func statusConfig(t testing.TB, web, lb, first, second, options string) string {
	return healthConfig(t, web, lb, first, second, `{"match":[{"path":["/status"]}],"handle":[{"handler":"tcp_lb_status"`+options+`}]},`)
}

// statusHTML fetches the page.
func statusHTML(t testing.TB, url string) string {
	t.Helper()
	status, body := request(t, http.MethodGet, url, "")
	require.Equal(t, 200, status, body)
	return body
}

func TestStatusPage(t *testing.T) {
	a, b := echoServer(t), echoServer(t)
	web, lb := freeAddress(t), freeAddress(t)
	runCaddy(t, statusConfig(t, web, lb, `"name":"first",`+checksDisabled+`,"backends":[{"address":"192.0.2.1:1"}]}`,
		`"name":"second",`+fastChecks+","+backendsJSON(a.address, b.address)+"}", ""))
	url := "http://" + web + "/status"
	held := hold(t, lb)
	eventually(t, func() bool {
		return strings.Contains(statusHTML(t, url), "All 2 pools are well")
	}, "well")
	html := statusHTML(t, url)
	for _, want := range []string{">second<", ">first<", "192.0.2.1:1", a.address, b.address, "round_robin", `content="5"`} {
		require.Contains(t, html, want)
	}

	// The query chooses.
	require.NotContains(t, statusHTML(t, url+"?lb=first&refresh=off"), a.address)
	require.NotContains(t, statusHTML(t, url+"?lb=first&refresh=off"), "http-equiv")
	status, body := request(t, http.MethodGet, url+"?lb=third", "")
	require.Equal(t, 404, status)
	require.Contains(t, body, "There is no pool <b><bdi>third</bdi></b>")

	// A backend goes down, then the other: reason, time and who was turned away.
	a.kill()
	eventually(t, func() bool {
		html = statusHTML(t, url)
		return strings.Contains(html, "1 of 2 down ("+a.address+")")
	}, "told of")
	require.Contains(t, html, `check: connection refused`)
	b.kill()
	eventually(t, func() bool { return strings.Contains(statusHTML(t, url), "no backend available since") }, "told of")
	refused(t, lb)
	eventually(t, func() bool { return strings.Contains(statusHTML(t, url), "1 client turned away since") }, "counted")
	require.Contains(t, statusHTML(t, url+"?lb=second"), "<dt>Turned away: no_backend</dt><dd>1 <small>in 20m, 1 in all</small>", "at once")
	_ = held.Close()
}

// What is about the request but not about the state of pools.
func TestStatusPageIsGuarded(t *testing.T) {
	web := freeAddress(t)
	runCaddy(t, statusConfig(t, web, freeAddress(t), `"name":"first",`+checksDisabled+","+backendsJSON("192.0.2.1:1")+"}",
		`"name":"second",`+checksDisabled+","+backendsJSON("192.0.2.2:1")+"}", `,"refresh":0`))
	get := func(method string) (*http.Response, string) {
		resp, err := send(method, "http://"+web+"/status", "")
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp, string(body)
	}
	resp, html := get(http.MethodGet)
	require.Equal(t, 200, resp.StatusCode)
	require.NotContains(t, html, "http-equiv", "it is fetched once")
	headers := map[string]string{
		"Content-Security-Policy": statuspage.SecurityPolicy, "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
		"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
	}
	for name, want := range headers {
		require.Equal(t, want, resp.Header.Get(name), name)
	}
	require.Contains(t, statuspage.SecurityPolicy, "frame-ancestors 'none'")

	resp, body := get(http.MethodHead)
	require.Equal(t, 200, resp.StatusCode)
	require.Empty(t, body)
	require.Positive(t, resp.ContentLength)
	for name, want := range headers {
		require.Equal(t, want, resp.Header.Get(name), name)
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions} {
		resp, body = get(method)
		require.Equal(t, 405, resp.StatusCode, method)
		require.Equal(t, "GET, HEAD", resp.Header.Get("Allow"))
		require.NotContains(t, body, "192.0.2.1")
	}
}

// A page of some pools tells nothing of the others.
func TestStatusPageOfNamedPools(t *testing.T) {
	web := freeAddress(t)
	first := `"name":"first",` + checksDisabled + "," + backendsJSON("192.0.2.1:1") + "}"
	second := `"name":"second",` + checksDisabled + "," + backendsJSON("192.0.2.2:1") + "}"
	noPoolsYet(t)
	err := loadOnce(statusConfig(t, web, freeAddress(t), first, second, `,"pools":["frist"]`))
	require.ErrorContains(t, err, `tcp_lb_status: unknown pool "frist": did you mean first? (there are first, second)`)
	require.ErrorContains(t, loadOnce(statusConfig(t, web, freeAddress(t), first, second, `,"pools":["first","first"]`)), `tcp_lb_status: pool "first" is listed twice`)
	require.ErrorContains(t, loadOnce(statusConfig(t, web, freeAddress(t), first, second, `,"refresh":"10ms"`)), "tcp_lb_status: refresh 10ms: want a duration from 1s to 1h0m0s, or 0 for never")
	require.Zero(t, recordings(), "no config that failed has histories recorded")

	t.Setenv("TCPLB_TEST_POOL", "first")
	runCaddy(t, statusConfig(t, web, freeAddress(t), first, second, `,"pools":["{env.TCPLB_TEST_POOL}"]`))
	html := statusHTML(t, "http://"+web+"/status")
	require.Contains(t, html, "192.0.2.1:1")
	require.NotContains(t, html, ">second<")
	require.NotContains(t, html, "192.0.2.2")
	status, body := request(t, http.MethodGet, "http://"+web+"/status?lb=second", "")
	require.Equal(t, 404, status)
	require.NotContains(t, body, "192.0.2.2")
}

// recordings is how many configs have histories recorded.
func recordings() int {
	recent.mu.Lock()
	defer recent.mu.Unlock()
	return recent.users
}

// A pool that has left the config is there as long as its connections are, also on
// the page of a config without any other.
func TestStatusPageOfWhatHasLeft(t *testing.T) {
	s := echoServer(t)
	web, lb := freeAddress(t), freeAddress(t)
	config := func(name string) string {
		return strings.Replace(lbConfig(lb, `"name":"`+name+`",`+checksDisabled+","+backendsJSON(s.address)+"}"), `"apps":{`,
			fmt.Sprintf(`"apps":{"http":{"servers":{"web":{"listen":[%q],"protocols":["h1"],"automatic_https":{"disable":true},"routes":[{"handle":[{"handler":"tcp_lb_status"}]}]}}},`, web), 1)
	}
	runCaddy(t, config("old"))
	c := hold(t, lb)
	require.Equal(t, 1, recordings())
	reload(t, config("new"))
	require.Equal(t, 1, recordings())
	html := statusHTML(t, "http://"+web+"/status")
	require.Contains(t, html, "left the config, 1 connection is drained until")
	require.Contains(t, html, "leaving")
	require.Contains(t, html, "left the config</td>")
	_ = c.Close()
	eventually(t, func() bool { return !strings.Contains(statusHTML(t, "http://"+web+"/status"), "leaving") }, "gone")
}

// Readers share a page that is a moment old at most, and each sees its own view.
func TestStatusPagesAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Name, h.Backends = "web", backendList(one, two) })
		g.start()
		m := newPageMaker(nil, 0)
		get := func(v statuspage.View) string {
			status, body, err := m.get(t.Context(), v)
			require.NoError(t, err)
			require.Equal(t, 200, status)
			return string(body)
		}
		first := get(statuspage.View{})
		require.Equal(t, first, get(statuspage.View{}))
		made := m.page
		require.NotEqual(t, first, get(statuspage.View{Paused: true}), "the links of another view are others")
		for i := range 2 * maxPages {
			_, _, err := m.get(t.Context(), statuspage.View{LB: fmt.Sprint("nobody-", i)})
			require.NoError(t, err)
			get(statuspage.View{Sort: fmt.Sprint(i)})
		}
		require.Len(t, m.made, maxPages)
		require.Same(t, made, m.page)
		time.Sleep(pageAge - time.Millisecond)
		get(statuspage.View{})
		require.Same(t, made, m.page)
		time.Sleep(time.Millisecond)
		get(statuspage.View{})
		require.NotSame(t, made, m.page)
	})
}

// stuckWriter is a reader that takes nothing until it is let go.
type stuckWriter struct {
	*httptest.ResponseRecorder
	writing chan<- struct{}
	letGo   <-chan struct{}
}

func (w *stuckWriter) Write(b []byte) (int, error) {
	w.writing <- struct{}{}
	<-w.letGo
	return w.ResponseRecorder.Write(b)
}

// Ten thousand readers that take nothing hold up nobody: neither other readers, nor
// the pools.
func TestSlowReadersOfTheStatusPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Name, h.Backends = "web", backendList(one, two) })
		g.start()
		h := &StatusHandler{pages: newPageMaker(nil, 0)}
		const readers = 10_000
		writing, letGo := make(chan struct{}, readers), make(chan struct{})
		var wg sync.WaitGroup
		for range readers {
			wg.Go(func() {
				w := &stuckWriter{httptest.NewRecorder(), writing, letGo}
				_ = h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil), nil)
			})
		}
		for range readers {
			<-writing
		}
		drained, ready := stateDrain, stateReady
		_, err := registry.setByHand("web", one, handChange{state: &drained})
		require.NoError(t, err)
		time.Sleep(pageAge)
		w := httptest.NewRecorder()
		require.NoError(t, h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil), nil))
		require.Contains(t, w.Body.String(), "1 of 2 drained by hand ("+one+")")
		close(letGo)
		wg.Wait()
		_, err = registry.setByHand("web", one, handChange{state: &ready})
		require.NoError(t, err)
	})
}

// Whoever leaves while others have their turn waits no longer.
func TestReaderOfTheStatusPageLeaves(t *testing.T) {
	m := newPageMaker(nil, 0)
	m.turn <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := m.get(ctx, statuspage.View{})
	require.ErrorIs(t, err, context.Canceled)
	<-m.turn
	_, _, err = m.get(t.Context(), statuspage.View{})
	require.NoError(t, err)
}

// What was set by hand is shown with the time since when, over reloads.
func TestStateSinceWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		load := func() *generation {
			g, _ := testGeneration(t, f, func(h *Handler) { h.Name, h.Backends = "web", backendList(one, two) })
			g.start()
			return g
		}
		since := func() time.Time {
			for _, p := range statusPage(nil, 0).Pools {
				if p.Name == "web" {
					return p.Backends[0].StateSince
				}
			}
			return time.Time{}
		}
		set := func(c handChange) {
			_, err := registry.setByHand("web", one, c)
			require.NoError(t, err)
		}
		g := load()
		require.True(t, since().IsZero())
		began, drain, maint, ready := time.Now(), stateDrain, stateMaint, stateReady
		set(handChange{state: &drain})
		time.Sleep(time.Hour)
		set(handChange{state: &drain, weight: new(3)})
		next := load()
		g.stop()
		require.True(t, since().Equal(began))
		time.Sleep(time.Hour)
		set(handChange{state: &maint})
		require.True(t, since().Equal(time.Now()))
		set(handChange{state: &ready, resetWeight: true})
		require.True(t, since().IsZero())
		require.Equal(t, hand{}, next.members()[0].Backend.byHand(), "nothing is left of it")
	})
}

func TestStatusDirective(t *testing.T) {
	for text, want := range map[string]string{
		"tcp_lb_status": `{}`,
		"tcp_lb_status {\n\trefresh 10s\n\tpools a \"b c\"\n}": `{"pools":["a","b c"],"refresh":10000000000}`,
		"tcp_lb_status {\n\trefresh off\n}":                    `{"refresh":0}`,
		"tcp_lb_status web":                                    `unexpected "web": pools are named in the block, pools web`,
		"tcp_lb_status {\n\trefesh 1s\n}":                      `unknown option "refesh": did you mean refresh? (there are pools, refresh)`,
		"tcp_lb_status {\n\trefresh\n}":                        "refresh: want one duration such as 5s, or off",
		"tcp_lb_status {\n\trefresh 5\n}":                      `refresh "5": want a duration such as 5s, or off`,
		"tcp_lb_status {\n\trefresh 10ms\n}":                   "refresh 10ms: want a duration from 1s to 1h0m0s, or 0 for never",
		"tcp_lb_status {\n\trefresh 5s\n\trefresh 6s\n}":       "refresh is there twice",
		"tcp_lb_status {\n\tpools\n}":                          "pools: want names of pools",
		"tcp_lb_status {\n\tpools \"\"\n}":                     "pools: want names of pools",
		"tcp_lb_status {\n\tpools a\n\tpools b\n}":             "pools is there twice",
		"tcp_lb_status {\n\tpools a {\n\t\tx\n\t}\n}":          "pools takes no block",
	} {
		t.Run(text, func(t *testing.T) {
			var h StatusHandler
			err := h.UnmarshalCaddyfile(caddyfile.NewTestDispenser(text))
			if strings.HasPrefix(want, "{") {
				require.NoError(t, err)
				got, err := json.Marshal(h)
				require.NoError(t, err)
				require.JSONEq(t, want, string(got))
				return
			}
			require.ErrorContains(t, err, want)
			require.ErrorContains(t, err, "Testfile:")
		})
	}
}

// However they are written, the page leaves to others what they answer, and comes
// before what answers all.
func TestStatusPageAmongOthers(t *testing.T) {
	web := freeAddress(t)
	config, err := adapt(t, fmt.Sprintf("{\n\tadmin off\n\tpersist_config off\n\tlayer4 {\n\t\t%s {\n\t\t\troute {\n\t\t\t\ttcp_lb 192.0.2.1:1 {\n\t\t\t\t\thealth_interval off\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n\nhttp://%s {\n\trespond 410\n\ttcp_lb_status {\n\t\trefresh off\n\t}\n\ttcp_lb_health /health\n}\n", freeAddress(t), web))
	require.NoError(t, err)
	runCaddy(t, config)
	for path, want := range map[string]string{"/health": `"status":"ok"`, "/": "<!doctype html>", "/what/ever": "<!doctype html>"} {
		require.Contains(t, statusHTML(t, "http://"+web+path), want)
	}
}

// The sites of the documentation load, beside the pools that they name.
func TestStatusDocumentation(t *testing.T) {
	t.Setenv("OPS_PASSWORD_HASH", "$2a$04$fJAY5UB.0KOXumGHLMDRFeDVK3Vq8NhTPGO3TDxqbixGzyZxPR7yG") // of "not a secret"
	blocks := fenced(t, "docs/status.md", "caddyfile")
	require.Len(t, blocks, 3)
	for _, site := range blocks {
		config, err := adapt(t, "{\n\tlayer4 {\n\t\ttcp_lb/:8080 {\n\t\t\troute {\n\t\t\t\ttcp_lb 192.0.2.1:1 {\n\t\t\t\t\tname web\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t\ttcp_lb/:8081 {\n\t\t\troute {\n\t\t\t\ttcp_lb 192.0.2.1:1 {\n\t\t\t\t\tname db\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n\n"+site)
		require.NoError(t, err)
		require.Contains(t, config, `"handler":"tcp_lb_status"`)
		require.NoError(t, validate(t, config))
	}
}

// The pages of the quick start and of the container stack are there by the names of
// this machine alone: by one that a hostile site has for it, its script could read
// them. Metrics and health are there for all.
func TestPageIsThereByItsNamesOnly(t *testing.T) {
	for _, file := range []string{"examples/quickstart/Caddyfile", "docker/balancer/Caddyfile"} {
		t.Run(file, func(t *testing.T) {
			const site = "http://:9090 {\n"
			text := readFile(t, file)
			require.Contains(t, text, site)
			web := freeAddress(t)
			start := "{\n\tadmin off\n\tpersist_config off\n}\nhttp://:" + web[strings.LastIndexByte(web, ':')+1:] + " {\n"
			text = start + strings.TrimPrefix(text[strings.Index(text, site):], site)
			if !strings.Contains(text, "bind 127.0.0.1") {
				text = strings.Replace(text, start, start+"\tbind 127.0.0.1\n", 1)
			}
			config, err := adapt(t, text)
			require.NoError(t, err)
			runCaddy(t, config)
			get := func(host, path string) string {
				r, err := http.NewRequest(http.MethodGet, "http://"+web+path, nil)
				require.NoError(t, err)
				r.Host = host
				resp, err := (&http.Client{Timeout: hangTimeout, Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
				require.NoError(t, err)
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				require.NoError(t, err)
				return string(body)
			}
			for host, ours := range map[string]bool{
				"localhost": true, "localhost:9090": true, "LocalHost:9090": true, "127.0.0.1": true, "127.0.0.1:9090": true,
				"hostile.example": false, "hostile.example:9090": false, "127.0.0.1.hostile.example": false, "localhost.hostile.example:9090": false, "balancer:9090": false,
			} {
				require.Equal(t, ours, strings.Contains(get(host, "/"), "<h1>tcp_lb"), host)
				require.True(t, strings.Contains(get(host, "/metrics"), "tcp_lb_max_open_files"), host)
				require.Contains(t, get(host, "/health"), `"pools"`, host)
			}
		})
	}
}
