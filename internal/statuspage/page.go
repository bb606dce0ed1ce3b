// Package statuspage draws what a balancer knows of itself as one HTML page, for
// whoever has to find out what is wrong. It is given values: it holds no lock,
// asks nobody, and all of the text that it is given may be hostile.
package statuspage

import "time"

// Page is the state of a process at one moment.
type Page struct {
	Host    string
	At      time.Time
	Started time.Time     // the process
	Loaded  time.Time     // its config
	Every   time.Duration // the page is fetched anew that often; 0 = it is not
	Window  time.Duration // how far back histories go
	Exiting bool

	Files, MaxFiles int64

	TurnedAway []Refusal // by the listeners, before they came to a pool

	Pools []Pool // by name
}

// Pool is one pool.
type Pool struct {
	Name       string
	Configured bool      // false = no running config has it, its connections are being drained
	DrainUntil time.Time // … until then
	Policy     string
	Checks     string // what is checked, how often
	Patience   time.Duration
	Outage     *Outage // nil = there is none

	Connections, MaxConnections int64 // that it serves, and may at most; 0 = no limit
	Waiting                     int64 // of those, for a backend

	Total   Traffic // since the pool began
	Refused []Refusal
	Sources []Source

	Backends []Backend // in the config's order, then what has left it
	History  []Moment  // oldest first
}

// Outage is a time without an available backend.
type Outage struct {
	Since      time.Time
	Wanted     bool // all backends have been set aside
	TurnedAway uint64
}

// Traffic counts connections and bytes.
type Traffic struct {
	Connections, Errors, Retries uint64
	Received, Sent               uint64 // from and to clients
}

// Refusal is how many clients ended for a reason without having had a backend.
type Refusal struct {
	Reason        string
	Recent, Total uint64
	ByClient      bool // it was the client who left
}

// Source is where backends come from that come and go.
type Source struct {
	Name     string
	Backends int
	Failing  time.Time // since then; zero = it is not
	Error    string
}

// Backend is one backend.
type Backend struct {
	Address    string
	Source     string // what found it; empty = the config names it
	Configured bool
	Available  bool // new connections may go to it
	Backup     bool

	Health      string    // up, down or unchecked
	HealthSince time.Time // zero = it has never changed
	Checked     time.Time // zero = it has not been
	CheckError  string
	NameError   string // of lookups, while old addresses serve

	State           string    // by hand: ready, drain or maint
	StateSince      time.Time // of one other than ready
	DrainUntil      time.Time // when its connections are cut; zero = they are not
	EjectedUntil    time.Time // zero = it is not
	Weight          int64     // the config's
	EffectiveWeight float64

	Open, Connecting int64
	MaxConnections   int64 // 0 = no limit

	Total        Traffic
	Pace         *Pace // nil = not known yet
	ConnectError string
	ConnectAt    time.Time
}

// Pace is so much in a second.
type Pace struct {
	Connections, Errors, Received, Sent float64
}

// Moment is a part of a pool's history: how many there were at its end, and what
// there was in a second of it.
type Moment struct {
	At                           time.Time
	Open, Waiting                float64
	New, Received, Sent, Refused float64
}

func (b *Backend) full() bool {
	return b.MaxConnections > 0 && b.Open+b.Connecting >= b.MaxConnections
}

func (b *Backend) isSetAside() bool { return b.State != "ready" }

func (p *Pool) count(is func(*Backend) bool) (n int) {
	for i := range p.Backends {
		if is(&p.Backends[i]) {
			n++
		}
	}
	return n
}

// configured returns how many backends the config has, and how many of those are
// available.
func (p *Pool) configured() (available, all int) {
	all = p.count(func(b *Backend) bool { return b.Configured })
	return p.count(func(b *Backend) bool { return b.Configured && b.Available }), all
}
