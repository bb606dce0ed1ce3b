package files

import (
	"math"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestDivide(t *testing.T) {
	for _, c := range []struct {
		limit                         uint64
		connections, probes, overflow int64
	}{
		{0, math.MaxInt32, 64, 32},
		{math.MaxUint64, math.MaxInt32, 64, 32}, // RLIM_INFINITY
		{16, 10, 2, 1},
		{256, 160, 32, 16},
		{1024, 832, 64, 32},
		{20_000, 19_808, 64, 32},
		{1 << 20, 1<<20 - 192, 64, 32},
	} {
		require.Equal(t, Shares{c.connections, c.probes, c.overflow}, Divide(c.limit), "%d", c.limit)
	}
}

func TestBudget(t *testing.T) {
	b := New(Shares{Connections: 6, Probes: 3, Overflow: 1})
	require.EqualValues(t, 3, b.Connections())
	require.Equal(t, 3, b.Probes())
	require.True(t, b.AcquirePair())
	require.False(t, b.Acquire(5), "all or nothing")
	require.True(t, b.Acquire(4))
	require.EqualValues(t, 6, b.Used())
	require.False(t, b.AcquirePair())
	b.Release(4)
	require.False(t, b.AcquireBelow(1, 2))
	require.True(t, b.AcquireBelow(1, 3))
	b.Release(1)
	b.ReleasePair()
	require.Zero(t, b.Used())

	require.True(t, b.AcquireOverflow())
	require.False(t, b.AcquireOverflow())
	require.EqualValues(t, 1, b.Overflow())
	b.ReleaseOverflow()
	require.True(t, b.AcquireForGuest(3))
	require.False(t, b.AcquireForGuest(1), "half of them at most")
	require.EqualValues(t, 3, b.Guests())
	b.ReleaseOfGuest(3)
	require.Zero(t, b.Used()+b.Overflow()+b.Guests())
}

// Those who borrowed files are asked when there are none, and only then.
func TestBorrowersGiveWay(t *testing.T) {
	b := New(Shares{Connections: 4})
	var asked []int64
	borrowed := int64(1)
	require.True(t, b.Acquire(1))
	b.OnShortage(func(n int64) bool {
		asked = append(asked, n)
		given := min(n, borrowed)
		borrowed -= given
		b.Release(given)
		return given > 0
	})
	require.True(t, b.AcquireGently(3))
	require.Empty(t, asked)
	require.False(t, b.AcquirePair(), "one is not enough")
	require.True(t, b.AcquireGently(1), "but it was given")
	require.False(t, b.AcquireGently(1))
	require.Equal(t, []int64{2, 1}, asked)
	require.EqualValues(t, 4, b.Used())
}

// However many ask at once, no more is given than there is.
func TestBudgetIsNeverExceeded(t *testing.T) {
	b := New(Shares{Connections: 10})
	var wg sync.WaitGroup
	var held atomic.Int64
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				if b.AcquirePair() {
					if n := held.Add(2); n > 10 {
						t.Errorf("%d files are given out", n)
					}
					held.Add(-2)
					b.ReleasePair()
				}
			}
		})
	}
	wg.Wait()
	require.Zero(t, b.Used())
}
