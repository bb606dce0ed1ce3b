package statuspage

import (
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestViews(t *testing.T) {
	for query, want := range map[string]View{
		"":                                   {},
		"lb=web&sort=open&all=1&refresh=off": {LB: "web", Sort: "open", All: true, Paused: true},
		"lb=a+%26b&sort=nonsense&refresh=1&x=%00": {LB: "a &b"},
	} {
		q, err := url.ParseQuery(query)
		require.NoError(t, err)
		v := ParseView(q)
		require.Equal(t, want, v)
		again, err := url.ParseQuery(v.link()[1:])
		require.NoError(t, err)
		require.Equal(t, v, ParseView(again), "a link leads to what it was made of")
	}
}

func addresses(list []*Backend) (names []string) {
	for _, b := range list {
		names = append(names, b.Address)
	}
	return names
}

func TestOrders(t *testing.T) {
	p := pool("web",
		backend("c:1", func(b *Backend) { b.Open, b.EffectiveWeight, b.Total.Errors, b.Checked = 1, 3, 7, noon }),
		backend("a:1", func(b *Backend) { b.Open, b.Pace, b.State = 3, &Pace{Connections: 90, Sent: 1}, "drain" }),
		backend("b:1", down, func(b *Backend) { b.Open, b.Pace = 2, &Pace{Connections: 1, Received: 9e9} }))
	for order, want := range map[string][]string{
		"": {"b:1", "a:1", "c:1"}, "address": {"a:1", "b:1", "c:1"}, "open": {"a:1", "b:1", "c:1"}, "weight": {"c:1", "a:1", "b:1"},
		"failed": {"c:1", "a:1", "b:1"}, "checked": {"a:1", "b:1", "c:1"}, "state": {"a:1", "c:1", "b:1"}, "new": {"a:1", "c:1", "b:1"}, "traffic": {"b:1", "c:1", "a:1"},
	} {
		require.Equal(t, want, addresses(p.sorted(View{Sort: order}, noon)), order)
	}
	require.Len(t, orders, 8, "each is above")
	require.Equal(t, "c:1", p.Backends[0].Address, "the page's own order is as it was")
	sorted := 0
	for _, c := range columns(View{Sort: "open"}) {
		if c.Sorted != "" {
			require.Equal(t, "Open", c.Title)
			sorted++
		}
	}
	require.Equal(t, 1, sorted)
}

// Where there are many, those that are well are a line, and every one that is left
// out is counted.
func TestManyBackends(t *testing.T) {
	for name, c := range map[string]struct {
		page        *Page
		view        View
		rows        int
		hidden, all string
	}{
		"few":                    {many(25), View{}, 25, "", ""},
		"many":                   {many(1000), View{}, 10, "990 backends are well", "?all=1&lb=web"},
		"all of them":            {many(1000), View{All: true}, 1000, "", ""},
		"by their connections":   {many(1000), View{Sort: "open"}, 1000, "", ""},
		"more than fit":          {many(10_000), View{All: true}, 1000, "9,000 more", ""},
		"more troubles than fit": {many(200_000), View{}, 1000, "199,000 more", ""},
		"beside another pool":    {page(many(1000).Pools[0], pool("x", backend("a:1"))), View{}, 10, "990 backends are well", "?all=1&lb=web"},
		"beside one, by address": {page(many(1000).Pools[0], pool("x", backend("a:1"))), View{Sort: "address"}, 25, "975 more", "?lb=web&sort=address"},
	} {
		t.Run(name, func(t *testing.T) {
			s := c.page.document(c.view).Sections[0]
			require.Len(t, s.Rows, c.rows)
			require.Equal(t, c.hidden, s.Hidden)
			require.Equal(t, c.all, s.ShowAll)
		})
	}
}

// Of very many pools the troubled are shown in full, all are in the table, and
// what is told of the others leads nowhere on the page.
func TestManyPools(t *testing.T) {
	var pools []Pool
	for i := range 200 {
		p := pool(fmt.Sprintf("pool-%03d", i), backend("a:1"))
		if i >= 150 {
			p = pool(p.Name, backend("a:1", down), backend("b:1"))
		}
		pools = append(pools, p)
	}
	d := page(pools...).document(View{})
	require.Len(t, d.Overview, 200)
	require.Len(t, d.Sections, maxPools)
	require.Equal(t, 175, d.Omitted)
	require.Equal(t, "pool-150", d.Sections[0].Name)
	require.Len(t, d.Problems, maxProblems)
	require.Equal(t, 30, d.More)
	anchors := make(map[string]bool)
	for _, s := range d.Sections {
		anchors["#"+s.Anchor] = true
	}
	for _, p := range d.Problems {
		require.True(t, anchors[p.Anchor], p.Pool)
	}
}

func TestCharts(t *testing.T) {
	window := 20 * time.Minute
	value := func(m Moment) float64 { return m.Open }
	c := draw("Open", []Moment{
		{At: ago(10 * time.Minute), Open: 5}, {At: ago(10*time.Minute - 10*time.Second), Open: 10},
		{At: ago(5 * time.Second), Open: 0}, {At: ago(time.Hour), Open: 1},
	}[:3], noon, window, value, rate)
	require.Equal(t, "M118 20.5L120 2M238 39", c.Line, "broken where nothing was recorded")
	require.Equal(t, "M118 20.5L120 2V40H118ZM238 39V40H238Z", c.Area)
	require.Equal(t, "0/s", c.Now)
	require.Equal(t, "10/s", c.Peak)
	// A clock that was set, or a moment from before the window, draws nothing.
	require.Empty(t, draw("", []Moment{{At: ago(time.Hour)}, {At: noon.Add(time.Hour)}}, noon, window, value, rate).Line)
	require.Equal(t, "–", draw("", nil, noon, window, value, rate).Now)

	// There is as much time as there is history, in whole minutes and two at least.
	for seconds, want := range map[int]time.Duration{0: 2 * time.Minute, 3: 2 * time.Minute, 25: 3 * time.Minute, 24: 2 * time.Minute, 240: window} {
		young := page(pool("a"), pool("b"))
		young.Pools[0].History, young.Pools[1].History = nil, moments(seconds, 1, 0)
		require.Equal(t, want, young.span(), seconds)
	}

	p := pool("web")
	require.Len(t, p.charts(noon, window), 4)
	p.History[100].Refused = 1
	require.Len(t, p.charts(noon, window), 5, "with those who were turned away")
}
