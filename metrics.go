package tcplb

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// collector reads the state of all pools at each scrape. One for the process is
// registered with every config, so that counters go on over reloads.
type collector struct{}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tcp_lb_"+name, help, append([]string{"lb", "backend"}, labels...), nil)
}

var (
	descHealthy          = describe("backend_healthy", "Whether the backend's health checks say it is up (1) or down (0).")
	descChecked          = describe("backend_checked", "Whether health checks say that (1), or the backend is taken to be up without (0), since they are off or have yet to tell.")
	descWeight           = describe("backend_weight", "Weight of the backend in the running config; 0 if no new connections go to it, or once it left the config and is being drained.")
	descChecks           = describe("health_checks_total", "Finished health checks.", "status")
	descCheckDuration    = describe("health_check_duration_seconds", "Time that health checks took.")
	descTransitions      = describe("health_transitions_total", "Changes of the backend's health.", "to")
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
	descPoolConnections  = prometheus.NewDesc("tcp_lb_pool_connections", "Connections that the pool is serving: open, connecting, or waiting for a backend.", []string{"lb"}, nil)
	descPoolLimit        = prometheus.NewDesc("tcp_lb_pool_max_connections", "Connections that the pool serves at most: its max_connections, or what the process's files allow if that is less.", []string{"lb"}, nil)
	descFiles            = prometheus.NewDesc("tcp_lb_open_files", "Files that the connections of all pools use.", nil, nil)
	descFileLimit        = prometheus.NewDesc("tcp_lb_max_open_files", "Files that the connections of all pools may use: the process's limit less a reserve.", nil, nil)
	descTurnedAway       = prometheus.NewDesc("tcp_lb_listener_connections_closed_total", "Connections of a tcp_lb listener that were closed before they reached a tcp_lb handler.", []string{"listener", "reason"}, nil)
	allDescriptions      = []*prometheus.Desc{descHealthy, descChecked, descWeight, descChecks, descCheckDuration, descTransitions, descTransitionTime, descConnections, descActive, descErrors, descClosed, descDuration, descDialDuration, descRetries, descReceived, descSent, descPoolConnections, descPoolLimit, descFiles, descFileLimit, descTurnedAway}
	backendClosedReasons = []reason{reasonClientClosed, reasonBackendClosed, reasonClientReset, reasonBackendReset, reasonIdleTimeout, reasonDrainTimeout, reasonError, reasonBackendClosedEarly}
	unservedReasons      = []reason{reasonNoBackend, reasonMaxConnections, reasonError, reasonClientClosed, reasonClientReset, reasonDrainTimeout}
)

// Describe implements prometheus.Collector.
func (collector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range allDescriptions {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (collector) Collect(out chan<- prometheus.Metric) {
	out <- prometheus.MustNewConstMetric(descFiles, prometheus.GaugeValue, float64(files.used.Load()))
	out <- prometheus.MustNewConstMetric(descFileLimit, prometheus.GaugeValue, float64(files.limit))
	for _, e := range entrances() {
		for why, name := range turnedAwayNames {
			out <- prometheus.MustNewConstMetric(descTurnedAway, prometheus.CounterValue, float64(e.counts[why].Load()), e.address, name)
		}
	}
	pools, departedPools, departedBackends := registry.snapshotWithDeparted()
	for _, p := range pools {
		m := emitter{out: out, lb: p.name}
		m.pool(p.pool)
		m.unserved(p.pool)
		for _, b := range p.backends {
			m.backend = b.address
			m.gauges(b)
			m.counters(b)
		}
	}
	for _, p := range departedPools {
		m := emitter{out: out, lb: p.name}
		m.unserved(p.pool)
	}
	for key, b := range departedBackends {
		m := emitter{out: out, lb: key.lb, backend: key.backend}
		m.counters(b.Backend)
	}
}

// emitter sends metrics of one pool and backend.
type emitter struct {
	out         chan<- prometheus.Metric
	lb, backend string
}

// pool sends how much of the pool's limit is used. A pool that no config has
// any more has no limit.
func (m *emitter) pool(p *pool) {
	m.out <- prometheus.MustNewConstMetric(descPoolConnections, prometheus.GaugeValue, float64(p.active.Load()), m.lb)
	if g := p.newest.Load(); g != nil {
		m.out <- prometheus.MustNewConstMetric(descPoolLimit, prometheus.GaugeValue, float64(g.connections()), m.lb)
	}
}

// unserved sends what became of the pool's clients that never had a backend.
func (m *emitter) unserved(p *pool) {
	m.counter(descErrors, p.closed[reasonNoBackend].Load(), reasonNoBackend.String())
	m.counter(descErrors, p.closed[reasonMaxConnections].Load(), reasonMaxConnections.String())
	for _, why := range unservedReasons {
		m.counter(descClosed, p.closed[why].Load(), why.String())
	}
}

// gauges sends how a backend is, of one that is in the config or drained.
func (m *emitter) gauges(b *Backend) {
	m.gauge(descHealthy, oneIf(b.healthy.Load()))
	m.gauge(descChecked, oneIf(b.isChecked()))
	m.gauge(descWeight, float64(b.weight.Load()))
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
	m.counter(descConnections, opened)
	m.gauge(descActive, float64(active))
	for e, name := range dialErrorNames {
		m.counter(descErrors, s.errors[e].Load(), name)
	}
	for _, why := range backendClosedReasons {
		m.counter(descClosed, closed[why], why.String())
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

func (m *emitter) counter(d *prometheus.Desc, n uint64, labels ...string) {
	m.out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), append([]string{m.lb, m.backend}, labels...)...)
}

func (m *emitter) gauge(d *prometheus.Desc, v float64) {
	m.out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, m.lb, m.backend)
}

func (m *emitter) histogram(d *prometheus.Desc, h *histogram) {
	s := h.snapshot()
	m.out <- prometheus.MustNewConstHistogram(d, s.count, s.sum, s.buckets, m.lb, m.backend)
}

// Interface guard
var _ prometheus.Collector = collector{}
