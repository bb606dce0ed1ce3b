package tcplb

import (
	"bytes"
	"runtime/pprof"
	"testing"

	"github.com/stretchr/testify/require"
)

// On a tcp_lb listener, caddy-l4's goroutine for a connection ends once that
// has its backend, and closes nothing.
func TestConnectionIsTakenOver(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	s := echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, backendsJSON(s.address)+"}"))
	c := dialClient(t, lb)
	write(t, c, "hello")
	expect(t, c, "hello")
	eventually(t, func() bool {
		var all bytes.Buffer
		require.NoError(t, pprof.Lookup("goroutine").WriteTo(&all, 2))
		return !bytes.Contains(all.Bytes(), []byte("layer4.(*Server).handle("))
	}, "caddy-l4 has done with the connection")
	write(t, c, "still there")
	expect(t, c, "still there")
	require.NoError(t, c.CloseWrite())
	expectEOF(t, c)
	requireBooksBalance(t, 1)
}
