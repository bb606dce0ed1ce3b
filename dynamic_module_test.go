package tcplb

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

// testSource is a module that finds what foundByTest has.
type testSource struct {
	Key string `json:"key,omitempty"`
}

var foundByTest struct {
	sync.Mutex
	changed chan struct{}
	list    []discovery.Found
	runs    int
}

func (*testSource) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: discovery.Namespace + ".tcp_lb_test", New: func() caddy.Module { return new(testSource) }}
}

func (s *testSource) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	d.Args(&s.Key)
	return nil
}

func (s *testSource) Run(ctx context.Context, update func([]discovery.Found)) {
	foundByTest.Lock()
	foundByTest.runs++
	foundByTest.Unlock()
	for {
		foundByTest.Lock()
		changed, list := foundByTest.changed, foundByTest.list
		foundByTest.Unlock()
		if len(list) > 0 {
			update(list)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (s *testSource) Status() discovery.Status {
	return discovery.Status{Source: "tcp_lb_test" + s.Key, Lookups: map[string]uint64{discovery.StatusSuccess: 1}}
}

func find(addresses ...string) {
	foundByTest.Lock()
	defer foundByTest.Unlock()
	if foundByTest.changed != nil {
		close(foundByTest.changed)
	}
	foundByTest.changed, foundByTest.list, foundByTest.runs = make(chan struct{}), foundAt(addresses...), 0
}

func init() { caddy.RegisterModule(new(testSource)) }

// A pool may have nothing but sources: its clients wait for the first backend, and
// connections to one that is gone get their drain timeout.
func TestPoolOfSourcesOnly(t *testing.T) {
	watchLeftovers(t)
	find()
	a, b := echoServer(t), echoServer(t)
	admin, web, lb := freeAddress(t), freeAddress(t), freeAddress(t)
	config := adminConfig(admin, web, "tcp_lb/"+lb, `"name":"web","dynamic_backends":[{"source":"tcp_lb_test"}],"drain_timeout":"100ms",
		"load_balancing":{"try_duration":"1h","try_interval":"1h"}}`)
	var parsed caddy.Config
	require.NoError(t, caddy.StrictUnmarshalJSON([]byte(config), &parsed))
	require.NoError(t, caddy.Validate(&parsed))
	foundByTest.Lock()
	require.Zero(t, foundByTest.runs, "one that is only validated asks nobody")
	foundByTest.Unlock()

	runWithAdmin(t, config)
	status, body := request(t, http.MethodGet, "http://"+web+"/health", "")
	require.Equal(t, 503, status)
	require.JSONEq(t, `{"status":"unavailable","pools":[{"name":"web","available":0,"total":0}]}`, body)
	c := dialClient(t, lb)
	_, err := io.WriteString(c, "x")
	require.NoError(t, err)
	eventually(t, func() bool { return registry.snapshot()[0].waiters.n.Load() == 1 }, "the client waits")
	find(a.address)
	expect(t, c, "x")
	checked(t)
	eventually(t, func() bool {
		status, _ := request(t, http.MethodGet, "http://"+web+"/health", "")
		return status == 200
	}, "available")

	for range 3 { // a reload takes nothing away
		reload(t, strings.Replace(config, `"try_duration":"1h"`, `"try_duration":"0s"`, 1))
		hold(t, lb)
	}
	find(b.address)
	expectReset(t, c)
	eventually(t, func() bool { return len(backendStatuses(t)) == 1 }, "nothing is left of the first")
	hold(t, lb)
	require.EqualValues(t, 1, backendStatuses(t)[b.address].Active)
}

// What is wrong with sources is refused at load.
func TestSourcesAreRefused(t *testing.T) {
	for name, c := range map[string]struct{ sources, want string }{
		"no list":   {`{"source":"a"}`, `dynamic_backends {"source":"a"}: want a list such as [{"source":"a"`},
		"no object": {`["a"]`, `dynamic_backends "a": want a list such as [{"source":"a"`},
		"no name":   {`[{"name":"x"}]`, `dynamic_backends {"name":"x"}: want a list such as [{"source":"a"`},
		"unknown":   {`[{"source":"aaaa"}]`, `dynamic_backends: unknown source "aaaa": did you mean a?`},
		"twice":     {`[{"source":"tcp_lb_test"},{ "source": "tcp_lb_test" }]`, `listed twice`},
		"the same":  {`[{"source":"a","name":"x","port":1},{"source":"a","name":"x","port":1,"refresh":"5s"}]`, `source "a x 1" is listed twice`},
		"its own":   {`[{"source":"a","name":"x","port":0}]`, `port`},
	} {
		t.Run(name, func(t *testing.T) {
			err := loadOnce(lbConfig(freeAddress(t), `"dynamic_backends":`+c.sources+"}"))
			require.ErrorContains(t, err, c.want)
		})
	}
	err := loadOnce(lbConfig(freeAddress(t), `"dynamic_upstreams":[]}`))
	require.ErrorContains(t, err, `did you mean dynamic_backends?`)
}

// Sources that tell how they fare are shown with their pool, and counted.
func TestSourcesAreShown(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
	s := newToldSource()
	d := has(g, s)
	d.name, d.reporter = "a db.internal 80", telling{}
	has(g, newToldSource()).name = "silent"
	broken := has(g, newToldSource())
	broken.name, broken.reporter = "broken", reporting{} // calls nil
	g.start()
	(<-s.update)(foundAt(two))
	statuses := registry.snapshot()[0].summary().Sources
	require.Len(t, statuses, 2)
	require.Equal(t, []string{"a db.internal 80", "broken"}, []string{statuses[0].Source, statuses[1].Source})
	require.EqualValues(t, 3, metric(t, "source_lookups_total", labels("lb", t.Name(), "source", "a db.internal 80", "status", "failure")))
	require.Equal(t, "a db.internal 80", backendStatuses(t)[two].Source)
	require.Empty(t, backendStatuses(t)[one].Source)
	problems, err := testutil.GatherAndLint(gathererOf(collector{}))
	require.NoError(t, err)
	require.Empty(t, problems)
}

type telling struct{}

func (telling) Status() discovery.Status {
	return discovery.Status{Source: "anything", Lookups: map[string]uint64{discovery.StatusFailure: 3}}
}

// A name that has its address from the hosts file serves, and the pool's own
// listener does not become its backend, whatever a name server says.
func TestDynamicA(t *testing.T) {
	watchLeftovers(t)
	s := echoServer(t)
	lb, circle := freeAddress(t), freeAddress(t)
	_, port, _ := net.SplitHostPort(s.address)
	_, own, _ := net.SplitHostPort(circle)
	config, err := adapt(t, fmt.Sprintf(`{
	admin off
	persist_config off
	log default {
		level PANIC
	}
	layer4 {
		%s {
			route {
				tcp_lb {
					name found
					dynamic a localhost %s {
						versions ipv4
					}
				}
			}
		}
		%s {
			route {
				tcp_lb {
					name circle
					dynamic a localhost %s {
						versions ipv4
					}
				}
			}
		}
	}
}
`, lb, port, circle, own))
	require.NoError(t, err)
	runCaddy(t, config)
	eventually(t, func() bool { return metric(t, "source_lookups_total", labels("status", "success")) == 2 }, "both were looked up")
	eventually(t, func() bool { return len(backendStatuses(t)) == 1 }, "found")
	hold(t, lb)
	require.EqualValues(t, 1, backendStatuses(t)[s.address].Active)
	require.Equal(t, "a localhost "+port, backendStatuses(t)[s.address].Source)
	refused(t, circle)
	require.Empty(t, registry.newest("circle").members())
}
