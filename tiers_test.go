package tcplb

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

const spare, spare2 = "10.0.1.1:80", "10.0.1.2:80"

// withBackups are ordinary backends and backups.
func withBackups(list []BackendConfig, backups ...string) []BackendConfig {
	for _, a := range backups {
		list = append(list, BackendConfig{Address: a, Backup: true})
	}
	return list
}

// Backups serve while no other backend is available, whatever the reason, and
// share as the others do.
func TestBackupsServeWhileNoOtherCan(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) {
		h.Backends = withBackups(backendList(one, two), spare, spare2)
		checksOff(h)
	})
	g.start()
	require.Equal(t, map[string]int{one: 3, two: 3}, pickCounts(g, 6))
	setState(t, t.Name(), one, stateDrain)
	require.Equal(t, map[string]int{two: 6}, pickCounts(g, 6), "one is enough")
	setHand(t, t.Name(), two, handChange{weight: new(0)})
	require.Equal(t, map[string]int{spare: 3, spare2: 3}, pickCounts(g, 6))
	setState(t, t.Name(), spare, stateMaint)
	setState(t, t.Name(), spare2, stateMaint)
	require.Empty(t, pickCounts(g, 6))
	setState(t, t.Name(), one, stateReady)
	require.Equal(t, map[string]int{one: 6}, pickCounts(g, 6))
}

// The moment of a verdict is enough: no picker need have been made of it.
func TestBackupServesBeforeThePickersAreNew(t *testing.T) {
	f := newFakeNet()
	g, _ := testGeneration(t, f, func(h *Handler) {
		h.Backends = withBackups(backendList(one), spare)
		checksOff(h)
	})
	g.start()
	g.members()[0].Backend.setHealthy(false)
	require.Equal(t, spare, choice(g).address)
	g.members()[0].Backend.setHealthy(true)
	require.Equal(t, one, choice(g).address)
}

// A retry reaches the backups once all others have failed, within lb_retries.
func TestRetriesReachBackups(t *testing.T) {
	for retries, want := range map[int]string{1: "", 2: spare} {
		f := newFakeNet()
		down(f, one, two)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = withBackups(backendList(one, two), spare)
			h.LoadBalancing = &LoadBalancing{Retries: new(retries)}
			checksOff(h)
		})
		g.start()
		l, err := connect(g)
		require.Equal(t, 1+retries, l.attempts)
		if want == "" {
			require.ErrorIs(t, err, errNoBackend)
			require.Empty(t, f.times(spare))
		} else {
			require.NoError(t, err)
			require.Equal(t, want, l.backend.address)
			l.release()
		}
		g.stop()
	}
}

// A backend that a reload makes a backup takes no more, and the other way round;
// its connections go on.
func TestReloadMovesBetweenTiers(t *testing.T) {
	f := newFakeNet()
	run := func(list []BackendConfig) *generation {
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = list; checksOff(h) })
		g.start()
		return g
	}
	old := run(withBackups(backendList(one), spare))
	l, err := connect(old)
	require.NoError(t, err)
	require.Equal(t, one, l.backend.address)
	next := run(withBackups(backendList(spare), one))
	old.stop()
	require.EqualValues(t, 1, l.backend.Load())
	require.Equal(t, map[string]int{spare: 4}, pickCounts(next, 4))
	l.release()
	next.stop()
}

// A pool of backups alone is served by them.
func TestOnlyBackups(t *testing.T) {
	g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = withBackups(nil, spare, spare2); checksOff(h) })
	g.start()
	require.Equal(t, map[string]int{spare: 2, spare2: 2}, pickCounts(g, 4))
}

// Clients who wait are served by a backup that comes up, and not by it any more
// once the others are back.
func TestOutageEndsWithABackup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one, spare)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = withBackups(backendList(one), spare)
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(time.Hour), TryInterval: caddy.Duration(time.Hour)}
		})
		g.start()
		synctest.Wait()
		time.AfterFunc(time.Minute, func() { f.fail(spare, nil) })
		l, err := connect(g)
		require.NoError(t, err)
		require.Equal(t, spare, l.backend.address)
		l.release()
		f.fail(one, nil)
		time.Sleep(time.Minute)
		require.Equal(t, map[string]int{one: 3}, pickCounts(g, 3))
		g.stop()
	})
}

// A client whose connect failed reaches a backup, with a limit on the ordinary
// backend as without.
func TestFailedConnectsReachTheBackupBesideALimit(t *testing.T) {
	for _, limit := range []int{0, 1} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeNet()
				g, _ := testGeneration(t, f, func(h *Handler) {
					h.Backends = withBackups(limited(limit, one), spare)
					h.LoadBalancing = waitsFor(30 * time.Second)
					checksOff(h)
				})
				f.hanging[one] = true
				g.start()
				var clients []*queued
				for range 4 {
					clients = append(clients, lineUp(g))
				}
				for _, c := range clients {
					<-c.done
					require.True(t, c.isServed(), "%v", c.err)
					require.Equal(t, spare, c.backend.address)
					c.release()
				}
				g.stop()
			})
		})
	}
}
