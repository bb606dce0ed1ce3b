package tcplb

import (
	"fmt"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/require"
)

// useAllFiles takes all files of the budget.
func useAllFiles(t testing.TB) {
	t.Helper()
	rest := files.Process.Limit() - files.Process.Used()
	require.True(t, files.Process.Acquire(rest))
	t.Cleanup(func() { files.Process.Release(rest) })
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
			rest := files.Process.Limit() - files.Process.Used() - 3*files.PerConnection
			require.True(t, files.Process.Acquire(rest))
			t.Cleanup(func() { files.Process.Release(rest) })

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
