package statuspage

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// level is how bad something is.
type level int

const (
	well level = iota
	note       // somebody wanted it so, or it passes by itself
	warn       // clients are served, with less than there should be
	bad        // clients are turned away or wait
)

var levelNames = [...]string{well: "well", note: "note", warn: "warn", bad: "bad"}

func (l level) String() string { return levelNames[l] }

// verdict is what is wrong, in words and the worst first; no words if nothing is.
type verdict struct {
	level level // of the worst
	parts []complaint
}

type complaint struct {
	level level
	text  string
}

// add puts a complaint behind those that are as bad.
func (v *verdict) add(l level, format string, args ...any) {
	v.level = max(v.level, l)
	at := len(v.parts)
	for at > 0 && v.parts[at-1].level < l {
		at--
	}
	v.parts = slices.Insert(v.parts, at, complaint{l, fmt.Sprintf(format, args...)})
}

func (v *verdict) String() string {
	var texts []string
	for _, p := range v.parts {
		texts = append(texts, p.text)
	}
	return strings.Join(texts, "; ")
}

// nearLimit is from which share of a limit on that is told of.
const nearLimit = 0.9

// process says what is wrong with the process as a whole.
func (p *Page) process() (v verdict) {
	if p.Exiting {
		v.add(warn, "the process is ending")
	}
	switch used := float64(p.Files); {
	case p.MaxFiles > 0 && p.Files >= p.MaxFiles:
		v.add(bad, "all %s files that connections may use are in use: raise the limit of open files", amount(uint64(p.MaxFiles)))
	case p.MaxFiles > 0 && used >= nearLimit*float64(p.MaxFiles):
		v.add(warn, "%s of the %s files that connections may use are in use", amount(uint64(p.Files)), amount(uint64(p.MaxFiles)))
	}
	judgeRefusals(&v, p.TurnedAway, "before they came to a pool, ", p.Window)
	return v
}

// verdict says what is wrong with the pool, the worst first.
func (p *Pool) verdict(at time.Time, window time.Duration) (v verdict) {
	if !p.Configured {
		v.add(note, "left the config, %s until %s", plural(atLeast0(p.Connections), "connection is drained", "connections are drained"), clock(at, p.DrainUntil))
		return v
	}
	p.judgeAvailability(&v, at)
	switch used := float64(p.Connections); {
	case p.MaxConnections > 0 && p.Connections >= p.MaxConnections:
		v.add(bad, "at its limit of %s", plural(uint64(p.MaxConnections), "connection", "connections"))
	case p.MaxConnections > 0 && used >= nearLimit*float64(p.MaxConnections):
		v.add(warn, "%s of at most %s connections", amount(uint64(p.Connections)), amount(uint64(p.MaxConnections)))
	}
	if p.Waiting > 0 {
		v.add(warn, "%s for a backend", plural(uint64(p.Waiting), "client waits", "clients wait"))
	}
	p.judgeBackends(&v, at)
	for _, s := range p.Sources {
		if s.Error != "" {
			v.add(warn, "source %s fails%s: %s", label(s.Name), since(at, s.Failing), text(s.Error))
		}
	}
	if p.Outage == nil || p.Outage.Wanted {
		judgeRefusals(&v, p.Refused, "", window)
	}
	return v
}

func (p *Pool) judgeAvailability(v *verdict, at time.Time) {
	available, all := p.configured()
	switch o := p.Outage; {
	case o != nil && o.Wanted:
		v.add(warn, "no backend takes connections%s: all are set aside by hand, or by a weight of 0", since(at, o.Since))
	case o != nil:
		v.add(bad, "no backend available%s", since(at, o.Since))
		if o.TurnedAway > 0 {
			v.add(bad, "%s turned away since", plural(o.TurnedAway, "client", "clients"))
		}
	case available > 0:
		if p.count(func(b *Backend) bool { return b.Configured && b.Available && !b.Backup }) == 0 &&
			p.count(func(b *Backend) bool { return b.Configured && !b.Backup }) > 0 {
			v.add(warn, "only backups serve")
		}
	case all == 0:
		v.add(bad, "no backend has been found yet")
	default:
		v.add(bad, "no backend has been found up yet")
	}
	p.judge(v, warn, all, "down", func(b *Backend) bool { return b.Configured && b.Health == "down" && b.State != "maint" })
}

func (p *Pool) judgeBackends(v *verdict, at time.Time) {
	_, all := p.configured()
	p.judge(v, warn, all, "out for a while since clients' connections failed", func(b *Backend) bool { return !b.EjectedUntil.IsZero() })
	p.judge(v, warn, all, "refusing connects that checks say should work", func(b *Backend) bool { return b.refuses(at) })
	p.judge(v, warn, all, "full", func(b *Backend) bool { return b.Configured && b.full() })
	p.judge(v, note, all, "in maintenance", func(b *Backend) bool { return b.Configured && b.State == "maint" })
	p.judge(v, note, all, "drained by hand", func(b *Backend) bool { return b.Configured && b.State == "drain" })
	p.judge(v, note, 0, "leaving, with connections that are drained", func(b *Backend) bool { return !b.Configured })
}

// freshConnect is for how long a failed connect says something of a backend. One
// that is rarely asked, such as a backup, may get no other for days.
const freshConnect = time.Minute

// refuses reports whether connects for clients fail of a backend that checks have
// found up.
func (b *Backend) refuses(at time.Time) bool {
	return b.Configured && b.Health == "up" && !b.isSetAside() && b.EjectedUntil.IsZero() &&
		b.ConnectError != "" && b.ConnectAt.After(b.HealthSince) && at.Sub(b.ConnectAt) < freshConnect
}

// maxNamed is how many backends are named in a sentence.
const maxNamed = 3

// judge tells of how many backends something is so, and of which if they are few.
func (p *Pool) judge(v *verdict, l level, of int, what string, is func(*Backend) bool) {
	var names []string
	n := 0
	for i := range p.Backends {
		if b := &p.Backends[i]; is(b) {
			if n++; n <= maxNamed {
				names = append(names, label(b.Address))
			}
		}
	}
	switch {
	case n == 0:
		return
	case n <= maxNamed:
		what += " (" + strings.Join(names, ", ") + ")"
	}
	if of > 0 {
		v.add(l, "%s of %s %s", amount(uint64(n)), amount(uint64(of)), what)
	} else {
		v.add(l, "%s %s", amount(uint64(n)), what)
	}
}

// judgeRefusals tells of clients who were turned away lately; where is a word on
// that, with a comma behind it, or empty.
func judgeRefusals(v *verdict, list []Refusal, where string, window time.Duration) {
	var (
		n       uint64
		reasons []string
	)
	for _, r := range list {
		if r.Recent > 0 && !r.ByClient {
			n += r.Recent
			reasons = append(reasons, r.Reason)
		}
	}
	if n > 0 {
		v.add(warn, "%s turned away %sin the last %s (%s)", plural(n, "client", "clients"), where, minutes(window), strings.Join(reasons, ", "))
	}
}

// level is how bad a backend is off.
func (b *Backend) level(at time.Time) level {
	switch {
	case !b.Configured:
		return note
	case b.State == "maint":
		return note
	case b.Health == "down":
		return bad
	case !b.EjectedUntil.IsZero(), b.refuses(at), b.full(), b.CheckError != "", b.NameError != "":
		return warn
	case b.isSetAside(), b.Weight == 0, !b.Available:
		return note
	}
	return well
}
