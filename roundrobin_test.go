package tcplb

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// nginxOrder is smooth weighted round robin as its source tells it, the slow way.
func nginxOrder(weights []int) []uint32 {
	total, divisor := 0, 0
	for _, w := range weights {
		total += w
		divisor = gcd(divisor, w)
	}
	current := make([]int, len(weights))
	var order []uint32
	for range total / divisor {
		best := -1
		for i, w := range weights {
			current[i] += w
			if best < 0 || current[i] > current[best] {
				best = i
			}
		}
		current[best] -= total
		order = append(order, uint32(best))
	}
	return order
}

func letters(order []uint32) string {
	var b strings.Builder
	for _, i := range order {
		b.WriteByte(byte('a' + i))
	}
	return b.String()
}

func TestSmoothOrder(t *testing.T) {
	for _, c := range []struct {
		name    string
		weights []int
		want    string
	}{
		{"none", nil, ""},
		{"one", []int{7}, "a"},
		{"equal", []int{1, 1, 1}, "abc"},
		{"equal and heavy is one round", []int{4, 4}, "ab"},
		{"five to one to one", []int{5, 1, 1}, "aabacaa"},
		{"heavy last", []int{1, 3}, "babb"},
		{"divided by the common divisor", []int{6, 2}, "aaba"},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.Equal(t, c.want, letters(smoothOrder(c.weights)))
		})
	}
}

func TestSmoothOrderIsNginxs(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		weights := make([]int, 1+r.IntN(30))
		limit := []int{2, 5, 256}[r.IntN(3)]
		for i := range weights {
			weights[i] = 1 + r.IntN(limit)
		}
		require.Equal(t, nginxOrder(weights), smoothOrder(weights), "weights %v", weights)
	}
}

// testCandidates makes backends of the given weights, all up.
func testCandidates(weights ...int) []Candidate {
	p := newPool("test")
	var list []Candidate
	for i, w := range weights {
		list = append(list, Candidate{Backend: newBackend(p, fmt.Sprintf("127.0.0.1:%d", i+1), target{}), Weight: w})
	}
	return list
}

// pickOf picks for a connection that has tried some already, and keeps what it
// took.
func pickOf(p Picker, tried ...*Backend) *Backend {
	r := Request{tried: tried}
	return r.pickBy(p)
}

// choice returns which backend a connection would have.
func choice(g *generation) *Backend {
	var r Request
	b := g.pick(&r)
	r.giveBack()
	return b
}

// picks returns n picks as letters.
func picks(p Picker, candidates []Candidate, n int) string {
	var b strings.Builder
	for range n {
		picked := pickOf(p)
		for i, c := range candidates {
			if c.Backend == picked {
				b.WriteByte(byte('a' + i))
			}
		}
	}
	return b.String()
}

func TestPickExactSharesConcurrently(t *testing.T) {
	c := testCandidates(5, 1, 1)
	p := RoundRobin{}.NewPicker(c, nil)
	const goroutines, each = 100, 700 // 10,000 periods of 7
	counts := make([]map[*Backend]int, goroutines)
	var wg sync.WaitGroup
	for i := range goroutines {
		counts[i] = make(map[*Backend]int)
		wg.Go(func() {
			for range each {
				counts[i][pickOf(p)]++
			}
		})
	}
	wg.Wait()
	sum := make(map[*Backend]int)
	for _, m := range counts {
		for b, n := range m {
			sum[b] += n
		}
	}
	require.Equal(t, map[*Backend]int{
		c[0].Backend: goroutines * each / 7 * 5,
		c[1].Backend: goroutines * each / 7,
		c[2].Backend: goroutines * each / 7,
	}, sum)
}

func TestPickSkipsDownAndTried(t *testing.T) {
	c := testCandidates(1, 1, 1)
	a, b, d := c[0].Backend, c[1].Backend, c[2].Backend
	p := RoundRobin{}.NewPicker(c, nil)
	b.setHealthy(false)
	for range 6 {
		require.NotSame(t, b, pickOf(p), "a backend that just went down")
	}
	require.Same(t, d, pickOf(p, a))
	require.Nil(t, pickOf(p, a, d), "all are down or tried")
}

// A backend that is passed over loses its turn: the one behind it does not get
// twice as many.
func TestPassedOverBackendsShareIsSpread(t *testing.T) {
	c := testCandidates(1, 1, 1)
	p := RoundRobin{}.NewPicker(c, nil)
	c[1].Backend.setHealthy(false)
	require.Equal(t, "acacac", picks(p, c, 6))
	c[1].Backend.setHealthy(true)
	require.Equal(t, "abc", picks(p, c, 3))
}

func TestPickFindsTheLightestBehindTheHeaviest(t *testing.T) {
	c := testCandidates(256, 1)
	p := RoundRobin{}.NewPicker(c, nil)
	for range 300 {
		require.Same(t, c[1].Backend, pickOf(p, c[0].Backend))
	}
}

func TestPickOfNothing(t *testing.T) {
	require.Nil(t, pickOf(RoundRobin{}.NewPicker(nil, nil)))
}

func TestRotationGoesOn(t *testing.T) {
	c := testCandidates(1, 1, 1)
	next := func(available []Candidate, prev Picker) Picker { return RoundRobin{}.NewPicker(available, prev) }
	t.Run("the same set keeps its position", func(t *testing.T) {
		p := next(c, nil)
		require.Equal(t, "abca", picks(p, c, 4))
		require.Equal(t, "bca", picks(next(c, p), c, 3))
	})
	t.Run("without the one that went down", func(t *testing.T) {
		p := next(c, nil)
		require.Equal(t, "a", picks(p, c, 1))
		p = next([]Candidate{c[0], c[2]}, p)
		require.Equal(t, "cac", picks(p, c, 3))
	})
	t.Run("a returning backend waits for its turn", func(t *testing.T) {
		p := next([]Candidate{c[0], c[2]}, nil)
		require.Equal(t, "a", picks(p, c, 1))
		p = next(c, p)
		require.Equal(t, "cabcab", picks(p, c, 6), "no burst for b")
	})
	t.Run("after none was available", func(t *testing.T) {
		p := next(nil, next(c, nil))
		require.Nil(t, pickOf(p))
		require.Len(t, picks(next(c, p), c, 3), 3)
	})
	t.Run("other weights", func(t *testing.T) {
		p := next(c, nil)
		require.Equal(t, "ab", picks(p, c, 2))
		heavier := []Candidate{c[0], c[1], {Backend: c[2].Backend, Weight: 2}}
		p = next(heavier, p)
		require.Equal(t, "c", picks(p, c, 1), "goes on with the one that was next")
	})
}

func TestPickDoesNotAllocate(t *testing.T) {
	p := RoundRobin{}.NewPicker(testCandidates(3, 2, 1), nil)
	var r Request
	require.Zero(t, testing.AllocsPerRun(1000, func() { r.pickBy(p) }))
}

func BenchmarkPick(b *testing.B) {
	for _, n := range []int{1, 100, 10_000} {
		weights := make([]int, n)
		for i := range weights {
			weights[i] = 1 + i%3
		}
		p := RoundRobin{}.NewPicker(testCandidates(weights...), nil)
		b.Run(fmt.Sprintf("backends=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			var r Request
			for b.Loop() {
				r.pickBy(p)
			}
		})
		b.Run(fmt.Sprintf("backends=%d/parallel", n), func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				var r Request
				for pb.Next() {
					r.pickBy(p)
				}
			})
		})
	}
}

func BenchmarkRebuild(b *testing.B) {
	for _, c := range []struct {
		name   string
		weight func(i int) int
	}{
		{"equal", func(int) int { return 1 }},
		{"mixed", func(i int) int { return 1 + i*7919%256 }},
	} {
		weights := make([]int, 10_000)
		for i := range weights {
			weights[i] = c.weight(i)
		}
		candidates := testCandidates(weights...)
		b.Run("10000 backends/"+c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				RoundRobin{}.NewPicker(candidates, nil)
			}
		})
	}
}
