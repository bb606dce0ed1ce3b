package tcplb

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
)

// generation is one config's part in a pool: the settings of all its handlers
// of that name, and the pickers over its backends. It is prepared while the
// config is provisioned, touches shared state only between start and stop, and
// is immutable but for its members and its pickers.
type generation struct {
	name         string
	fingerprint  string // the settings in full, to tell two handlers of one name apart
	config       []member
	begins       ApproachConfig // of members that say nothing of it, and …
	approach     *approach      // … what it makes; nil = a bare connect
	policy       SelectionPolicy
	policyName   string
	retries      int
	tryDuration  time.Duration
	tryInterval  time.Duration
	checks       checkSettings
	inquiry      inquiry
	passive      passiveSettings
	closeAfter   *time.Duration // what connections get once their backend is down; nil = they go on
	dialTimeout  time.Duration
	idleTimeout  time.Duration // 0 = never
	lifetime     lifetime
	drainTimeout time.Duration
	slowStart    time.Duration // 0 = none

	ctx    caddy.Context // the handler's, for events
	events *caddyevents.App
	voice
	dial dialFunc

	// standing is whether the pool had an available backend when g took over:
	// until g's own are checked, that holds for them.
	standing bool
	follows  bool // it had, whatever was known of it

	startOnce, stopOnce sync.Once
	started             chan struct{} // closed by start
	stopped             chan struct{} // closed by stop

	sources    []*dynamicSource
	endSources context.CancelFunc // nil before the start
	refuse     func(target) error // what may not be a backend; nil = anything may

	pool   *pool                      // set by the registry when the generation starts
	roster atomic.Pointer[[]enrolled] // see members

	pickers  atomic.Pointer[tiers]
	buildMu  sync.Mutex  // held while building
	outdated atomic.Bool // availability changed since the last build began
}

// member is a backend as a config or a source says it.
type member struct {
	target         target
	weight         int       // 0–256; 0 = no new connections
	backup         bool      // only while no other is available
	maxConnections int       // 0 = no limit
	healthPort     uint16    // probed in place of the others'; 0 = the same
	approach       *approach // nil = a bare connect
	source         string    // what found it; empty = the config names it
}

// enrolled is a member of a running generation.
type enrolled struct {
	member
	Backend *Backend
}

// members returns those of the generation at this moment, the config's first and
// in its order; none before it starts. The list is not to be changed.
func (g *generation) members() []enrolled {
	if list := g.roster.Load(); list != nil {
		return *list
	}
	return nil
}

// voice is what it takes to log for a pool, when its config may be gone.
type voice struct {
	logger, access *zap.Logger
	accessLog      bool
	logConnects    bool
	limit          int64 // connections; 0 = the process's
	clientLimit    int64 // connections of one client; 0 = none
	logInterval    time.Duration
}

// setLogger gives the access log of each pool a name of its own, by which Caddy's
// log option can tell them apart.
func (g *generation) setLogger(l *zap.Logger) {
	g.logger, g.access = l, l.Named("access").Named(g.name)
}

// start brings the generation into its pool, unless it was stopped before.
func (g *generation) start() {
	g.startOnce.Do(func() {
		registry.start(g)
		g.startSources()
		close(g.started)
	})
}

// stop takes the generation out of its pool. It may be called again, and
// without a start.
func (g *generation) stop() {
	g.stopOnce.Do(func() {
		g.startOnce.Do(func() {})
		close(g.stopped)
		if isClosed(g.started) {
			g.endSources()
			registry.stop(g)
			g.awaitSources()
		}
	})
}

// live returns the generation to serve a new connection of g's handler. While
// g runs, that is g. Listeners accept a little earlier, when other apps of the
// config have yet to start, and a little longer: then it is the generation that
// runs at the time, and if there is none g as soon as it starts, or g even
// though it has ended. It is nil if g's config failed.
func (g *generation) live() *generation {
	if isClosed(g.started) && !isClosed(g.stopped) {
		return g
	}
	if newest := registry.newest(g.name); newest != nil {
		return newest
	}
	select {
	case <-g.started:
	case <-g.stopped:
		if !isClosed(g.started) {
			return nil
		}
	}
	return g
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// inherit makes the first pickers, with the positions of the generation before.
func (g *generation) inherit(prev tiers) {
	g.buildMu.Lock()
	defer g.buildMu.Unlock()
	g.buildLocked(prev)
}

// rebuild makes new pickers. Calls that come while one is being built are
// served by one further build.
func (g *generation) rebuild() {
	g.outdated.Store(true)
	g.catchUp()
}

// rebuildNow is rebuild, but returns when the picker is that of this moment or
// of a later one.
func (g *generation) rebuildNow() {
	g.outdated.Store(true)
	g.buildMu.Lock()
	if g.outdated.Swap(false) {
		g.buildLocked(g.currentTiers())
	}
	g.buildMu.Unlock()
	g.catchUp()
}

func (g *generation) catchUp() {
	for g.outdated.Load() && g.buildMu.TryLock() {
		for g.outdated.Swap(false) {
			g.buildLocked(g.currentTiers())
		}
		g.buildMu.Unlock()
	}
}
