package tcplb

import (
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

// collector reads the state of all pools at each scrape. One for the process is
// registered with every config, so that counters go on over reloads.
type collector struct{}

// description is that of a metric of backends or of pools.
type description struct {
	*prometheus.Desc
	label string // that it has beside lb and backend; "" = none
	pool  bool   // it has no backend
}

// allDescriptions are filled by those below.
var allDescriptions []*prometheus.Desc

func describeWith(labels []string, name, help string) *prometheus.Desc {
	d := prometheus.NewDesc("tcp_lb_"+name, help, labels, nil)
	allDescriptions = append(allDescriptions, d)
	return d
}

// describe describes a metric of a backend, with one more label or none.
func describe(name, help string, label ...string) description {
	d := description{Desc: describeWith(append([]string{"lb", "backend"}, label...), name, help)}
	if len(label) > 0 {
		d.label = label[0]
	}
	return d
}

// describePool describes a metric of a pool.
func describePool(name, help string) description {
	return description{Desc: describeWith([]string{"lb"}, name, help), pool: true}
}

var (
	descHealthy          = describe("backend_healthy", "Whether the backend's health checks say it is up (1) or down (0).")
	descChecked          = describe("backend_checked", "Whether health checks say that (1), or the backend is taken to be up without (0), since they are off or have yet to tell.")
	descWeight           = describe("backend_weight", "Weight of the backend in the running config; 0 if no new connections go to it, or once it left the config and is being drained.")
	descEffectiveWeight  = describe("backend_effective_weight", "Weight that holds: the one that was set by hand, else the config's, and of that what a slow start leaves; 0 if no new connections go to the backend, by that, its state, or since it left the config.")
	descState            = describe("backend_state", "Whether the backend is in the state (1), which is set by hand, or not (0).", "state")
	descMaxConnections   = describe("backend_max_connections", "Connections that the backend may have at once, open or connecting; 0 = no limit.")
	descChecks           = describe("health_checks_total", "Finished health checks.", "status")
	descCheckDuration    = describe("health_check_duration_seconds", "Time that health checks took.")
	descTransitions      = describe("health_transitions_total", "Changes of the backend's health.", "to")
	descEjected          = describe("backend_ejected", "Whether the backend is taken out for a while since clients' connections failed (1) or not (0); only with fail_duration.")
	descEjections        = describe("ejections_total", "Times that the backend was taken out since clients' connections failed; only with fail_duration.")
	descConnections      = describe("connections_total", "Connections that were connected to the backend.")
	descActive           = describe("connections_active", "Connections that are open to the backend.")
	descErrors           = describe("connection_errors_total", "Failed connects to the backend, and connections refused without one.", "error_type")
	descClosed           = describe("connections_closed_total", "Connections that ended.", "reason")
	descDuration         = describe("connection_duration_seconds", "Time from a connection's reaching tcp_lb to its end.")
	descDialDuration     = describe("dial_duration_seconds", "Time that successful connects to the backend took.")
	descRetries          = describe("retries_total", "Connects to another backend after one to this backend failed.")
	descReceived         = describe("received_bytes_total", "Bytes received from clients and delivered to the backend.")
	descSent             = describe("sent_bytes_total", "Bytes received from the backend and delivered to clients.")
	descTransitionTime   = describe("health_last_transition_timestamp_seconds", "Unix time of the last change of the backend's health; 0 = none yet.")
	descPoolConnections  = describePool("pool_connections", "Connections that the pool is serving: open, connecting, or waiting for a backend.")
	descPoolLimit        = describePool("pool_max_connections", "Connections that the pool serves at most: its max_connections, or what the process's files allow if that is less.")
	descWaiting          = describePool("waiting_connections", "Clients that wait for a backend: for one to be available, or for a place at one.")
	descWaitTime         = describePool("wait_duration_seconds", "Time that clients have waited for a backend, of those that did, served or not.")
	descPoolDuration     = describePool("pool_connection_duration_seconds", "Time from a connection's reaching tcp_lb to its end, of all backends of the pool.")
	descPoolDialDuration = describePool("pool_dial_duration_seconds", "Time that successful connects took, of all backends of the pool.")
	descPoolCheckTime    = describePool("pool_health_check_duration_seconds", "Time that health checks took, of all backends of the pool.")
	descFiles            = describeWith(nil, "open_files", "Files that the connections of all pools use.")
	descFileLimit        = describeWith(nil, "max_open_files", "Files that the connections of all pools may use: the process's limit less a reserve.")
	descLookups          = describeWith([]string{"lb", "source", "status"}, "source_lookups_total", "Finished lookups of sources of backends.")
	descSourceBackends   = describeWith([]string{"lb", "source"}, "source_backends", "Backends that the source has found.")
	descSourceFailing    = describeWith([]string{"lb", "source"}, "source_failing", "Whether the last lookup failed or found nothing (1), in whole or in part, so that what was found before serves on.")
	descTurnedAway       = describeWith([]string{"listener", "reason"}, "listener_connections_closed_total", "Connections of a tcp_lb listener that were closed before they reached a tcp_lb handler.")
	backendClosedReasons = []reason{reasonClientClosed, reasonBackendClosed, reasonClientReset, reasonBackendReset, reasonIdleTimeout, reasonDrainTimeout, reasonError, reasonBackendClosedEarly, reasonKilled, reasonBackendDown}
	unservedReasons      = []reason{reasonNoBackend, reasonMaxConnections, reasonMaxConnectionsPerClient, reasonError, reasonClientClosed, reasonClientReset, reasonDrainTimeout}
)

// Describe implements prometheus.Collector.
func (collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range allDescriptions {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (collector) Collect(out chan<- prometheus.Metric) {
	out <- prometheus.MustNewConstMetric(descFiles, prometheus.GaugeValue, float64(files.Process.Used()))
	out <- prometheus.MustNewConstMetric(descFileLimit, prometheus.GaugeValue, float64(files.Process.Limit()))
	for _, e := range listener.Entrances() {
		for reason, n := range e.TurnedAway() {
			out <- prometheus.MustNewConstMetric(descTurnedAway, prometheus.CounterValue, float64(n), e.Address(), reason)
		}
	}
	pools, departedPools, departedBackends := registry.snapshotWithDeparted()
	m := newEmitter(out)
	for _, p := range pools {
		m.of(p.name, "")
		m.pool(p.pool)
		m.unserved(p.pool)
		for _, b := range p.backends {
			m.of(p.name, b.address)
			m.gauges(b)
			m.counters(b)
		}
	}
	for _, p := range departedPools {
		m.of(p.name, "")
		m.unserved(p.pool)
	}
	for key, b := range departedBackends {
		m.of(key.lb, key.backend)
		m.counters(b.Backend)
	}
}

// pool sends how much of the pool's limit is used. A pool that no config has
// any more has no limit.
func (m *emitter) pool(p *pool) {
	m.gauge(descPoolConnections, float64(p.active.Load()))
	m.gauge(descWaiting, float64(p.waiters.waiting.Load()))
	if g := p.newest.Load(); g != nil {
		m.gauge(descPoolLimit, float64(g.connections()))
		for _, s := range g.sourceStatuses() {
			m.source(p.name, s)
		}
	}
}

// source sends how a source of backends fares. It may be anybody's module.
func (m *emitter) source(lb string, s discovery.Status) {
	name := strings.ToValidUTF8(s.Source, "?")
	m.out <- prometheus.MustNewConstMetric(descSourceBackends, prometheus.GaugeValue, float64(s.Backends), lb, name)
	m.out <- prometheus.MustNewConstMetric(descSourceFailing, prometheus.GaugeValue, oneIf(s.Error != ""), lb, name)
	for _, status := range discovery.Statuses {
		m.out <- prometheus.MustNewConstMetric(descLookups, prometheus.CounterValue, float64(s.Lookups[status]), lb, name, status)
	}
}

// unserved sends what became of the pool's clients that never had a backend,
// and how long it took with all of those that had one.
func (m *emitter) unserved(p *pool) {
	m.counter(descErrors, p.closed[reasonNoBackend].Load(), reasonNoBackend.String())
	m.counter(descErrors, p.closed[reasonMaxConnections].Load(), reasonMaxConnections.String())
	m.counter(descErrors, p.closed[reasonMaxConnectionsPerClient].Load(), reasonMaxConnectionsPerClient.String())
	for _, why := range unservedReasons {
		m.counter(descClosed, p.closed[why].Load(), why.String())
	}
	m.histogram(descPoolDuration, p.times.duration)
	m.histogram(descPoolDialDuration, p.times.dial)
	m.histogram(descPoolCheckTime, p.times.check)
	m.histogram(descWaitTime, p.times.wait)
}

// gauges sends how a backend is, of one that is in the config or drained.
func (m *emitter) gauges(b *Backend) {
	m.gauge(descHealthy, oneIf(b.healthy.Load()))
	if b.isWatched() {
		m.gauge(descEjected, oneIf(b.ejected.Load() != 0))
	}
	m.gauge(descChecked, oneIf(b.isChecked()))
	m.gauge(descWeight, float64(b.weight.Load()))
	m.gauge(descEffectiveWeight, b.effectiveWeight())
	for state, name := range stateNames {
		m.gauge(descState, oneIf(b.byHand().state == handState(state)), name)
	}
	m.gauge(descMaxConnections, float64(b.limit.Load()))
	m.gauge(descTransitionTime, float64(b.stats.turnedAt.Load())/float64(time.Second))
}

// counters sends what a backend has done, and its open connections, which close
// the sum.
func (m *emitter) counters(b *Backend) {
	s := &b.stats
	opened, active, closed := s.connections()
	m.counter(descChecks, s.checksPassed.Load(), "success")
	m.counter(descChecks, s.checksFailed.Load(), "failure")
	m.histogram(descCheckDuration, &s.checkTime)
	m.counter(descTransitions, s.turnedUp.Load(), "up")
	m.counter(descTransitions, s.turnedDown.Load(), "down")
	if b.isWatched() {
		m.counter(descEjections, s.ejections.Load())
	}
	m.counter(descConnections, opened)
	m.gauge(descActive, float64(active))
	for e, name := range dialErrorNames {
		m.counter(descErrors, s.errors[e].Load(), name)
	}
	for _, why := range backendClosedReasons {
		m.counter(descClosed, closed[why], why.String())
	}
	if n := closed[reasonClientError]; n > 0 { // most pools never have one
		m.counter(descClosed, n, reasonClientError.String())
	}
	if n := closed[reasonMaxLifetime]; n > 0 || b.aging.Load() {
		m.counter(descClosed, n, reasonMaxLifetime.String())
	}
	m.histogram(descDuration, &s.duration)
	m.histogram(descDialDuration, &s.dialTime)
	m.counter(descRetries, s.retries.Load())
	m.counter(descReceived, s.received.Load())
	m.counter(descSent, s.sent.Load())
}

func oneIf(set bool) float64 {
	if set {
		return 1
	}
	return 0
}

// Interface guard
var _ prometheus.Collector = collector{}
