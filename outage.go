package tcplb

import (
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// outage is whether a pool is without an available backend.
type outage struct {
	mu     sync.Mutex
	began  time.Time // zero = there is none
	before uint64    // clients that had been turned away by then
}

// update returns what has changed, and what there was to the outage that ended.
func (o *outage) update(available bool, turnedAway uint64) (began, ended bool, lasted time.Duration, missed uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch on := !o.began.IsZero(); {
	case !available && !on:
		o.began, o.before = time.Now(), turnedAway
		return true, false, 0, 0
	case available && on:
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
	began, ended, lasted, missed := p.outage.update(g.hasAvailable(), p.closed[reasonNoBackend].Load())
	switch {
	case began:
		g.logger.Warn("no backend is available, clients are turned away or wait",
			zap.String("lb", p.name), zap.Int("backends", len(g.members)))
	case ended:
		g.logger.Info("a backend is available again",
			zap.String("lb", p.name), zap.Duration("outage", lasted), zap.Uint64("clients_turned_away", missed))
	}
}

func (g *generation) hasAvailable() bool {
	for _, m := range g.members {
		if m.Backend.Available() {
			return true
		}
	}
	return false
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
		zap.Uint64("cut_by_drain_timeout", t.cut),
		zap.Uint64("no_backend", p.closed[reasonNoBackend].Load()),
		zap.Uint64("max_connections", p.closed[reasonMaxConnections].Load()),
		zap.Uint64("received_bytes", t.received),
		zap.Uint64("sent_bytes", t.sent))
}
