package tcplb

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

// reporterFunc tells how it fares, and finds nothing.
type reporterFunc func() discovery.Status

func (f reporterFunc) Status() discovery.Status { return f() }

// TestSourcesThatTell has modules of somebody else's, of which a scrape must not
// suffer.
func TestSourcesThatTell(t *testing.T) {
	watchLeftovers(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, `"name":"web",`+backendsJSON(namedServer(t, "a").address)+"}"))
	g := registry.snapshot()[0].newest.Load()
	g.sources = []*dynamicSource{
		{name: "bad\xff", reporter: reporterFunc(func() discovery.Status { panic("not today") })},
		{name: "odd", reporter: reporterFunc(func() discovery.Status {
			return discovery.Status{Source: "another name", Backends: 3, Lookups: map[string]uint64{discovery.StatusSuccess: 2, "of its own": 7}}
		})},
		{name: "silent"},
	}
	t.Cleanup(func() { g.sources = nil })
	require.EqualValues(t, 1, metric(t, "source_failing", labels("lb", "web", "source", "bad?")))
	require.Zero(t, metric(t, "source_failing", labels("lb", "web", "source", "odd")))
	require.EqualValues(t, 3, metric(t, "source_backends", labels("lb", "web")))
	require.EqualValues(t, 2, metric(t, "source_lookups_total", labels("lb", "web")), "of what has a meaning")
	require.Len(t, poolSummaries(t)["web"].Sources, 2)
	require.Equal(t, "it can't tell", poolSummaries(t)["web"].Sources[0].Error)
}
