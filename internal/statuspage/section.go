package statuspage

import (
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
)

// section is a pool in full.
type section struct {
	Name, Anchor, Link string
	Level, Word        string
	Settings           string
	Facts              []fact
	Charts             []chart
	Columns            []column
	Rows               []row
	Hidden             string // what is left out, in words; empty = nothing
	ShowAll            string // link
}

type fact struct {
	Name  string
	Value gauge
	Note  string
	Level string
}

type column struct {
	Title, Link string
	Number      bool
	Sorted      string // as aria-sort has it; empty = it is not
}

// row is a backend.
type row struct {
	Level               string
	Address             string
	Tags                []string
	Health, HealthLevel string
	HealthFor           string
	Troubles            []string
	State               string
	Weight              string
	Open                gauge
	New, In, Out        string
	Failed, Checked     string
}

// conditions are the levels of pools in a word.
var conditions = [...]string{well: "well", note: "well", warn: "degraded", bad: "failing"}

func (p *Pool) availability() string {
	available, all := p.configured()
	return amount(uint64(available)) + " of " + amount(uint64(all))
}

func (p judged) word() string {
	if !p.Configured {
		return "leaving"
	}
	return conditions[p.verdict.level]
}

func (p judged) overview(v View) overview {
	o := overview{
		Level: p.verdict.level.String(), Word: p.word(),
		Name: label(p.Name), Link: v.of(p.Name).link(),
		Available: p.availability(), Open: amount(atLeast0(p.Connections)),
		New: "–", Traffic: "–", Waiting: amount(atLeast0(p.Waiting)), Refused: amount(p.recentlyRefused()),
	}
	if n := len(p.History); n > 0 {
		m := p.History[n-1]
		o.New, o.Traffic = rate(m.New), flow(m.Received+m.Sent)
	}
	return o
}

func (p *Pool) recentlyRefused() (n uint64) {
	for _, r := range p.Refused {
		if !r.ByClient {
			n += r.Recent
		}
	}
	return n
}

func (p judged) section(page *Page, v View, alone bool) section {
	s := section{
		Name: label(p.Name), Anchor: p.anchor(), Link: v.of(p.Name).link(),
		Level: p.verdict.level.String(), Word: p.word(),
		Settings: p.settings(), Facts: p.facts(page.Window), Charts: p.charts(page.At, page.span()), Columns: columns(v),
	}
	if len(p.History) == 0 {
		s.Charts = nil
	}
	list, hidden, wellOnly := p.shown(v, alone, page.At)
	for _, b := range list {
		s.Rows = append(s.Rows, b.row(page.At))
	}
	if hidden > 0 {
		s.Hidden, s.ShowAll = amount(uint64(hidden))+" more", v.of(p.Name).link()
		if wellOnly {
			s.Hidden = plural(uint64(hidden), "backend is", "backends are") + " well"
			s.ShowAll = v.of(p.Name).whole().link()
		}
		if alone && !wellOnly { // all that fit are shown
			s.ShowAll = ""
		}
	}
	return s
}

func (p *Pool) settings() string {
	if !p.Configured {
		return ""
	}
	parts := []string{label(p.Policy), "checks " + text(p.Checks)}
	if p.Patience > 0 {
		parts = append(parts, "clients wait up to "+p.Patience.String())
	}
	for _, s := range p.Sources {
		parts = append(parts, label(s.Name)+": "+plural(atLeast0(int64(s.Backends)), "backend", "backends"))
	}
	return strings.Join(parts, " · ")
}

func (p *Pool) facts(window time.Duration) []fact {
	list := []fact{
		{Name: "Connections", Value: newGauge(p.Connections, p.MaxConnections), Note: amount(p.Total.Connections) + " in all"},
		{Name: "Waiting", Value: newGauge(p.Waiting, 0), Note: "for a backend"},
		{Name: "Failed connects", Value: plain(p.Total.Errors), Note: amount(p.Total.Retries) + " tried elsewhere"},
		{Name: "From clients", Value: gauge{Text: words.Size(p.Total.Received)}, Note: "in all"},
		{Name: "To clients", Value: gauge{Text: words.Size(p.Total.Sent)}, Note: "in all"},
	}
	if p.Waiting > 0 {
		list[1].Level = warn.String()
	}
	for _, r := range p.Refused {
		if r.Total == 0 {
			continue
		}
		f := fact{Name: "Turned away: " + r.Reason, Value: plain(r.Recent), Note: "in " + minutes(window) + ", " + amount(r.Total) + " in all"}
		if r.ByClient {
			f.Name = "Left while waiting: " + r.Reason
		} else if r.Recent > 0 {
			f.Level = bad.String()
		}
		list = append(list, f)
	}
	return list
}

func plain(n uint64) gauge { return gauge{Text: amount(n)} }

// columns are those of backends. The style sheet names them, too, where a row is
// shown one below the other.
func columns(v View) []column {
	list := []column{
		{Title: "Backend", Link: "address"}, {Title: "Health", Link: ""}, {Title: "State", Link: "state"}, {Title: "Weight", Link: "weight", Number: true},
		{Title: "Open", Link: "open", Number: true}, {Title: "New", Link: "new", Number: true}, {Title: "In, out", Link: "traffic", Number: true},
		{Title: "Failed connects", Link: "failed", Number: true}, {Title: "Checked", Link: "checked", Number: true},
	}
	for i := range list {
		c := &list[i]
		if c.Link == v.Sort {
			c.Sorted = "descending"
			if c.Link == "address" || c.Link == "checked" || c.Link == "state" {
				c.Sorted = "ascending"
			}
		}
		c.Link = v.sortedBy(c.Link).link()
	}
	return list
}

func (b *Backend) row(at time.Time) row {
	r := row{
		Level: b.level(at).String(), Address: label(b.Address), Tags: b.tags(at),
		Health: b.Health, HealthLevel: b.healthLevel(), Troubles: b.troubles(at),
		State: b.stateText(), Weight: weight(b.EffectiveWeight), Open: newGauge(b.Open, b.MaxConnections),
		New: "–", In: "–", Out: "–", Failed: amount(b.Total.Errors), Checked: "never",
	}
	if b.Health != "unchecked" && !b.HealthSince.IsZero() {
		r.HealthFor = age(at, b.HealthSince)
	}
	if !b.StateSince.IsZero() && b.isSetAside() {
		r.State += " for " + age(at, b.StateSince)
	}
	if float64(b.Weight) != b.EffectiveWeight {
		r.Weight += " (" + weight(float64(b.Weight)) + ")"
	}
	if b.Pace != nil {
		if b.Pace.Errors > 0 {
			r.Failed += ", " + rate(b.Pace.Errors)
		}
		r.New, r.In, r.Out = rate(b.Pace.Connections), flow(b.Pace.Received), flow(b.Pace.Sent)
	}
	if !b.Checked.IsZero() {
		r.Checked = age(at, b.Checked) + " ago"
	}
	return r
}

func (b *Backend) healthLevel() string {
	switch b.Health {
	case "up":
		return well.String()
	case "down":
		return bad.String()
	}
	return note.String()
}

// stateText is what keeps clients from a backend, apart from its health.
func (b *Backend) stateText() string {
	switch {
	case !b.Configured:
		return "left the config"
	case b.isSetAside():
		return b.State
	case !b.EjectedUntil.IsZero():
		return "out"
	case b.full():
		return "full"
	}
	return b.State
}

func (b *Backend) tags(at time.Time) (tags []string) {
	if b.Backup {
		tags = append(tags, "backup")
	}
	if b.Source != "" {
		tags = append(tags, label(b.Source))
	}
	if b.Configured && !b.isSetAside() && b.EffectiveWeight > 0 && b.EffectiveWeight < float64(b.Weight) {
		tags = append(tags, "slow start")
	}
	if b.Connecting > 0 {
		tags = append(tags, amount(uint64(b.Connecting))+" connecting")
	}
	if !b.EjectedUntil.IsZero() {
		tags = append(tags, "out until "+clock(at, b.EjectedUntil))
	}
	if !b.DrainUntil.IsZero() {
		tags = append(tags, "cut at "+clock(at, b.DrainUntil))
	}
	return tags
}

// troubles are what is wrong with a backend, in the words of who noticed. What is
// told by check and connect alike is told once.
func (b *Backend) troubles(at time.Time) (list []string) {
	check, connect := text(b.brief(b.CheckError)), text(b.brief(b.ConnectError))
	if check != "" {
		list = append(list, "check: "+check)
	}
	if b.NameError != "" {
		list = append(list, "name: "+text(b.NameError))
	}
	if connect != "" && connect != check {
		list = append(list, "connect "+age(at, b.ConnectAt)+" ago: "+connect)
	}
	return list
}

// brief is an error without what the row has anyway.
func (b *Backend) brief(text string) string {
	for _, network := range []string{"tcp", "unix"} {
		text = strings.TrimPrefix(text, "dial "+network+" "+strings.TrimPrefix(b.Address, "unix/")+": ")
	}
	return words.Brief(strings.TrimPrefix(text, "connect: "))
}
