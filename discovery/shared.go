package discovery

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

const (
	// lookupTimeout ends a lookup, whatever it still has to ask.
	lookupTimeout = 30 * time.Second
	// lookupAgain is the least time from the end of a lookup to the next one.
	lookupAgain = time.Second
)

// lookups are those of all sources with the same settings, which share them: of
// pools with the same backends, and of configs that follow each other. So a
// reload asks nobody, and knows what was known.
type lookups struct {
	key       string // in shared
	source    string
	refresh   time.Duration
	resolvers []string // none = the system's
	finder    finder
	turn      semaphore // of one: who looks up

	mu       sync.Mutex
	found    []Found
	version  int // of found; 0 = none yet
	next     time.Time
	failures int // lookups in trouble in a row
	status   Status
	told     bool // the log says that there is trouble
}

func newLookups(source string, refresh time.Duration, resolvers []string, f finder) *lookups {
	counts := make(map[string]uint64, len(Statuses))
	for _, s := range Statuses {
		counts[s] = 0
	}
	return &lookups{
		source: source, refresh: refresh, resolvers: resolvers, finder: f, turn: make(semaphore, 1),
		status: Status{Source: source, Lookups: counts},
	}
}

// run is Source.Run.
func (l *lookups) run(ctx context.Context, update func([]Found)) {
	given := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		found, version, wait := l.current(ctx)
		if ctx.Err() != nil {
			return
		}
		if version != given {
			update(slices.Clone(found))
			given = version
		}
		timer.Reset(wait)
	}
}

// current returns the last answer, after a lookup if one is due, and when the
// next one is.
func (l *lookups) current(ctx context.Context) (found []Found, version int, wait time.Duration) {
	if l.turn.acquire(ctx) != nil {
		return nil, 0, 0
	}
	defer l.turn.release()
	if ctx.Err() != nil {
		return nil, 0, 0
	}
	l.mu.Lock()
	due, trouble := !time.Now().Before(l.next), l.failures > 0
	l.mu.Unlock()
	if due {
		l.lookUp(ctx, trouble)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.found, l.version, time.Until(l.next)
}

func (l *lookups) lookUp(ctx context.Context, trouble bool) {
	limited, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	r := newRound(l.servers(), slots)
	if trouble {
		r.slots = troubleSlots
	}
	res, err := l.finder.find(limited, r)
	if ctx.Err() != nil {
		return // given up, and no outcome
	}
	l.mu.Lock()
	tell := l.takeLocked(res, err, time.Now())
	l.mu.Unlock()
	if tell != nil {
		tell()
	}
}

func (l *lookups) servers() servers {
	if len(l.resolvers) > 0 {
		return ownServers(l.resolvers)
	}
	return systemServers()
}

// takeLocked takes the outcome of a lookup over. It returns what is to be called
// unlocked, if not nil, to log it.
func (l *lookups) takeLocked(res result, err error, now time.Time) (tell func()) {
	status := StatusSuccess
	switch {
	case errors.Is(err, errNone):
		status = StatusEmpty
	case err != nil:
		status = StatusFailure
	case res.partial != nil:
		status = StatusPartial
	}
	l.status.Lookups[status]++
	wait := l.refresh
	if err == nil {
		if l.version == 0 || !slices.Equal(l.found, res.found) {
			l.found = res.found
			l.version++
		}
		l.status.Answered, l.status.Backends = now, len(res.found)
		wait, err = min(wait, res.ttl), res.partial
	}
	if err == nil {
		l.failures = 0
		l.next = now.Add(spread(wait))
		return l.recoveredLocked()
	}
	l.failures++
	l.next = now.Add(spread(min(wait, lookupAgain<<min(l.failures-1, 20))))
	return l.troubledLocked(status, err, now)
}

// spread takes up to a fifth off a wait, so that many sources don't ask at the
// same moments for ever.
func spread(wait time.Duration) time.Duration {
	if wait > 0 {
		wait -= rand.N(wait/5 + 1)
	}
	return max(wait, lookupAgain)
}

func (l *lookups) troubledLocked(status string, err error, now time.Time) (tell func()) {
	l.status.Error = oneLine(err)
	if l.status.FailingSince.IsZero() {
		l.status.FailingSince = now
	}
	if l.told {
		return nil
	}
	l.told = true
	message, fields := "backends are not found: their source fails, or is empty", []zap.Field{
		zap.String("source", l.source), zap.String("status", status), zap.String("error", l.status.Error),
	}
	if l.version > 0 {
		message = "a source of backends fails, or is empty: what it found last serves on"
		if status == StatusPartial {
			message = "a source of backends answers in part: where it fails, what it found last serves on"
		}
		fields = append(fields, zap.Int("backends", l.status.Backends), zap.Time("answered", l.status.Answered))
	}
	return func() { sourcesLog().Warn(message, fields...) }
}

func (l *lookups) recoveredLocked() (tell func()) {
	l.status.Error, l.status.FailingSince = "", time.Time{}
	if !l.told {
		return nil
	}
	l.told = false
	fields := []zap.Field{zap.String("source", l.source), zap.Int("backends", l.status.Backends)}
	return func() { sourcesLog().Info("a source of backends answers again", fields...) }
}

// Lookups are of several pools, or outlive them, and so does this.
var sourcesLog = func() *zap.Logger { return caddy.Log().Named("tcp_lb") }

func (l *lookups) report() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Lookups = maps.Clone(s.Lookups)
	return s
}

// shared has the lookups of all settings that a config has.
var shared = caddy.NewUsagePool()

func share(key string, create func() *lookups) (*lookups, error) {
	l, _, err := shared.LoadOrNew(key, func() (caddy.Destructor, error) {
		l := create()
		l.key = key
		return l, nil
	})
	if err != nil {
		return nil, fmt.Errorf("sharing lookups: %w", err)
	}
	return l.(*lookups), nil
}

// giveUp is for a source that is not used any more, or never was.
func (l *lookups) giveUp() error {
	if l == nil {
		return nil
	}
	_, err := shared.Delete(l.key)
	return err
}

// Destruct is for the last one; nothing runs without a source that does.
func (*lookups) Destruct() error { return nil }
