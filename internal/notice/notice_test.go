package notice

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestNotice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n Notice
		lines := make(chan uint64, 10)
		add := func() { n.Add(func(count uint64) { lines <- count }) }
		add()
		require.EqualValues(t, 1, <-lines, "the first at once")
		add()
		add()
		synctest.Wait()
		require.Empty(t, lines)
		time.Sleep(time.Minute)
		require.EqualValues(t, 2, <-lines, "those since")
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.Empty(t, lines, "nothing happened")
		add()
		require.Len(t, lines, 1, "at once again")
		require.EqualValues(t, 1, <-lines)
		time.Sleep(time.Minute)
	})
}

// However many come at once, each is told of once.
func TestNoticesAreCountedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n Notice
		var mu sync.Mutex
		var told uint64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 100 {
					n.Add(func(count uint64) {
						mu.Lock()
						told += count
						mu.Unlock()
					})
					time.Sleep(time.Second)
				}
			})
		}
		wg.Wait()
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		require.EqualValues(t, 800, told)
	})
}
