package tcplb

import (
	"sync/atomic"
	"time"
)

// dialBuckets are upper bounds in seconds for connects and probes: from
// loopback to a timeout.
var dialBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// durationBuckets are upper bounds in seconds for whole connections: from one
// request to days.
var durationBuckets = []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400, 86400}

// maxBuckets is the length of the longest bucket list, and one for +Inf.
const maxBuckets = 17

// histogram counts durations in buckets. Observing is lock-free; the buckets
// are fixed when it is made.
type histogram struct {
	bounds []float64 // seconds, ascending
	counts [maxBuckets]atomic.Uint64
	nanos  atomic.Int64 // sum of all observations
}

func (h *histogram) observe(d time.Duration) {
	s, i := d.Seconds(), 0
	for i < len(h.bounds) && s > h.bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.nanos.Add(int64(d))
}

// histogramSnapshot is a histogram as Prometheus wants it: cumulative counts
// by upper bound.
type histogramSnapshot struct {
	count   uint64
	sum     float64 // seconds
	buckets map[float64]uint64
}

func (h *histogram) snapshot() histogramSnapshot {
	s := histogramSnapshot{buckets: make(map[float64]uint64, len(h.bounds))}
	for i, bound := range h.bounds {
		s.count += h.counts[i].Load()
		s.buckets[bound] = s.count
	}
	s.count += h.counts[len(h.bounds)].Load()
	s.sum = time.Duration(h.nanos.Load()).Seconds()
	return s
}
