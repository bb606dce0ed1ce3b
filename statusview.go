package tcplb

import (
	"os"
	"slices"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
	"github.com/caddyserver/caddy/v2"
)

var (
	processStarted = time.Now()
	thisHost, _    = os.Hostname()
)

// statusPage returns how the pools are at this moment, those of the names or all.
func statusPage(names []string, every time.Duration) *statuspage.Page {
	now := time.Now()
	p := &statuspage.Page{
		Host: thisHost, At: now, Started: processStarted, Loaded: recent.lastLoad(), Every: every, Window: historyWindow,
		TurnedAway: recent.turnedAway(now),
		Exiting:    caddy.Exiting(), Files: files.Process.Used(), MaxFiles: files.Process.Limit(),
	}
	for _, v := range registry.snapshot() {
		if len(names) == 0 || slices.Contains(names, v.name) {
			p.Pools = append(p.Pools, v.statusOf())
		}
	}
	return p
}

func (v poolView) statusOf() statuspage.Pool {
	t := v.total()
	s := statuspage.Pool{
		Name: v.name, DrainUntil: v.drainLimit(), Outage: v.outageStatus(),
		Connections: v.active.Load(), Waiting: v.waiters.waiting.Load(),
		Total: statuspage.Traffic{Connections: t.connections, Errors: t.errors, Retries: t.retries, Received: t.received, Sent: t.sent},
	}
	if g := v.newest.Load(); g != nil {
		s.Configured, s.Policy, s.Checks = true, g.policyName, g.checksText()
		s.Patience, s.MaxConnections = g.tryDuration, g.connections()
		for _, from := range g.sourceStatuses() {
			s.Sources = append(s.Sources, statuspage.Source{Name: from.Source, Backends: from.Backends, Failing: from.FailingSince, Error: from.Error})
		}
	} else {
		s.Outage = nil
	}
	for _, b := range v.configured {
		s.Backends = append(s.Backends, b.pageStatus(true))
	}
	inConfig := make(map[*Backend]bool, len(v.configured))
	for _, b := range v.configured {
		inConfig[b] = true
	}
	for _, b := range v.backends {
		if !inConfig[b] {
			s.Backends = append(s.Backends, b.pageStatus(false))
		}
	}
	history, before, known := recent.history(v.name)
	s.History = history
	for why := range v.closed {
		n := v.closed[why].Load()
		if n == 0 {
			continue
		}
		r := statuspage.Refusal{Reason: reason(why).String(), Total: n, ByClient: !turnsAway(reason(why))}
		if known && n > before[why] {
			r.Recent = n - before[why]
		}
		s.Refused = append(s.Refused, r)
	}
	return s
}

func (b *Backend) pageStatus(configured bool) statuspage.Backend {
	a := b.status("")
	h := b.byHand()
	s := statuspage.Backend{
		Address: b.address, Source: a.Source, Configured: configured, Available: b.Available(), Backup: a.Backup,
		Health: a.Health, HealthSince: timeOf(b.stats.turnedAt.Load()), Checked: timeOf(b.lastCheck.Load()), CheckError: b.checkError(a),
		State: a.State, StateSince: h.since, EjectedUntil: timeOf(b.ejected.Load()),
		Weight: a.Weight, EffectiveWeight: a.EffectiveWeight,
		Open: int64(a.Active), Connecting: int64(a.Connecting), MaxConnections: a.MaxConnections,
		Total: statuspage.Traffic{Connections: a.ConnectionsTotal, Errors: a.ErrorsTotal, Received: a.ReceivedBytes, Sent: a.SentBytes},
		Pace:  recent.paceOf(b), ConnectError: a.LastConnectError, ConnectAt: timeOf(b.lastConnect.Load()),
	}
	if s.CheckError == "" {
		s.NameError = b.target.name.troubled()
	}
	if a.Active > 0 {
		s.DrainUntil = b.drainsUntil()
	}
	return s
}

// checkError returns what the last check found wrong, or what keeps checks from
// finding out anything.
func (b *Backend) checkError(a backendStatus) string {
	text := textOf(&b.lastError)
	if b.isChecked() || b.checking.Load() != nil && text != a.LastConnectError {
		return text
	}
	return ""
}

// drainsUntil returns when the connections are cut; zero while they are not drained.
func (b *Backend) drainsUntil() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.drain == nil {
		return time.Time{}
	}
	return b.drainEnd
}

// timeOf returns the time in Unix nanoseconds; zero for 0.
func timeOf(at int64) time.Time {
	if at == 0 {
		return time.Time{}
	}
	return time.Unix(0, at)
}
