package tcplb

import (
	"bufio"
	"fmt"
	"net"
	"testing"

	"github.com/pires/go-proxyproto"
	"github.com/stretchr/testify/require"
)

const uncheckedJSON = `"health_checks":{"active":{"disabled":true}}`

// headed is what a backend learned of a connection.
type headed struct {
	header *proxyproto.Header
	err    error
}

// headedServer is an echo server that reads a PROXY header first. seen has what
// it was.
func headedServer(t testing.TB) (s *server, seen chan headed) {
	t.Helper()
	seen = make(chan headed, 1000)
	return startServer(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		h, err := proxyproto.Read(r)
		seen <- headed{h, err}
		if err != nil {
			return
		}
		first := make([]byte, r.Buffered())
		_, _ = r.Read(first)
		_, _ = c.Write(first)
		echo(c)
	}), seen
}

func TestProxyHeaderTellsTheClient(t *testing.T) {
	for version, number := range map[string]byte{"v1": 1, "v2": 2} {
		for _, network := range []string{"", "tcp_lb/"} {
			t.Run(version+network, func(t *testing.T) {
				s, seen := headedServer(t)
				lb := freeAddress(t)
				runCaddy(t, lbConfig(network+lb, fmt.Sprintf(`{%s,"proxy_protocol":%q,%s}`, backendsJSON(s.address), version, uncheckedJSON)))
				c := hold(t, lb)
				got := <-seen
				require.NoError(t, got.err)
				require.Equal(t, number, got.header.Version)
				require.Equal(t, proxyproto.PROXY, got.header.Command)
				require.Equal(t, c.LocalAddr().String(), got.header.SourceAddr.String())
				require.Equal(t, lb, got.header.DestinationAddr.String())
				require.NoError(t, c.CloseWrite())
				expectEOF(t, c)
				require.NoError(t, c.Close())
				eventually(t, func() bool { return metric(t, "connections_active", nil) == 0 }, "the end of it")
				require.EqualValues(t, 1, metric(t, "received_bytes_total", nil), "the header is none of the client's bytes")
			})
		}
	}
}

// A backend's own setting holds for that alone.
func TestProxyHeaderOfOneBackend(t *testing.T) {
	with, seen := headedServer(t)
	without := echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, fmt.Sprintf(`{"backends":[{"address":%q},{"address":%q,"proxy_protocol":"off"}],"proxy_protocol":"v2",%s}`,
		with.address, without.address, uncheckedJSON)))
	for range 2 {
		echoed(t, lb, 10)
	}
	require.NoError(t, (<-seen).err)
	require.Equal(t, 1, without.acceptedCount())
}
