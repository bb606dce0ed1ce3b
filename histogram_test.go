package tcplb

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestHistogram(t *testing.T) {
	all := newHistogram([]float64{.001, .005, .01})
	var part, other histogram
	part.init([]float64{.001, .01}, all)
	other.init(nil, all)
	for _, d := range []time.Duration{0, time.Millisecond, time.Millisecond + 1, 10 * time.Millisecond, time.Minute} {
		part.observe(d)
	}
	other.observe(5 * time.Millisecond)

	buckets, count, sum := part.snapshot()
	require.Equal(t, []uint64{2, 4}, buckets, "cumulative, bounds included")
	require.EqualValues(t, 5, count, "what is above all bounds, too")
	require.InDelta(t, 60.012, sum, 1e-6)
	buckets, count, sum = other.snapshot()
	require.Empty(t, buckets)
	require.EqualValues(t, 1, count)
	require.InDelta(t, .005, sum, 1e-9)
	buckets, count, sum = all.snapshot()
	require.Equal(t, []uint64{2, 4, 5}, buckets)
	require.EqualValues(t, 6, count)
	require.InDelta(t, 60.017, sum, 1e-6)
}

// A backend's buckets add up to some of its pool's.
func TestBackendBucketsAreThePools(t *testing.T) {
	require.Subset(t, dialBuckets, backendDialBuckets)
	require.IsIncreasing(t, dialBuckets)
	require.IsIncreasing(t, backendDialBuckets)
	require.IsIncreasing(t, durationBuckets)
}
