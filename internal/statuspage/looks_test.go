package statuspage

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// site serves pages by their paths, as the handler does.
type site struct {
	url    string
	loads  atomic.Int64
	insert atomic.Value // string, put into the body
}

func serve(t testing.TB, pages map[string]*Page) *site {
	t.Helper()
	site := new(site)
	site.insert.Store("")
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := pages[r.URL.Path]
		if p == nil {
			http.NotFound(w, r)
			return
		}
		site.loads.Add(1)
		body, err := p.Render(ParseView(r.URL.Query()))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Security-Policy", SecurityPolicy)
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write([]byte(strings.Replace(string(body), "<body>", "<body>"+site.insert.Load().(string), 1)))
	}))
	t.Cleanup(s.Close)
	site.url = s.URL
	return site
}

// still is the query of a page that stays.
const still = "?refresh=off"

// lowContrast returns the texts of the page that are hard to read, by WCAG 2 AA.
const lowContrast = `(() => {
	const rgb = s => s.match(/[\d.]+/g).map(Number);
	const luminance = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
		.reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
	const back = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
	const found = []; let n = 0;
	for (const w = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); w.nextNode();) {
		if (!w.currentNode.data.trim()) continue;
		const e = w.currentNode.parentElement, a = luminance(rgb(getComputedStyle(e).color)), b = luminance(back(e));
		n++;
		if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5) found.push(e.outerHTML);
	}
	return n < 20 ? ["only " + n + " texts"] : found;
})()`

// sticksOut returns what is wider than so many pixels, apart from what scrolls by
// itself.
const sticksOut = `(() => {
	if (document.documentElement.scrollWidth <= %d) return [];
	return ["is " + document.documentElement.scrollWidth + " wide"].concat([...document.querySelectorAll("body *")]
		.filter(e => e.getBoundingClientRect().right > %[1]d && !e.closest(".wide")).map(e => e.outerHTML.slice(0, 200)));
})()`

func TestLooks(t *testing.T) {
	b := startBrowser(t)
	wordy := troubled()
	for i := range wordy.Pools {
		p := &wordy.Pools[i]
		p.Name += strings.Repeat("-long", 20)
		for j := range p.Backends {
			p.Backends[j].Address = strings.Repeat("sub.", 40) + p.Backends[j].Address
			p.Backends[j].CheckError = strings.Repeat("0123456789", 40)
		}
	}
	s := serve(t, map[string]*Page{"/troubled": troubled(), "/quiet": quiet(), "/many": many(1000), "/wordy": wordy})
	for _, theme := range []string{"light", "dark"} {
		for name, width := range map[string]int{"phone": 360, "tablet": 800, "wide": 1600} {
			for _, page := range []string{"troubled", "quiet", "many", "wordy"} {
				what := fmt.Sprintf("%s-%s-%s", page, name, theme)
				b.look(width, 1400, theme)
				b.open(s.url + "/" + page + still)
				b.keep(what)
				var found []string
				b.eval(lowContrast, &found)
				require.Empty(t, found, what)
				b.eval(fmt.Sprintf(sticksOut, width), &found)
				require.Empty(t, found, what)
				var background string
				b.eval(`getComputedStyle(document.documentElement).backgroundColor`, &background)
				require.Equal(t, map[string]string{"light": "rgb(243, 245, 248)", "dark": "rgb(17, 20, 24)"}[theme], background)
			}
		}
	}
	require.Empty(t, b.complaints())
}

// What must not be on the page does nothing if it ever gets there, and the browser
// complains, which it does not of the page as it is.
func TestPolicyHolds(t *testing.T) {
	b := startBrowser(t)
	s := serve(t, map[string]*Page{"/": troubled()})
	b.open(s.url + "/" + still)
	var title string
	b.eval(`document.title`, &title)
	require.Equal(t, "Trouble with 2 of 4 pools – tcp_lb on lb-1", title)
	require.Empty(t, b.complaints())
	for _, insert := range []string{
		`<script>document.title = "hostile"</script>`, `<img src="x" onerror="document.title='hostile'">`, `<style>body { display: none }</style>`, `<iframe src="/"></iframe>`,
		`<form action="/"><button id="b" formmethod="get"></button></form>`,
	} {
		before := len(b.complaints())
		s.insert.Store(insert)
		b.open(s.url + "/" + still)
		b.eval(`(() => { const b = document.getElementById("b"); if (b) b.click(); return document.title })()`, &title)
		require.NotEqual(t, "hostile", title)
		deadline := time.Now().Add(hangTimeout)
		for len(b.complaints()) == before {
			require.True(t, time.Now().Before(deadline), "no complaint of %s", insert)
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// focused is what the page says of the element that has the focus.
type focused struct {
	Text, Tag         string
	Outline           float64
	Top, Bottom, W, H float64
	Visible           bool
}

const whatIsFocused = `(() => {
	const e = document.activeElement, r = e.getBoundingClientRect(), s = getComputedStyle(e);
	return {Text: e.textContent.trim().slice(0, 60), Tag: e.tagName, Outline: s.outlineStyle == "none" ? 0 : parseFloat(s.outlineWidth),
		Top: r.top, Bottom: r.bottom, W: r.width, H: r.height, Visible: r.right > 0 && r.left < innerWidth && r.bottom > 0 && r.top < innerHeight && s.clipPath == "none"};
})()`

// Whoever has but a keyboard gets everywhere, and sees where that is.
func TestKeyboard(t *testing.T) {
	b := startBrowser(t)
	s := serve(t, map[string]*Page{"/": troubled()})
	for _, width := range []int{360, 1600} {
		b.look(width, 900, "light")
		b.open(s.url + "/" + still)
		var links int
		b.eval(`document.querySelectorAll("a").length`, &links)
		var f focused
		b.press("Tab", 9)
		b.eval(whatIsFocused, &f)
		require.Equal(t, "Skip to the pools", f.Text)
		require.True(t, f.Visible, "%+v", f)
		seen := 1
		for {
			b.press("Tab", 9)
			b.eval(whatIsFocused, &f)
			if f.Tag == "BODY" || f.Text == "Skip to the pools" {
				break
			}
			require.GreaterOrEqual(t, f.Outline, 2.0, "%+v", f)
			require.True(t, f.Visible && f.W > 0 && f.H > 0, "%d: %+v", width, f)
			if f.Tag == "A" {
				seen++
			}
			require.LessOrEqual(t, seen, links)
		}
		require.Equal(t, links, seen)

		// The skip link skips: what comes next is in the pools.
		b.open(s.url + "/" + still)
		b.press("Tab", 9)
		b.press("Enter", 13)
		b.press("Tab", 9)
		var inside bool
		b.eval(`document.activeElement.closest("#pools") != null`, &inside)
		require.True(t, inside)
	}
	// A heading sorts, and its column says so.
	b.open(s.url + "/" + still)
	b.eval(`(document.querySelector(".backends thead a[href*='sort=failed']").focus(), 0)`, new(int))
	b.press("Enter", 13)
	b.awaitLoad()
	var sorted string
	b.eval(`document.querySelector("[aria-sort]").textContent`, &sorted)
	require.Equal(t, "Failed connects", sorted)
}

// The page fetches itself anew without any script, and who reads further down stays
// there.
func TestRefreshesByItself(t *testing.T) {
	b := startBrowser(t)
	p := troubled()
	p.Every = 4 * time.Second
	s := serve(t, map[string]*Page{"/": p})
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": true}, nil)
	b.look(360, 600, "light")
	b.open(s.url + "/?sort=open")
	b.eval(`(scrollTo(0, 700), 0)`, new(int))
	var at float64
	b.eval(`scrollY`, &at)
	require.Equal(t, 700.0, at)
	loads := s.loads.Load()
	b.awaitLoad()
	require.Greater(t, s.loads.Load(), loads)
	var query string
	b.eval(`location.search`, &query)
	require.Equal(t, "?sort=open", query)
	deadline := time.Now().Add(hangTimeout)
	for at = 0; at != 700; b.eval(`scrollY`, &at) { // it is put back when the page has been laid out
		require.True(t, time.Now().Before(deadline), "at %v", at)
		time.Sleep(5 * time.Millisecond)
	}
	require.Empty(t, b.complaints())
}
