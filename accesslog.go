package tcplb

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// minLogInterval keeps lines of what is open rarer than looks at it.
const minLogInterval = time.Second

// accessLogOptions are those in the block of access_log.
var accessLogOptions []option[Handler]

func init() {
	accessLogOptions = []option[Handler]{
		{spec{name: "connects", path: "access_log_connects",
			help: "a line when a connection has its backend, too"},
			asFlag(func(h *Handler) *bool { return &h.AccessLogConnects })},
		{spec{name: "interval", values: "<duration>", path: "access_log_interval", unset: "none",
			help: "and one so often while it is open, with its bytes so far; 1s at least"},
			asDuration(minLogInterval, 0, plain(func(h *Handler) *caddy.Duration { return &h.AccessLogInterval })).shownBy(logIntervalText)},
	}
}

func logIntervalText(h *Handler) string {
	if h.AccessLogInterval == 0 {
		return "none"
	}
	return durationText(h.AccessLogInterval)
}

// asAccessLog is on where its name stands, and may have a block.
func asAccessLog() kind[Handler] {
	k := asFlag(func(h *Handler) *bool { return &h.AccessLog })
	flag := k.read
	k.read = func(p *parser, s spec, h *Handler) error {
		if err := flag(p, s, h); err != nil {
			return err
		}
		own := newParser(p.Dispenser)
		for nesting := p.Nesting(); p.NextBlock(nesting); {
			if err := own.accessLogOption(h); err != nil {
				return err
			}
		}
		return nil
	}
	k.check = checkAccessLog
	k.show = accessLogText
	return k
}

// meantInAccessLog has what is meant by what is no option of the block.
var meantInAccessLog = map[string]string{
	"output": ofLog, "format": ofLog, "level": ofLog, "include": ofLog, "exclude": ofLog, "sampling": ofLog,
	"connect": "connects", "connected": "connects", "opens": "connects", "every": "interval", "period": "interval",
}

const ofLog = "Caddy's global option log says where its lines go, and how"

func (p *parser) accessLogOption(h *Handler) error {
	name := p.Val()
	o := named(accessLogOptions, name)
	if o == nil {
		return p.Errf("access_log: %s", unknown("option of its block", name, namesOf(accessLogOptions), meantInAccessLog))
	}
	if !p.once(o.spec) {
		return p.Errf("access_log: %s is set twice", name)
	}
	if err := readOption(p, o, h); err != nil {
		return fmt.Errorf("access_log: %w", err)
	}
	return nil
}

// checkAccessLog refuses what stands without the log that it is of.
func checkAccessLog(path string, h *Handler) error {
	for _, o := range accessLogOptions {
		if !h.AccessLog && o.kind.show(h) != o.kind.show(new(Handler)) {
			return fmt.Errorf("%s: there is no access log, %s is missing", o.path, path)
		}
	}
	return checkAll(h, accessLogOptions)
}

func accessLogText(h *Handler) string {
	if !h.AccessLog {
		return "off"
	}
	text := []string{"on"}
	if h.AccessLogConnects {
		text = append(text, "connects")
	}
	if h.AccessLogInterval > 0 {
		text = append(text, "interval "+durationText(h.AccessLogInterval))
	}
	return strings.Join(text, ", ")
}

// logConnected says that the client has its backend, where that is wanted.
func (s *session) logConnected() {
	to := s.pool.voice.Load()
	if !to.accessLog || !to.logConnects {
		return
	}
	fields := []zap.Field{
		zap.String("lb", s.pool.name),
		zap.Stringer("client", s.from),
		zap.String("backend", s.backend.address),
		zap.Int("attempts", s.attempts),
		zap.Duration("dial_time", s.took),
	}
	if len(s.failed) > 0 {
		fields = append(fields, zap.Array("failed", s.failed))
	}
	to.access.Info("connected", fields...)
}

// logOpen says how the connection, which is open, fares.
func (s *session) logOpen(to *zap.Logger, now time.Time) {
	received, sent := s.relay.Moved()
	to.Info("open",
		zap.String("lb", s.pool.name),
		zap.Stringer("client", s.from),
		zap.String("backend", s.backend.address),
		zap.Duration("duration", now.Sub(s.began)),
		zap.Duration("idle", s.relay.Idle()),
		zap.Uint64("received_bytes", received),
		zap.Uint64("sent_bytes", sent))
}

// sweep looks now and then which of a pool's open connections are to have a line: one
// timer a pool, and nothing for each connection. The registry guards it.
type sweep struct {
	timer    *time.Timer // nil: no lines are wanted
	interval time.Duration
	last     time.Time // the look before the next
}

// sweepsInInterval is how many looks an interval has, so that a line is late by a
// part of that. Looks are a second apart at least.
const sweepsInInterval = 10

func (w *sweep) pause() time.Duration { return max(minLogInterval, w.interval/sweepsInInterval) }

// setLocked has the lines come so often; 0 = none.
func (w *sweep) setLocked(p *pool, interval time.Duration) {
	if interval == w.interval {
		return
	}
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
	if w.interval = interval; interval == 0 {
		return
	}
	w.last = time.Now()
	var timer *time.Timer
	// Ends by itself, or finds that it was called off; nobody waits for it.
	timer = time.AfterFunc(w.pause(), func() { registry.sweepSessions(p, &timer) })
	w.timer = timer
}

// sweepSessions writes the lines that have become due since the last look.
func (r *poolRegistry) sweepSessions(p *pool, timer **time.Timer) {
	r.mu.Lock()
	w := &p.sweep
	if w.timer != *timer {
		r.mu.Unlock()
		return // called off just as the timer fired
	}
	since, now, interval := w.last, time.Now(), w.interval
	w.last = now
	backends := slices.Collect(maps.Values(p.backends))
	r.mu.Unlock()
	to := p.voice.Load().access
	for _, b := range backends {
		b.visitSessions(func(some []*session) {
			for _, s := range some {
				if s.isDue(since, now, interval) && s.goesOn() {
					s.contain(func() { s.logOpen(to, now) })
				}
			}
		})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if w.timer == *timer {
		w.timer.Reset(w.pause())
	}
}

// goesOn reports whether there is more to come: of one side also when the other has
// closed.
func (s *session) goesOn() bool {
	why := s.relay.Reason()
	return why == relay.None || why.Orderly()
}

// isDue reports whether the connection has got another interval older between the
// two times.
func (s *session) isDue(since, now time.Time, interval time.Duration) bool {
	return now.Sub(s.began)/interval > max(0, since.Sub(s.began))/interval
}
