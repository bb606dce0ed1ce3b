package tcplb

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// outage is whether a pool is without an available backend.
type outage struct {
	mu     sync.Mutex
	began  time.Time // zero = there is none
	barred bool      // it is no outage: that is what was wanted
	before uint64    // clients that had been turned away by then

	// shown is the same for readers, who must not wait for the log; nil = there is none.
	shown atomic.Pointer[outageBegan]
}

type outageBegan struct {
	at     time.Time
	barred bool
	before uint64
}

// outageStatus returns the outage for the status page, nil if there is none.
func (p *pool) outageStatus() *statuspage.Outage {
	began := p.outage.shown.Load()
	if began == nil {
		return nil
	}
	return &statuspage.Outage{Since: began.at, Wanted: began.barred, TurnedAway: p.closed[reasonNoBackend].Load() - began.before}
}

// updateLocked returns what has changed, and what there was to the outage that
// ended.
func (o *outage) updateLocked(now availability, turnedAway uint64) (began, ended bool, lasted time.Duration, missed uint64) {
	switch on := !o.began.IsZero(); {
	case now == noneAvailable && on && o.barred:
		o.barred = false
		return true, false, 0, 0
	case (now == noneAvailable || now == allBarred) && !on:
		o.began, o.before, o.barred = time.Now(), turnedAway, now == allBarred
		return true, false, 0, 0
	case now == someAvailable && on:
		lasted = time.Since(o.began)
		o.began = time.Time{}
		return false, true, lasted, turnedAway - o.before
	}
	return false, false, 0, 0
}

// reportOutage logs when the pool has lost its last backend, and when it has one
// again.
func (p *pool) reportOutage() {
	g := p.newest.Load()
	if g == nil {
		return
	}
	o := &p.outage
	o.mu.Lock() // to the end, so that lines come in order
	defer o.mu.Unlock()
	began, ended, lasted, missed := o.updateLocked(g.availability(), p.closed[reasonNoBackend].Load())
	if began {
		o.shown.Store(&outageBegan{o.began, o.barred, o.before})
	} else if ended {
		o.shown.Store(nil)
	}
	switch {
	case began && o.barred:
		g.logger.Info("no backend takes connections: all are set aside by hand, or by a weight of 0",
			zap.String("lb", p.name), zap.Int("backends", len(g.members())))
	case began:
		g.logger.Warn("no backend is available, clients are turned away or wait",
			zap.String("lb", p.name), zap.Int("backends", len(g.members())))
	case ended:
		g.logger.Info("a backend is available again",
			zap.String("lb", p.name), zap.Duration("outage", lasted), zap.Uint64("clients_turned_away", missed))
	}
}

// availability is that of a pool's backends.
type availability int

const (
	noneAvailable  availability = iota
	allBarred                   // by hand, or by their weights
	untoldOfOthers              // none is that a check has found up, some have yet to be checked
	someAvailable
)

func (g *generation) availability() availability {
	a := noneAvailable
	members := g.members()
	if len(members) == 0 && slices.ContainsFunc(g.sources, func(s *dynamicSource) bool { return !s.told.Load() }) {
		return untoldOfOthers
	}
	barred := 0
	for _, m := range members {
		b := m.Backend
		if b.barred.Load() {
			barred++
		}
		if b.Available() {
			if !g.checks.enabled || b.isChecked() {
				return someAvailable
			}
			a = untoldOfOthers
		}
		if g.checks.initiallyDown && !b.isChecked() && !b.barred.Load() {
			a = untoldOfOthers
		}
	}
	if barred > 0 && barred == len(members) {
		return allBarred
	}
	return a
}

// logLines are lines that are found while a lock is held, and written later.
type logLines []logLine

type logLine struct {
	message string
	fields  []zap.Field
}

func (l *logLines) add(message string, fields ...zap.Field) {
	*l = append(*l, logLine{message, fields})
}

func (l logLines) write(to *zap.Logger) {
	for _, line := range l {
		to.Info(line.message, line.fields...)
	}
}

// logEnd writes a pool's last line. The log of its config is closed by then,
// so it goes to Caddy's default one.
func (p *pool) logEnd(t totals) {
	caddy.Log().Named("tcp_lb").Info("pool ended",
		zap.String("lb", p.name),
		zap.Uint64("connections", t.connections),
		zap.Uint64("cut_by_drain_timeout", t.cut+p.closed[reasonDrainTimeout].Load()),
		zap.Uint64("no_backend", p.closed[reasonNoBackend].Load()),
		zap.Uint64("max_connections", p.closed[reasonMaxConnections].Load()),
		zap.Uint64("max_connections_per_client", p.closed[reasonMaxConnectionsPerClient].Load()),
		zap.Uint64("received_bytes", t.received),
		zap.Uint64("sent_bytes", t.sent))
}
