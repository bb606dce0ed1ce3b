package statuspage

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"hash/fnv"
	"html/template"
	"slices"
	"time"
)

//go:embed style.css
var style string

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// SecurityPolicy is the Content-Security-Policy of the page: its one style sheet,
// its icon, and nothing else.
var SecurityPolicy = func() string {
	sum := sha256.Sum256([]byte(style))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

// Has reports whether the page has the pool.
func (p *Page) Has(lb string) bool {
	return slices.ContainsFunc(p.Pools, func(o Pool) bool { return o.Name == lb })
}

// Render returns the view of the page as HTML. A pool that is not there is said not
// to be.
func (p *Page) Render(v View) ([]byte, error) {
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, p.document(v)); err != nil {
		return nil, fmt.Errorf("rendering the status page: %w", err)
	}
	return b.Bytes(), nil
}

// document is what the template gets.
type document struct {
	Style   template.CSS
	Icon    template.URL
	Host    string
	At      string
	AtISO   string
	Up      string
	Loaded  string
	Files   gauge
	Turned  []string // by the listeners
	Refresh int      // seconds; 0 = never
	Every   string   // what it would be if it were not paused; empty = never
	Pause   string   // links
	Resume  string

	Level    string
	Headline string
	Problems []problem
	More     int // further ones
	Missing  string
	AllPools string // link; empty where all are shown

	Overview []overview
	Sections []section
	Omitted  int // pools that are in the table only
	Commands []string
}

type problem struct {
	Level, Pool, Anchor, Text string
}

// gauge is how much of a limit is used.
type gauge struct {
	Text    string
	Percent int  // of the limit
	Limited bool // there is one
}

func newGauge(n, limit int64) gauge {
	if limit <= 0 {
		return gauge{Text: amount(atLeast0(n))}
	}
	return gauge{
		Text:    amount(atLeast0(n)) + " of " + amount(uint64(limit)),
		Percent: int(min(100*atLeast0(n)/uint64(limit), 100)), Limited: true,
	}
}

// overview is a pool's row in the table of pools.
type overview struct {
	Level, Word, Name, Link string
	Available               string
	Open, New, Traffic      string
	Waiting, Refused        string
}

// icons are dots, by level: a tab tells what is the matter, too.
var icons = [...]template.URL{well: icon("1e7033"), note: icon("1e7033"), warn: icon("d98200"), bad: icon("c62828")}

func icon(color string) template.URL {
	return template.URL("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Ccircle cx='8' cy='8' r='7' fill='%23" + color + "'/%3E%3C/svg%3E")
}

// judged is a pool with what is wrong with it.
type judged struct {
	*Pool
	verdict verdict
}

func (p *Page) document(v View) *document {
	d := &document{
		Style: template.CSS(style), Host: label(p.Host),
		At: p.At.Format("15:04:05 MST"), AtISO: p.At.Format(time.RFC3339), Up: age(p.At, p.Started),
		Files: newGauge(p.Files, p.MaxFiles),
		Pause: v.paused(true).link(), Resume: v.paused(false).link(),
	}
	for _, r := range p.TurnedAway {
		d.Turned = append(d.Turned, r.Reason+": "+amount(r.Recent)+" in "+minutes(p.Window)+", "+amount(r.Total)+" in all")
	}
	if !p.Loaded.IsZero() {
		d.Loaded = age(p.At, p.Loaded)
	}
	if p.Every > 0 {
		d.Every = p.Every.String()
		if !v.Paused {
			d.Refresh = max(1, int(p.Every.Round(time.Second)/time.Second))
		}
	}
	pools := p.judged(v.LB)
	if v.LB != "" {
		d.AllPools = v.of("").link()
		if len(pools) == 0 {
			d.Missing = label(v.LB)
		}
	}
	d.summarize(p.process(), pools, v)
	d.addPools(p, pools, v)
	return d
}

// judged returns the pools, those of one name or all, in their order.
func (p *Page) judged(lb string) (list []judged) {
	for i := range p.Pools {
		if pool := &p.Pools[i]; lb == "" || pool.Name == lb {
			list = append(list, judged{pool, pool.verdict(p.At, p.Window)})
		}
	}
	return list
}

// summarize says what is wrong, the worst first.
func (d *document) summarize(process verdict, pools []judged, v View) {
	worst, troubled, worse := process.level, 0, 0
	byLevel := slices.Clone(pools)
	slices.SortStableFunc(byLevel, func(a, b judged) int { return cmp.Compare(b.verdict.level, a.verdict.level) })
	for _, p := range byLevel {
		worst = max(worst, p.verdict.level)
		if p.verdict.level == well {
			continue
		}
		if p.verdict.level >= warn {
			troubled++
		}
		if p.verdict.level > process.level {
			worse++
		}
		if len(d.Problems) == maxProblems {
			d.More++
			continue
		}
		d.Problems = append(d.Problems, problem{
			Level: p.verdict.level.String(), Pool: label(p.Name), Anchor: "#" + p.anchor(), Text: p.verdict.String(),
		})
	}
	if len(process.parts) > 0 {
		d.Problems = slices.Insert(d.Problems, min(worse, len(d.Problems)), problem{Level: process.level.String(), Text: process.String()})
	}
	d.Level, d.Icon = worst.String(), icons[worst]
	d.Headline = headline(worst, process.level, troubled, len(pools))
	switch {
	case troubled == 1 && process.level < warn:
		d.headlineOf(label(byLevel[0].Name), byLevel[0].verdict)
	case troubled == 0 && process.level >= warn && len(pools) > 0:
		d.headlineOf("The process", process)
	case len(pools) == 1 && worst < warn && byLevel[0].Configured:
		d.Headline += ": " + byLevel[0].availability() + " backends available"
	}
}

// headlineOf makes the worst of the one that is in trouble the headline.
func (d *document) headlineOf(name string, v verdict) {
	d.Headline = name + ": " + v.parts[0].text
	if len(d.Problems) == 1 { // and the rest of it follows
		d.Problems = nil
		for _, part := range v.parts[1:] {
			d.Problems = append(d.Problems, problem{Level: part.level.String(), Text: part.text})
		}
	}
}

func headline(worst, process level, troubled, pools int) string {
	switch {
	case pools == 0:
		return "There is no pool"
	case worst < warn && pools == 1:
		return "The pool is well"
	case worst < warn:
		return fmt.Sprintf("All %d pools are well", pools)
	case process >= warn:
		return fmt.Sprintf("Trouble with the process, and with %d of %s", troubled, plural(uint64(pools), "pool", "pools"))
	}
	return fmt.Sprintf("Trouble with %d of %s", troubled, plural(uint64(pools), "pool", "pools"))
}

// anchor is where the pool is on the page. It depends on the name alone, so that
// a link holds when others come and go.
func (p *Pool) anchor() string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(p.Name))
	return fmt.Sprintf("pool-%x", h.Sum64())
}

func (d *document) addPools(p *Page, pools []judged, v View) {
	if len(pools) > 1 {
		for _, pool := range pools {
			d.Overview = append(d.Overview, pool.overview(v))
		}
	}
	shown := slices.Clone(pools)
	if len(shown) > maxPools {
		slices.SortStableFunc(shown, func(a, b judged) int { return cmp.Compare(b.verdict.level, a.verdict.level) })
		d.Omitted = len(shown) - maxPools
		shown = shown[:maxPools]
		for i := range d.Problems {
			d.Problems[i].Anchor = "" // of those that are not there it would lead nowhere
		}
		for i, pool := range shown {
			if i < len(d.Problems) {
				d.linkProblem(pool)
			}
		}
	}
	for _, pool := range shown {
		d.Sections = append(d.Sections, pool.section(p, v, len(pools) == 1))
	}
	d.Commands = commands(shown, p.At)
}

func (d *document) linkProblem(pool judged) {
	name := label(pool.Name)
	for i := range d.Problems {
		if d.Problems[i].Pool == name {
			d.Problems[i].Anchor = "#" + pool.anchor()
		}
	}
}

// commands are those to go on with, for the first backend that is in trouble.
func commands(pools []judged, at time.Time) []string {
	var of *Backend
	lb := ""
	for _, p := range pools {
		for i := range p.Backends {
			if b := &p.Backends[i]; b.Configured && (of == nil || b.level(at) > of.level(at)) {
				of, lb = b, p.Name
			}
		}
	}
	if of == nil {
		return nil
	}
	var list []string
	for _, c := range []string{"connections", "drain", "maint", "ready"} {
		list = append(list, "caddy tcp-lb "+c+" "+argument(of.Address)+" --lb="+argument(lb))
	}
	return list
}
