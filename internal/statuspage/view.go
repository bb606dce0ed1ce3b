package statuspage

import (
	"cmp"
	"net/url"
	"slices"
	"time"
)

// View is what a reader has chosen to see. Its zero value is all pools, troubles
// first.
type View struct {
	LB     string // the only pool; empty = all
	Sort   string // of backends, one of those below; empty = troubles first
	All    bool   // also backends that are well, where they are many
	Paused bool   // the page stays as it is
}

// ParseView reads the query of a request. What it doesn't know it passes over: it
// is a page for people.
func ParseView(q url.Values) View {
	v := View{LB: q.Get("lb"), All: q.Has("all"), Paused: q.Get("refresh") == "off"}
	if _, known := orders[q.Get("sort")]; known {
		v.Sort = q.Get("sort")
	}
	return v
}

// link returns the address of a view, relative to the page's own.
func (v View) link() string {
	q := url.Values{}
	if v.LB != "" {
		q.Set("lb", v.LB)
	}
	if v.Sort != "" {
		q.Set("sort", v.Sort)
	}
	if v.All {
		q.Set("all", "1")
	}
	if v.Paused {
		q.Set("refresh", "off")
	}
	return "?" + q.Encode()
}

func (v View) of(lb string) View {
	v.LB = lb
	return v
}

func (v View) sortedBy(order string) View {
	v.Sort = order
	return v
}

func (v View) whole() View {
	v.All = true
	return v
}

func (v View) paused(is bool) View {
	v.Paused = is
	return v
}

// orders are those that backends can be sorted by, the most of a thing first.
var orders = map[string]func(a, b *Backend) int{
	"address": func(a, b *Backend) int { return cmp.Compare(a.Address, b.Address) },
	"state":   func(a, b *Backend) int { return cmp.Compare(a.stateText(), b.stateText()) },
	"weight":  func(a, b *Backend) int { return cmp.Compare(b.EffectiveWeight, a.EffectiveWeight) },
	"open":    func(a, b *Backend) int { return cmp.Compare(b.Open, a.Open) },
	"new":     func(a, b *Backend) int { return cmp.Compare(b.pace().Connections, a.pace().Connections) },
	"traffic": func(a, b *Backend) int {
		return cmp.Compare(b.pace().Received+b.pace().Sent, a.pace().Received+a.pace().Sent)
	},
	"failed":  func(a, b *Backend) int { return cmp.Compare(b.Total.Errors, a.Total.Errors) },
	"checked": func(a, b *Backend) int { return a.Checked.Compare(b.Checked) },
}

func (b *Backend) pace() Pace {
	if b.Pace == nil {
		return Pace{}
	}
	return *b.Pace
}

const (
	// maxPools is how many pools are shown in full at once, the troubled ones before
	// others; all are in the table.
	maxPools = 25
	// fewBackends is how many backends are shown before those that are well are
	// left out, or, of several pools, others.
	fewBackends = 25
	// maxBackends is how many backends of a pool are shown at most.
	maxBackends = 1000
	// maxProblems is how many lines the summary has at most.
	maxProblems = 20
)

// sorted returns the backends in the view's order.
func (p *Pool) sorted(v View, at time.Time) []*Backend {
	list := make([]*Backend, len(p.Backends))
	for i := range p.Backends {
		list[i] = &p.Backends[i]
	}
	if order := orders[v.Sort]; order != nil {
		slices.SortStableFunc(list, order)
	} else {
		slices.SortStableFunc(list, func(a, b *Backend) int { return cmp.Compare(b.level(at), a.level(at)) })
	}
	return list
}

// shown returns the backends to show, of a pool that is alone on the page or not,
// and how many are left out; wellOnly is whether all of those are well.
func (p *Pool) shown(v View, alone bool, at time.Time) (list []*Backend, hidden int, wellOnly bool) {
	list = p.sorted(v, at)
	if len(list) <= fewBackends {
		return list, 0, false
	}
	limit := fewBackends
	if alone {
		limit = maxBackends
	}
	if v.Sort == "" && !v.All {
		troubled := slices.IndexFunc(list, func(b *Backend) bool { return b.level(at) == well })
		if troubled >= 0 && troubled <= limit {
			return list[:troubled], len(list) - troubled, true
		}
	}
	n := min(len(list), limit)
	return list[:n], len(list) - n, false
}
