package tcplb

import (
	"maps"
	"sync"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
)

// How far back the histories of pools go that status pages draw, and from moment
// to moment of them.
const (
	historyWindow = 20 * time.Minute
	historyPause  = 5 * time.Second
	historyLength = int(historyWindow / historyPause)
)

// recent is what the status pages draw. It is kept while a running config has such
// a page, over reloads, and takes 29 kB a pool and 120 bytes a backend.
var recent recorder

// recorder looks at all pools now and then.
type recorder struct {
	mu       sync.Mutex
	users    int       // running configs with a status page
	loaded   time.Time // the last of them
	stop     chan struct{}
	done     chan struct{}
	rounds   int
	pools    map[string]*poolHistory
	backends map[*Backend]*pace

	entrances entranceHistory
}

// poolHistory is a ring of moments.
type poolHistory struct {
	of      *pool
	seen    poolCount // at the last of them
	moments []historyMoment
	next    int // where the next moment goes once the ring is full
}

// historyMoment is how a pool was at a time, and what there was since the one
// before.
type historyMoment struct {
	at             time.Time
	seconds        float32
	open, waiting  uint32
	opened         uint32
	received, sent uint64
	unserved       [numReasons]uint32
}

// poolCount is what a pool has counted.
type poolCount struct {
	at       time.Time
	total    totals
	unserved [numReasons]uint64
}

// pace is what a backend has counted, and how fast that grew.
type pace struct {
	at    time.Time
	total totals
	of    statuspage.Pace
	known bool
	round int // of the recorder's, the last that it was there
}

// begin has histories recorded for one config more.
func (r *recorder) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.users++
	r.loaded = time.Now()
	if r.users > 1 {
		return
	}
	r.stop, r.done = make(chan struct{}), make(chan struct{})
	r.pools, r.backends = make(map[string]*poolHistory), make(map[*Backend]*pace)
	r.entrances = entranceHistory{}
	// Owned by the recorder; the last end stops it and waits for it.
	go r.run(r.stop, r.done)
}

// end takes back a begin.
func (r *recorder) end() {
	r.mu.Lock()
	r.users--
	last, done := r.users == 0, r.done
	if last {
		close(r.stop)
		r.pools, r.backends = nil, nil
		r.entrances = entranceHistory{}
	}
	r.mu.Unlock()
	if last {
		<-done
	}
}

func (r *recorder) run(stop <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	ticks := time.NewTicker(historyPause)
	defer ticks.Stop()
	for {
		r.record(stop)
		select {
		case <-ticks.C:
		case <-stop:
			return
		}
	}
}

// record adds a moment to each pool's history.
func (r *recorder) record(stop <-chan struct{}) {
	counts := registry.count()
	r.mu.Lock()
	defer r.mu.Unlock()
	if isClosed(stop) {
		return
	}
	r.rounds++
	r.entrances.update(countEntrances(), time.Now())
	for _, c := range counts {
		h := r.pools[c.name]
		if h == nil || h.of != c.of { // another pool of that name counts from 0
			h = &poolHistory{of: c.of}
			r.pools[c.name] = h
		}
		h.add(c)
		for _, b := range c.backends {
			p := r.backends[b.Backend]
			if p == nil {
				p = new(pace)
				r.backends[b.Backend] = p
			}
			p.round = r.rounds
			p.update(b.total, c.at)
		}
	}
	maps.DeleteFunc(r.backends, func(_ *Backend, p *pace) bool { return p.round != r.rounds })
	maps.DeleteFunc(r.pools, func(_ string, h *poolHistory) bool { return time.Since(h.seen.at) > historyWindow })
}

// counted is what a pool and its backends have counted at a time.
type counted struct {
	poolCount
	name     string
	of       *pool
	open     uint64
	waiting  int64
	backends []backendCount
}

type backendCount struct {
	*Backend
	total totals
}

// count returns what all pools have counted.
func (r *poolRegistry) count() []counted {
	r.mu.Lock()
	pools := make([]*pool, 0, len(r.pools))
	for _, p := range r.pools {
		pools = append(pools, p)
	}
	r.mu.Unlock()
	list := make([]counted, 0, len(pools))
	for _, p := range pools { // with the lock for one at a time
		list = append(list, r.countOf(p))
	}
	return list
}

func (r *poolRegistry) countOf(p *pool) counted {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := counted{name: p.name, of: p, backends: make([]backendCount, 0, len(p.backends))}
	c.at, c.total, c.waiting = time.Now(), p.gone, p.waiters.waiting.Load()
	for why := range c.unserved {
		c.unserved[why] = p.closed[why].Load()
	}
	for _, b := range p.backends {
		t := b.stats.totals()
		_, open, _ := b.stats.connections()
		c.open += open
		c.total = c.total.plus(t.minus(b.settled))
		c.backends = append(c.backends, backendCount{b, t})
	}
	return c
}

// add adds the moment. Of the first, and after a time in which the pool was
// forgotten, nobody knows what came before.
func (h *poolHistory) add(c counted) {
	before := h.seen
	h.seen = c.poolCount
	if before.at.IsZero() || c.total.connections < before.total.connections {
		return
	}
	d := c.total.minus(before.total)
	m := historyMoment{
		at: c.at, seconds: float32(c.at.Sub(before.at).Seconds()),
		open: uint32(c.open), waiting: uint32(max(c.waiting, 0)),
		opened: uint32(d.connections), received: d.received, sent: d.sent,
	}
	for why, n := range c.unserved {
		m.unserved[why] = uint32(n - before.unserved[why])
	}
	if len(h.moments) < historyLength {
		h.moments = append(h.moments, m)
		return
	}
	h.moments[h.next] = m
	h.next = (h.next + 1) % historyLength
}

// update makes p the pace since it was updated last.
func (p *pace) update(total totals, now time.Time) {
	seconds, d := now.Sub(p.at).Seconds(), total.minus(p.total)
	p.known = !p.at.IsZero() && seconds > 0
	if p.known {
		p.of = statuspage.Pace{
			Connections: float64(d.connections) / seconds, Errors: float64(d.errors) / seconds,
			Received: float64(d.received) / seconds, Sent: float64(d.sent) / seconds,
		}
	}
	p.at, p.total = now, total
}

// turnsAway reports whether a client that has no backend is turned away for the
// reason, and does not leave by itself.
func turnsAway(why reason) bool {
	return why != reasonClientClosed && why != reasonClientReset
}

// history returns the pool's, oldest first, and how many clients had ended for each
// reason without a backend when it begins. ok is whether that is known.
func (r *recorder) history(lb string) (list []statuspage.Moment, before [numReasons]uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.pools[lb]
	if h == nil {
		return nil, before, false
	}
	before = h.seen.unserved
	list = make([]statuspage.Moment, 0, len(h.moments))
	for i := range h.moments {
		m := &h.moments[(h.next+i)%len(h.moments)]
		refused := uint64(0)
		for why, n := range m.unserved {
			before[why] -= uint64(n)
			if turnsAway(reason(why)) {
				refused += uint64(n)
			}
		}
		per := func(n uint64) float64 { return float64(n) / max(float64(m.seconds), 0.001) }
		list = append(list, statuspage.Moment{
			At: m.at, Open: float64(m.open), Waiting: float64(m.waiting), New: per(uint64(m.opened)),
			Received: per(m.received), Sent: per(m.sent), Refused: per(refused),
		})
	}
	return list, before, true
}

// paceOf returns the backend's; nil if it is not known yet.
func (r *recorder) paceOf(b *Backend) *statuspage.Pace {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.backends[b]; p != nil && p.known {
		return new(p.of)
	}
	return nil
}

// lastLoad returns when the last config began that has a status page.
func (r *recorder) lastLoad() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.loaded
}
