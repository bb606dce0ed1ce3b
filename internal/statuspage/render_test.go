package statuspage

import (
	"crypto/sha256"
	"encoding/base64"
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func render(t testing.TB, p *Page, v View) string {
	t.Helper()
	b, err := p.Render(v)
	require.NoError(t, err)
	return string(b)
}

var (
	tag       = regexp.MustCompile(`<(/?)([a-zA-Z!][^\s/>]*)((?:[^>"]|"[^"]*")*)>`)
	attribute = regexp.MustCompile(`([^\s=/]+)(?:="([^"]*)")?`)
	voids     = map[string]bool{"!doctype": true, "meta": true, "link": true}
	wanted    = regexp.MustCompile(`(?:href="#|aria-labelledby=")([^"]*)"`)
	link      = regexp.MustCompile(`^(\?|#|data:image/svg)`)
	plainID   = regexp.MustCompile(`^[a-z0-9-]+$`)
)

// skeleton returns the tags of a page with the names of their attributes. It fails
// where an element is not closed, or has what the page must not have.
func skeleton(t testing.TB, html string) (list []string) {
	t.Helper()
	var open []string
	ids := make(map[string]bool)
	html = strings.Replace(html, style, "", 1)
	for _, m := range tag.FindAllStringSubmatch(html, -1) {
		name := m[2]
		if m[1] == "/" {
			require.NotEmpty(t, open, "</%s>", name)
			require.Equal(t, open[len(open)-1], name)
			open = open[:len(open)-1]
			continue
		}
		text := name
		for _, a := range attribute.FindAllStringSubmatch(m[3], -1) {
			text += " " + a[1]
			switch {
			case a[1] == "href":
				require.True(t, link.MatchString(a[2]), a[2])
			case a[1] == "id":
				require.True(t, plainID.MatchString(a[2]), a[2])
				require.False(t, ids[a[2]], "%s is there twice", a[2])
				ids[a[2]] = true
			}
			require.False(t, strings.HasPrefix(a[1], "on") || a[1] == "style" || a[1] == "src", m[0])
		}
		require.NotContains(t, []string{"script", "iframe", "img", "form", "base", "object"}, name)
		list = append(list, text)
		if !voids[name] && !strings.HasSuffix(m[3], "/") {
			open = append(open, name)
		}
	}
	require.Empty(t, open)
	for _, m := range wanted.FindAllStringSubmatch(html, -1) {
		require.True(t, ids[m[1]], "nothing is called %s", m[1])
	}
	return list
}

func TestPageIsWellFormed(t *testing.T) {
	for _, p := range []*Page{troubled(), quiet(), many(30), page()} {
		for _, v := range []View{{}, {LB: "web", Sort: "open", All: true, Paused: true}, {LB: "nobody"}} {
			skeleton(t, render(t, p, v))
		}
	}
}

// The one style sheet that may be is the page's.
func TestStyleIsAllowed(t *testing.T) {
	html := render(t, quiet(), View{})
	_, rest, ok := strings.Cut(html, "<style>")
	require.True(t, ok)
	css, _, ok := strings.Cut(rest, "</style>")
	require.True(t, ok)
	sum := sha256.Sum256([]byte(css))
	require.Contains(t, SecurityPolicy, "style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'")
	require.Contains(t, SecurityPolicy, "default-src 'none'")
	require.NotContains(t, SecurityPolicy, "unsafe")
	require.NotContains(t, SecurityPolicy, "script-src")
	require.NotContains(t, css, "url(")
}

func TestRefresh(t *testing.T) {
	p := quiet()
	require.Contains(t, render(t, p, View{}), `<meta http-equiv="refresh" content="5">`)
	require.Contains(t, render(t, p, View{Sort: "open"}), `<a href="?refresh=off&amp;sort=open">Pause</a>`)
	paused := render(t, p, View{Sort: "open", Paused: true})
	require.NotContains(t, paused, `http-equiv`)
	require.Contains(t, paused, `<a href="?sort=open">Go on</a>`)
	p.Every = 0
	html := render(t, p, View{})
	require.NotContains(t, html, `http-equiv`)
	require.NotContains(t, html, "Pause")
}

func TestUnknownPool(t *testing.T) {
	html := render(t, quiet(), View{LB: "wbe<b>"})
	require.Contains(t, html, "There is no pool <b><bdi>wbe&lt;b&gt;</bdi></b>, or none any more.")
	require.Contains(t, html, `<a href="?">All pools</a>`)
	require.NotContains(t, html, "10.0.0.1")
}

// FuzzHostileNames: whatever others have named, it is text, and the page grows by no
// more than what its places for names hold: 12 bytes for each of a name's, as a rune of
// four bytes takes in a link.
func FuzzHostileNames(f *testing.F) {
	const mark = "xqj" // nothing but a name has it
	hostile := func(s string) *Page {
		p := troubled()
		p.Pools = p.Pools[1:2]
		p.Host = mark + s
		for i := range p.Pools {
			pool := &p.Pools[i]
			pool.Name += mark + s
			pool.History = pool.History[:2]
			pool.Policy, pool.Checks = mark+s, mark+s
			for j := range pool.Sources {
				pool.Sources[j].Name, pool.Sources[j].Error = mark+s, mark+s
			}
			for j := range pool.Backends {
				b := &pool.Backends[j]
				b.Address += mark + s
				b.Source, b.CheckError, b.ConnectError = mark+s, mark+s, "y"+s
			}
			for j := range pool.Refused {
				pool.Refused[j].Reason = mark + s
			}
		}
		return p
	}
	plain := render(f, hostile(""), View{LB: "web" + mark, Sort: "open"})
	want := skeleton(f, plain)
	named := render(f, hostile("abcdefghij"), View{LB: "web" + mark + "abcdefghij", Sort: "open"})
	places := (len(named) - len(plain)) / len("abcdefghij")
	for _, s := range []string{
		`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='x`, "javascript:alert(1)", "</title><b>", "</style><b>", "--><!--", "{{.}}", "a\x00b\n\u202e\u2028", "\xff\xfe<", "%3Cb%3E", "&lt;b&gt;", "]]>",
		strings.Repeat("<", 5000), strings.Repeat("'", 5000), strings.Repeat("\U0001f600", 5000), strings.Repeat("\U000e0001", 5000),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		html := render(t, hostile(s), View{LB: "web" + mark + s, Sort: "open"})
		require.Equal(t, want, skeleton(t, html))
		require.LessOrEqual(t, len(html), len(plain)+12*places*len(s))
		if strings.ContainsAny(s, "<>") {
			require.NotContains(t, strings.TrimPrefix(html, "<!doctype html>"), mark+s)
		}
	})
}

// A page of a thousand backends is made in a moment and is no megabyte.
func TestLargePage(t *testing.T) {
	p := many(1000)
	least := time.Hour
	size := 0
	for range 5 {
		began := time.Now()
		size = len(render(t, p, View{All: true}))
		least = min(least, time.Since(began))
	}
	t.Logf("%d bytes, %s", size, least)
	require.Less(t, size, 1_000_000)
	require.Less(t, len(render(t, p, View{})), 40_000)
}

func BenchmarkRender(b *testing.B) {
	p := many(1000)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Render(View{All: true}); err != nil {
			b.Fatal(err)
		}
	}
}

// colors returns the values of the style sheet's variables in both themes.
func colors(t testing.TB) (light, dark map[string]string) {
	t.Helper()
	blocks := regexp.MustCompile(`(?s):root \{(.*?)\}`).FindAllStringSubmatch(style, -1)
	require.Len(t, blocks, 2)
	read := func(text string) map[string]string {
		m := make(map[string]string)
		for _, v := range regexp.MustCompile(`--([a-z-]+): (#[0-9a-f]{6});`).FindAllStringSubmatch(text, -1) {
			m[v[1]] = v[2]
		}
		return m
	}
	return read(blocks[0][1]), read(blocks[1][1])
}

// luminance is that of WCAG 2.
func luminance(t testing.TB, color string) float64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimPrefix(color, "#"), 16, 32)
	require.NoError(t, err)
	part := func(shift int) float64 {
		v := float64(n>>shift&0xff) / 255
		if v <= 0.04045 {
			return v / 12.92
		}
		return math.Pow((v+0.055)/1.055, 2.4)
	}
	return 0.2126*part(16) + 0.7152*part(8) + 0.0722*part(0)
}

func contrast(t testing.TB, a, b string) float64 {
	t.Helper()
	x, y := luminance(t, a), luminance(t, b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}

func TestContrast(t *testing.T) {
	require.InDelta(t, 21, contrast(t, "#000000", "#ffffff"), 0.01)
	require.InDelta(t, 4.54, contrast(t, "#767676", "#ffffff"), 0.01)
	light, dark := colors(t)
	require.NotEmpty(t, light)
	// Which color is text on which, and which is a line or a mark.
	texts := map[string][]string{
		"ink": {"page", "card", "bad-card", "warn-card", "well-card"}, "soft": {"page", "card"}, "link": {"page", "card"},
		"bad": {"card", "bad-card"}, "warn": {"card", "warn-card"}, "well": {"card", "well-card"}, "note": {"note-card"},
	}
	marks := map[string][]string{"curve": {"card", "track"}, "link": {"page", "card", "bad-card", "warn-card"}, "bad": {"card"}}
	seen := map[string]bool{"rule": true, "track": true}
	for theme, is := range map[string]map[string]string{"light": light, "dark": dark} {
		require.Len(t, is, len(light), theme)
		for least, pairs := range map[float64]map[string][]string{4.5: texts, 3: marks} {
			for front, backs := range pairs {
				for _, back := range backs {
					seen[front], seen[back] = true, true
					require.GreaterOrEqual(t, contrast(t, is[front], is[back]), least, "%s: %s on %s", theme, front, back)
				}
			}
		}
		for name := range is {
			require.True(t, seen[name], "what is --%s on?", name)
		}
	}
	require.Empty(t, regexp.MustCompile(`#[0-9a-fA-F]{3,8}\b`).FindAllString(style[strings.LastIndex(style, "* { box-sizing"):], -1), "all colors are variables")
}

// A backend's row has its address, and need not have it twice.
func TestErrorsAreBrief(t *testing.T) {
	b := &Backend{Address: "a:1"}
	for text, want := range map[string]string{
		"dial tcp a:1: connect: connection refused":                                       "connection refused",
		"TLS handshake: tls: failed to verify certificate: x509: certificate has expired": "TLS handshake: certificate has expired",
		"dial tcp b:1: connect: connection refused":                                       "dial tcp b:1: connect: connection refused",
	} {
		require.Equal(t, want, b.brief(text))
	}
}
