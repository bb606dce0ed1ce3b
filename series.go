package tcplb

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// emitter sends the metrics of one pool or backend after the other. A scrape of
// many backends is tens of thousands of series: they share their labels, and are
// made in blocks.
type emitter struct {
	out         chan<- prometheus.Metric
	lb, backend *dto.LabelPair
	others      map[labelPair]*dto.LabelPair

	left struct { // of the last block
		counters   []counterSeries
		gauges     []gaugeSeries
		histograms []histogramSeries
	}
}

// block is how many series are made at once, more than one backend has.
const block = 32

func newEmitter(out chan<- prometheus.Metric) *emitter {
	return &emitter{out: out, others: make(map[labelPair]*dto.LabelPair)}
}

type labelPair struct{ name, value string }

func (l labelPair) dto() *dto.LabelPair { return &dto.LabelPair{Name: &l.name, Value: &l.value} }

// of says whose the next metrics are.
func (m *emitter) of(lb, backend string) {
	m.lb, m.backend = m.other("lb", lb), labelPair{"backend", backend}.dto()
}

// other returns a pair that many series have.
func (m *emitter) other(name, value string) *dto.LabelPair {
	key := labelPair{name, value}
	pair := m.others[key]
	if pair == nil {
		pair = key.dto()
		m.others[key] = pair
	}
	return pair
}

// series is what any metric is: a prometheus.Metric but for its value.
type series struct {
	desc   *prometheus.Desc
	labels [3]*dto.LabelPair // sorted by name, as Prometheus wants them
	n      int
}

// Desc implements prometheus.Metric.
func (s *series) Desc() *prometheus.Desc { return s.desc }

// set says what the series is. The value is that of the description's own label.
func (m *emitter) set(s *series, d description, value []string) {
	s.desc = d.Desc
	if !d.pool {
		s.add(m.backend)
	}
	if d.label != "" && d.label < "lb" {
		s.add(m.other(d.label, value[0]))
	}
	s.add(m.lb)
	if d.label > "lb" {
		s.add(m.other(d.label, value[0]))
	}
}

func (s *series) add(pair *dto.LabelPair) {
	s.labels[s.n] = pair
	s.n++
}

func take[T any](left *[]T) *T {
	if len(*left) == 0 {
		*left = make([]T, block)
	}
	first := &(*left)[0]
	*left = (*left)[1:]
	return first
}

type counterSeries struct {
	series
	value float64
	dto   dto.Counter
}

func (m *emitter) counter(d description, n uint64, label ...string) {
	s := take(&m.left.counters)
	m.set(&s.series, d, label)
	s.value = float64(n)
	s.dto.Value = &s.value
	m.out <- s
}

// Write implements prometheus.Metric.
func (s *counterSeries) Write(out *dto.Metric) error {
	out.Label, out.Counter = s.labels[:s.n], &s.dto
	return nil
}

type gaugeSeries struct {
	series
	value float64
	dto   dto.Gauge
}

func (m *emitter) gauge(d description, v float64, label ...string) {
	s := take(&m.left.gauges)
	m.set(&s.series, d, label)
	s.value = v
	s.dto.Value = &s.value
	m.out <- s
}

// Write implements prometheus.Metric.
func (s *gaugeSeries) Write(out *dto.Metric) error {
	out.Label, out.Gauge = s.labels[:s.n], &s.dto
	return nil
}

type histogramSeries struct {
	series
	count uint64
	sum   float64
	dto   dto.Histogram
}

func (m *emitter) histogram(d description, h *histogram, label ...string) {
	s := take(&m.left.histograms)
	m.set(&s.series, d, label)
	var counts []uint64
	counts, s.count, s.sum = h.snapshot()
	s.dto.SampleCount, s.dto.SampleSum = &s.count, &s.sum
	buckets := make([]dto.Bucket, len(counts))
	s.dto.Bucket = make([]*dto.Bucket, len(counts))
	for i := range buckets {
		buckets[i].UpperBound, buckets[i].CumulativeCount = &h.bounds[i], &counts[i]
		s.dto.Bucket[i] = &buckets[i]
	}
	m.out <- s
}

// Write implements prometheus.Metric.
func (s *histogramSeries) Write(out *dto.Metric) error {
	out.Label, out.Histogram = s.labels[:s.n], &s.dto
	return nil
}

// Interface guards
var (
	_ prometheus.Metric = (*counterSeries)(nil)
	_ prometheus.Metric = (*gaugeSeries)(nil)
	_ prometheus.Metric = (*histogramSeries)(nil)
)
