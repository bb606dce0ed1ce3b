package tcplb

import (
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFileBudget(t *testing.T) {
	for _, c := range []struct {
		limit                   uint64
		files, probes, overflow int64
	}{
		{0, math.MaxInt32, 64, 64},
		{math.MaxUint64, math.MaxInt32, 64, 64}, // RLIM_INFINITY
		{16, 10, 2, 2},
		{256, 160, 32, 32},
		{1024, 832, 64, 64},
		{20_000, 19_808, 64, 64},
		{1 << 20, 1<<20 - 192, 64, 64},
	} {
		f := newFileBudget(c.limit)
		require.Equal(t, c.files, f.limit, "%d", c.limit)
		require.EqualValues(t, c.probes, f.probes, "%d", c.limit)
		require.Equal(t, c.overflow, f.overflowLimit, "%d", c.limit)
	}
}

// The bound that follows from the limit of files is one for all pools, and each
// counts what it had to refuse.
func TestLimitIsOneForAllPools(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) {
			watchLeftovers(t)
			s := echoServer(t)
			first, second := freeAddress(t), freeAddress(t)
			server := func(name, listen string) string {
				return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[{"handler":"tcp_lb","name":%q,%s}]}]}`,
					name, network+listen, name, backendsJSON(s.address))
			}
			runCaddy(t, layer4Config(server("first", first)+","+server("second", second)))
			rest := files.limit - files.used.Load() - 3*filesPerConnection
			require.True(t, files.acquire(rest))
			t.Cleanup(func() { files.release(rest) })

			refused := func(name string) float64 {
				return metric(t, "connections_closed_total", labels("lb", name, "reason", "max_connections"))
			}
			for _, lb := range []string{first, second, first} {
				c := dialClient(t, lb)
				write(t, c, "x")
				expect(t, c, "x")
			}
			for _, lb := range []string{second, first, second} {
				expectEOF(t, dialClient(t, lb))
			}
			eventually(t, func() bool { return refused("first") == 1 && refused("second") == 2 }, "counted where it was refused")
			require.EqualValues(t, 3, metric(t, "connections_active", nil))
		})
	}
}
