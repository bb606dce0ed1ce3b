package tcplb

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/require"
)

// openFiles counts the sockets and pipes of this process, but for the pool's.
func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	n := -2 * relay.Pipes()
	for _, entry := range list {
		what, _ := os.Readlink("/proc/self/fd/" + entry.Name())
		if strings.HasPrefix(what, "socket:") || strings.HasPrefix(what, "pipe:") {
			n++
		}
	}
	return n
}

// Downloads that nobody reads take two files each, as any connection does: the
// file limit is enough for as many connections as ever.
func TestStuckDownloadsTakeNoPlace(t *testing.T) {
	const limit, stuck, others = 256, 40, 35
	source, echoes := startServer(t, func(c *net.TCPConn) {
		for err := error(nil); err == nil; {
			_, err = c.Write(make([]byte, 64<<10))
		}
	}), echoServer(t)
	down, lb := freeAddress(t), freeAddress(t)
	server := func(name, listen, backend string) string {
		return fmt.Sprintf(`%q:{"listen":["tcp_lb/%s"],"routes":[{"handle":[%s]}]}`, name, listen,
			withHandler(fmt.Sprintf(`"name":%q,"health_checks":{"active":{"disabled":true}},%s}`, name, backendsJSON(backend))))
	}
	c := startChildWithFiles(t, limit, strings.Replace(
		layer4Config(server("down", down, source.address)+","+server("echo", lb, echoes.address)), `"ERROR"`, `"INFO"`, 1))
	c.line(t, "serving initial configuration")
	before := c.openFiles(t)
	for range stuck {
		conn := dialClient(t, down)
		_, err := io.ReadFull(conn, make([]byte, 1<<20)) // a bulk transfer, until here
		require.NoError(t, err)
	}
	all := gather(lb, others, others)
	defer all.leave()
	require.Empty(t, all.failed)
	require.Zero(t, all.refused)
	require.Len(t, all.served, others)
	most := 2 * int(max(1, files.Divide(limit).Connections/64))
	eventually(t, func() bool { return c.openFiles(t) <= before+files.PerConnection*(stuck+others)+most }, "files: %v", lazily(func() any { return c.openFiles(t) - before }))
}
