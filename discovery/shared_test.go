package discovery

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// script is a finder that has all its results written down.
type script struct {
	mu       sync.Mutex
	took     time.Duration // by each lookup
	results  []result      // the last one is for all that follow
	errs     []error
	times    []time.Time // when lookups began
	underWay int
}

func (s *script) find(ctx context.Context, _ *round) (result, error) {
	s.mu.Lock()
	n := min(len(s.times), len(s.results)-1)
	s.times = append(s.times, time.Now())
	s.underWay++
	if s.underWay > 1 {
		panic("lookups overlap")
	}
	s.mu.Unlock()
	var err error
	select {
	case <-time.After(s.took):
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.underWay--
	if err != nil {
		return result{}, err
	}
	return s.results[n], s.errs[n]
}

func (s *script) then(r result, err error) *script {
	s.results, s.errs = append(s.results, r), append(s.errs, err)
	return s
}

// waits are the times from each lookup to the next.
func (s *script) waits() (waits []time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 1; i < len(s.times); i++ {
		waits = append(waits, s.times[i].Sub(s.times[i-1]))
	}
	return waits
}

func one(address string, ttl time.Duration) result {
	return result{found: []Found{{Address: address}}, ttl: ttl}
}

// updates collects what a source says.
type updates struct {
	mu  sync.Mutex
	all [][]Found
}

func (u *updates) add(found []Found) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all = append(u.all, found)
}

func (u *updates) addresses() (all [][]string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, found := range u.all {
		all = append(all, addressesOf(found))
	}
	return all
}

// running runs a source for so long.
func running(t testing.TB, l *lookups, time time.Duration) *updates {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time)
	defer cancel()
	var u updates
	l.run(ctx, u.add)
	return &u
}

// observeLog has the log's lines kept.
func observeLog(t testing.TB) *observer.ObservedLogs {
	t.Helper()
	core, lines := observer.New(zap.InfoLevel)
	before := sourcesLog
	sourcesLog = func() *zap.Logger { return zap.New(core) }
	t.Cleanup(func() { sourcesLog = before })
	return lines
}

func between(t testing.TB, low, high, wait time.Duration) {
	t.Helper()
	require.GreaterOrEqual(t, wait, low)
	require.LessOrEqual(t, wait, high)
}

func TestWhenTheNextLookupIs(t *testing.T) {
	for _, c := range []struct {
		name      string
		ttl       time.Duration
		low, high time.Duration
	}{
		{"after the refresh", forever, 24 * time.Second, 30 * time.Second},
		{"after the TTL if that is less", 10 * time.Second, 8 * time.Second, 10 * time.Second},
		{"after a second at least", 0, time.Second, time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := new(script).then(one("10.0.0.1:1", c.ttl), nil)
				began := time.Now()
				u := running(t, newLookups("a", 30*time.Second, nil, s), 10*time.Minute)
				require.Equal(t, began, s.times[0], "the first is at once")
				differ := make(map[time.Duration]bool)
				for _, wait := range s.waits() {
					between(t, c.low, c.high, wait)
					differ[wait] = true
				}
				require.True(t, len(differ) > 5 || c.low == c.high, "not in step with others for ever")
				require.Equal(t, [][]string{{"10.0.0.1:1"}}, u.addresses(), "told once")
			})
		})
	}
}

// TestTroubleIsLookedIntoSoon has failures, and then an answer.
func TestTroubleIsLookedIntoSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := observeLog(t)
		failure := errors.New("no server")
		s := new(script).then(one("10.0.0.1:1", forever), nil)
		for range 7 {
			s.then(result{}, failure)
		}
		s.then(one("10.0.0.1:1", forever), nil).then(one("10.0.0.2:1", forever), nil).then(result{}, errNone)
		l := newLookups("a db.internal 1", 30*time.Second, nil, s)
		u := running(t, l, 10*time.Minute)
		waits := s.waits()
		between(t, 24*time.Second, 30*time.Second, waits[0])
		for i, most := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
			between(t, max(time.Second, most*time.Second*4/5), most*time.Second, waits[1+i])
		}
		between(t, 24*time.Second, 30*time.Second, waits[8])
		require.Equal(t, [][]string{{"10.0.0.1:1"}, {"10.0.0.2:1"}}, u.addresses(), "trouble changes nothing")

		require.Equal(t, 3, lines.Len(), "one for each change")
		require.Equal(t, "a source of backends fails, or is empty: what it found last serves on", lines.All()[0].Message)
		require.Equal(t, zap.WarnLevel, lines.All()[0].Level)
		fields := lines.All()[0].ContextMap()
		require.Equal(t, "a db.internal 1", fields["source"])
		require.Equal(t, "no server", fields["error"])
		require.Equal(t, zap.InfoLevel, lines.All()[1].Level)

		status := l.report()
		require.Equal(t, "a db.internal 1", status.Source)
		require.Equal(t, 1, status.Backends)
		require.Equal(t, errNone.Error(), status.Error)
		require.False(t, status.FailingSince.IsZero())
		require.Equal(t, s.times[9], status.Answered)
		require.EqualValues(t, 3, status.Lookups[StatusSuccess])
		require.EqualValues(t, 7, status.Lookups[StatusFailure])
		require.EqualValues(t, len(s.times)-10, status.Lookups[StatusEmpty])
	})
}

func TestAnAnswerInPartIsTakenAndRepeatedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := observeLog(t)
		partly := one("10.0.0.1:1", forever)
		partly.partial = errors.New("AAAA\nfailed")
		s := new(script).then(partly, nil).then(partly, nil).then(one("10.0.0.1:1", forever), nil)
		l := newLookups("a", 30*time.Second, nil, s)
		require.Equal(t, [][]string{{"10.0.0.1:1"}}, running(t, l, time.Nanosecond).addresses())
		require.Equal(t, "AAAA; failed", l.report().Error)
		require.EqualValues(t, 1, l.report().Lookups[StatusPartial])
		require.Contains(t, lines.All()[0].Message, "answers in part")
		running(t, l, time.Minute)
		between(t, time.Second, 2*time.Second, s.waits()[1])
		require.Empty(t, l.report().Error)
		require.True(t, l.report().FailingSince.IsZero())
	})
}

// TestLookupsAreShared has many sources of the same settings, as of many pools or
// of configs that follow each other.
func TestLookupsAreShared(t *testing.T) {
	// Go 1.26 has one race context for all timers of a bubble, and crashes in the
	// race detector where two threads run some of the thousand at the same time.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		s := new(script).then(one("10.0.0.1:1", forever), nil).then(one("10.0.0.2:1", forever), nil)
		s.took = 10 * time.Second
		l := newLookups("a", time.Second, nil, s)
		ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		all := make([]updates, 1000)
		for i := range all {
			wg.Go(func() { l.run(ctx, all[i].add) })
		}
		wg.Wait()
		require.Len(t, s.times, 3, "the third is under way as they end")
		for i := range all {
			require.Equal(t, [][]string{{"10.0.0.1:1"}, {"10.0.0.2:1"}}, all[i].addresses())
		}
		require.EqualValues(t, 2, l.report().Lookups[StatusSuccess], "one that is given up is none")
		require.Zero(t, len(l.turn))

		s.took = time.Hour
		u := running(t, l, time.Nanosecond)
		require.Empty(t, u.addresses())
	})
}

// TestAReloadAsksNobody has a source take over from another.
func TestAReloadAsksNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(script).then(one("10.0.0.1:1", forever), nil)
		l := newLookups("a", 30*time.Second, nil, s)
		running(t, l, 10*time.Second)
		for range 100 {
			require.Equal(t, [][]string{{"10.0.0.1:1"}}, running(t, l, time.Nanosecond).addresses(), "it is told what is known")
		}
		require.Len(t, s.times, 1)

		// One that is given up in the middle leaves the next to begin anew.
		s.took = 20 * time.Second
		running(t, l, 25*time.Second)
		running(t, l, 25*time.Second)
		require.Len(t, s.times, 3)
	})
}

// TestALookupEnds at its time limit, whatever its servers do, and a source at
// once.
func TestALookupEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(script).then(one("10.0.0.1:1", forever), nil)
		s.took = time.Hour
		lines := observeLog(t)
		l := newLookups("a", 30*time.Second, nil, s)
		running(t, l, lookupTimeout+500*time.Millisecond)
		require.EqualValues(t, 1, l.report().Lookups[StatusFailure])
		require.Equal(t, "backends are not found: their source fails, or is empty", lines.All()[0].Message)
		began := time.Now()
		running(t, l, 5*time.Second)
		require.Equal(t, 5*time.Second, time.Since(began))
	})
}
