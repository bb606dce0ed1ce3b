package tcplb

import (
	"sync/atomic"
	"time"
)

// dialBuckets are upper bounds in seconds for a pool's connects and probes: from
// loopback to a timeout.
var dialBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// durationBuckets are upper bounds in seconds for a pool's connections: from one
// request to days.
var durationBuckets = []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400, 86400}

// backendDialBuckets is the one bound that each backend has: a connect that takes
// longer is slow for its client to notice. A scrape repeats it for every backend.
var backendDialBuckets = []float64{.1}

// histogram counts durations in buckets. Observing is lock-free; the buckets
// are fixed when it is made.
type histogram struct {
	bounds []float64       // seconds, ascending
	counts []atomic.Uint64 // and one more, of what is above all of them
	nanos  atomic.Int64    // sum of all observations
	whole  *histogram      // that of which this is a part, and which counts the same; nil = none
}

func (h *histogram) init(bounds []float64, whole *histogram) {
	h.bounds, h.counts, h.whole = bounds, make([]atomic.Uint64, len(bounds)+1), whole
}

// poolTimes are those of all of a pool's backends together, of which some may
// have left it, and of the clients that waited for one.
type poolTimes struct{ dial, check, duration, wait *histogram }

func newPoolTimes() poolTimes {
	return poolTimes{newHistogram(dialBuckets), newHistogram(dialBuckets), newHistogram(durationBuckets), newHistogram(waitBuckets)}
}

func newHistogram(bounds []float64) *histogram {
	h := new(histogram)
	h.init(bounds, nil)
	return h
}

func (h *histogram) observe(d time.Duration) {
	s, i := d.Seconds(), 0
	for i < len(h.bounds) && s > h.bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.nanos.Add(int64(d))
	if h.whole != nil {
		h.whole.observe(d)
	}
}

// snapshot returns the counts as Prometheus wants them, cumulative by upper
// bound, the number of all, and their sum in seconds.
func (h *histogram) snapshot() (buckets []uint64, count uint64, sum float64) {
	buckets = make([]uint64, len(h.bounds))
	for i := range h.counts {
		count += h.counts[i].Load()
		if i < len(buckets) {
			buckets[i] = count
		}
	}
	return buckets, count, time.Duration(h.nanos.Load()).Seconds()
}
