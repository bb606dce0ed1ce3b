package tcplb

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"go.uber.org/zap"
)

// checkSettings are the active health checks of one config.
type checkSettings struct {
	enabled       bool
	interval      time.Duration // from probe to probe, start to start
	fastInterval  time.Duration // the same while a verdict is changing, and just after it went down
	timeout       time.Duration
	passes, fails int
	port          uint16 // 0 = the backend's own
	asks          string // what they ask of a backend
	text          string // which kind of check that is, for the log
	initiallyDown bool   // until the first has passed
}

// verdict is the state of a backend's checks. The zero value is that of a new
// backend: up until the first result, which decides alone.
type verdict struct {
	down    bool
	run     int  // results in a row that speak against the verdict
	settled bool // a first result came in
}

// next returns the verdict after one more result.
func (v verdict) next(passed bool, passes, fails int) verdict {
	if !v.settled {
		return verdict{down: !passed, settled: true}
	}
	if passed == !v.down {
		v.run = 0
		return v
	}
	v.run++
	needed := fails
	if v.down {
		needed = passes
	}
	if v.run >= needed {
		return verdict{down: !v.down, settled: true}
	}
	return v
}

// pause returns the time from a probe's start to that of the next. Of a backend
// that is down for so long it is the fast interval at first, twice that after
// it, and so on up to the interval.
func (s checkSettings) pause(v verdict, downFor time.Duration) time.Duration {
	switch {
	case v.run > 0:
		return s.fastInterval
	case v.down:
		return min(s.fastInterval+downFor, s.interval)
	default:
		return s.interval
	}
}

// Probes that are asked for come no closer than this, or the fast interval.
const (
	wantedSpacing  = 100 * time.Millisecond // somebody waits for a backend that is down
	suspectSpacing = 10 * time.Millisecond  // connects fail, but the last probe that they caused passed
)

// checker probes one backend for as long as a running config names it with
// checks on.
type checker struct {
	backend  *Backend
	settings atomic.Pointer[assignment] // whose checks, dial and logger hold
	changed  chan struct{}              // settings has another value
	suspect  chan struct{}              // a real connect failed
	wanted   chan struct{}              // a client waits, or was turned away
	cancel   context.CancelFunc         // nil once stopped; guarded by the registry's mutex
	done     chan struct{}
	after    <-chan struct{} // the end of the backend's previous checker; nil = none
	judged   atomic.Bool     // a probe has told

	// The loop's own:
	verdict   verdict
	asked     question // of the last probe
	downSince time.Time
	began     time.Time // when the last probe did
	due       time.Time // when the next is
	slow      bool      // the last probe took longer than promptTime
	needed    bool      // a client has need of the next
	suspected bool      // a failed connect caused the last
}

// checkLocked makes a the settings of b's checker, starting it if need be. The
// registry's mutex must be held.
func (b *Backend) checkLocked(a *assignment) {
	if c := b.checker; c != nil && c.cancel != nil {
		old := c.settings.Swap(a)
		if old.checks != a.checks || old.question() != a.question() {
			signal(c.changed)
		}
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &checker{
		backend: b,
		changed: make(chan struct{}, 1),
		suspect: make(chan struct{}, 1),
		wanted:  make(chan struct{}, 1),
		cancel:  cancel,
		done:    make(chan struct{}),
	}
	if b.checker != nil {
		c.after = b.checker.done
	}
	c.settings.Store(a)
	b.checker = c
	b.checking.Store(c)
	// Owned by the backend; ends by stopCheckingLocked. Only the next checker
	// waits for it: a reload must not.
	go c.run(ctx)
}

// stopCheckingLocked ends b's checker, if it has one. The verdict stays. The
// registry's mutex must be held.
func (b *Backend) stopCheckingLocked() {
	if c := b.checker; c != nil && c.cancel != nil {
		b.checking.Store(nil)
		c.cancel()
		c.cancel = nil
	}
}

// isChecked reports whether healthy is what a probe found out. It is not while
// checks are off or have yet to tell.
func (b *Backend) isChecked() bool {
	c := b.checking.Load()
	return c != nil && c.judged.Load()
}

// checkSoon has the backend probed at once, after a connect to it failed.
func (b *Backend) checkSoon() {
	if c := b.checking.Load(); c != nil && b.healthy.Load() {
		signal(c.suspect)
	}
}

// probeWanted has the backend probed soon if it is down, since a client has
// need of it. It is cheap, for many clients at once.
func (b *Backend) probeWanted() {
	if b.healthy.Load() {
		return
	}
	if c := b.checking.Load(); c != nil {
		signal(c.wanted)
	}
}

// signal wakes the receiver of a channel of capacity 1; one wake-up serves many.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (c *checker) run(ctx context.Context) {
	defer close(c.done)
	defer c.settings.Store(nil) // it may be remembered for long
	if c.after != nil {
		<-c.after
	}
	c.verdict.down = !c.backend.healthy.Load()
	c.downSince = time.Now()
	timer := time.NewTimer(0) // the first probe is at once
	c.due = time.Now()
	defer timer.Stop()
	again := false
	for c.wait(ctx, timer) {
		took, err := c.probe(ctx)
		if ctx.Err() != nil {
			return
		}
		if c.outdated() {
			c.next(timer, 0)
			continue
		}
		first, wasDown, checks := !c.verdict.settled, c.verdict.down, c.settings.Load().checks
		if isScarcity(err) { // which says nothing of the backend
			c.backend.setError(err)
			c.next(timer, checks.fastInterval)
			continue
		}
		if first && !again && relay.IsReset(err) {
			// The first probe decides alone. With a reload it may have met with the
			// end of a listener that another one follows, of this very process.
			again = true
			c.next(timer, min(wantedSpacing, checks.fastInterval))
			continue
		}
		again = false
		c.judge(err, took)
		pause := checks.pause(c.verdict, time.Since(c.downSince))
		c.needed = c.needed && c.verdict.down && c.verdict.run > 0
		switch {
		case c.needed: // and it is coming back
			pause = min(wantedSpacing, pause)
		case (first || wasDown && !c.verdict.down) && pause == checks.interval:
			// Backends of one config start in step, and those that were away together
			// come back so; this takes them out of it.
			pause = spread(pause)
		case c.verdict.down && c.verdict.run == 0 && pause < checks.interval:
			// So do those that went down together.
			pause -= rand.N(pause/4 + 1)
		}
		c.next(timer, pause)
	}
}

// outdated reports whether the last probe asked another question than the next
// will. Then that decides alone, and until it has the verdict stands.
func (c *checker) outdated() bool {
	if c.asked == c.settings.Load().question() {
		return false
	}
	c.verdict = verdict{down: !c.backend.healthy.Load()}
	return true
}

// next sets the timer for the next probe. The interval is from when the last was
// due, or would have been due since: those that waited for a place together, or for
// a process that was stopped, began together, and would stay in step.
func (c *checker) next(timer *time.Timer, pause time.Duration) {
	from := c.began
	if pause > 0 && pause == c.settings.Load().checks.interval {
		from = c.due.Add(from.Sub(c.due).Round(pause)) // its place in the interval
	}
	c.due = from.Add(pause)
	timer.Reset(time.Until(c.due))
}

// wait returns when the next probe is due. It reports false when ctx ended
// first.
func (c *checker) wait(ctx context.Context, timer *time.Timer) bool {
	again := c.suspected && c.verdict.settled && c.verdict.run == 0
	c.suspected = false
	for {
		checks := c.settings.Load().checks
		var spacing time.Duration
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-c.changed:
			pause := spread(checks.pause(c.verdict, time.Since(c.downSince)))
			if c.outdated() {
				pause = 0
			}
			c.due = time.Now().Add(pause)
			timer.Reset(time.Until(c.due))
			continue
		case <-c.suspect:
			if c.verdict.down { // which it was not yet when the connect began
				continue
			}
			c.suspected = true
			if again {
				spacing = min(suspectSpacing, checks.fastInterval)
			}
		case <-c.wanted:
			if !c.verdict.down {
				continue
			}
			c.needed = true
			spacing = min(wantedSpacing, checks.fastInterval)
		}
		if at := c.began.Add(spacing); at.Before(c.due) {
			c.due = at
			timer.Reset(time.Until(at))
		}
	}
}

// spread returns a random part of the interval, the whole at most.
func spread(interval time.Duration) time.Duration {
	return rand.N(interval) + 1
}

// probe makes and closes one connection to the backend, or to its health port,
// as soon as it has a place in the lanes. It returns how long that took.
func (c *checker) probe(ctx context.Context) (took time.Duration, err error) {
	for err = errBrokenOff; err == errBrokenOff && ctx.Err() == nil; {
		place := lanes.enter(ctx, c.queue(), c.wanted)
		if place == nil {
			break
		}
		c.began = time.Now()
		err = place.run(c.connect)
		took = time.Since(c.began)
		c.slow = took >= promptTime || err == errBrokenOff
	}
	return took, err
}

func (c *checker) queue() queue {
	switch {
	case !c.slow:
		return promptQueue
	case c.verdict.down && !c.needed:
		return slowQueue
	default:
		return urgentQueue
	}
}

func (c *checker) connect(ctx context.Context) error {
	a := c.settings.Load()
	c.asked = a.question()
	t := a.approach.to(c.backend.target)
	w, check := a.wire(t), a.inquiry.check
	if a.port != 0 {
		t = t.withPort(a.port)
	}
	if check == nil && w != (checks.Wire{}) {
		check = checks.Connect{}
	}
	if check != nil {
		return a.ask(ctx, t, check, w)
	}
	conn, err := a.dial(ctx, t, a.checks.timeout)
	if err != nil {
		return err
	}
	_ = conn.Close()
	return nil
}

// judge counts a result, and on a transition tells everyone.
func (c *checker) judge(err error, took time.Duration) {
	b, g := c.backend, c.settings.Load().generation
	b.stats.checkTime.observe(took)
	if err == nil {
		b.stats.checksPassed.Add(1)
		b.lastError.Store(nil)
	} else {
		b.stats.checksFailed.Add(1)
		b.setError(err)
	}
	ended := time.Now()

	was := c.verdict
	c.verdict = was.next(err == nil, g.checks.passes, g.checks.fails)
	turned := false
	if c.verdict.down != was.down || !was.settled {
		turned = c.turn(g, err)
	}
	first := !c.judged.Swap(true)
	b.lastCheck.Store(ended.UnixNano()) // who sees it sees what came of it
	if first || turned {
		g.pool.changed()
	}
}

// turn makes the verdict that c came to known. It reports false if c was stopped
// meanwhile, or is to ask something else.
func (c *checker) turn(g *generation, err error) bool {
	outdated, lines, turned := registry.turn(c, err)
	if !turned {
		return false
	}
	c.downSince = time.Now()
	for _, each := range outdated {
		each.rebuild()
	}
	c.backend.logTurn(g, err)
	lines.write(g.logger)
	return true
}

// turn applies the verdict that c came to, down for the error, and returns the
// generations whose pickers that makes outdated. It reports false if c was
// stopped meanwhile, when the backend's state is not c's to change, or is to ask
// something else, of which this says nothing.
func (r *poolRegistry) turn(c *checker, err error) (outdated []*generation, lines logLines, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := c.backend
	if c.cancel == nil || c.asked != c.settings.Load().question() || !b.turnLocked(err) {
		return nil, nil, false
	}
	g := b.pool.newest.Load()
	b.setClosingLocked(g, g != nil)
	b.pool.readmitLastLocked(&lines)
	return slices.Clone(b.pool.generations), lines, true
}

// turnLocked makes the backend down for the error, or up for none, counts that
// and queues its event. It reports false if that it was. The registry's mutex
// must be held: who turns a backend and who takes its checker away are then one
// after the other, and so are the events.
func (b *Backend) turnLocked(err error) bool {
	if b.healthy.Load() == (err == nil) && !(b.untold && err != nil) {
		return false
	}
	// Before anybody picks it. Who had yet to be told of is as slow as it joined.
	if slowly := !b.untold || b.slow.Load() != nil; err == nil && slowly {
		b.pool.startSlowlyLocked(b)
	} else {
		b.slow.Store(nil)
	}
	b.setHealthy(err == nil)
	b.untold = false
	b.stats.turnedAt.Store(time.Now().UnixNano())
	event, data := "healthy", map[string]any{"lb": b.pool.name, "backend": b.address}
	if err == nil {
		b.stats.turnedUp.Add(1)
	} else {
		b.stats.turnedDown.Add(1)
		event, data["error"] = "unhealthy", err.Error()
	}
	b.emitLocked(event, data)
	return true
}

// logTurn logs what turnLocked did, as g's.
func (b *Backend) logTurn(g *generation, err error) {
	lb, backend := zap.String("lb", g.name), zap.String("backend", b.address)
	if err == nil {
		g.logger.Info("backend is up", lb, backend)
	} else {
		g.logger.Warn("backend is down", lb, backend, errorField(err))
	}
	if n := b.events.takeDropped(); n > 0 {
		g.logger.Warn("event handlers are too slow, dropped the oldest events that waited for them", lb, backend, zap.Int("events", n))
	}
}
