package tcplb

import (
	"bufio"
	"fmt"
	"net"
	"testing"
	"time"

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
				got := next(t, seen)
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
	require.NoError(t, next(t, seen).err)
	require.Equal(t, 1, without.acceptedCount())
}

// next waits for a connection.
func next(t testing.TB, seen chan headed) headed {
	t.Helper()
	select {
	case got := <-seen:
		return got
	case <-time.After(hangTimeout):
		require.FailNow(t, "nobody came")
		return headed{}
	}
}

// commandOf waits for a connection and says what its header was.
func commandOf(t testing.TB, seen chan headed) string {
	t.Helper()
	switch got := next(t, seen); {
	case got.err != nil:
		return "none"
	case got.header.Command.IsLocal():
		return fmt.Sprintf("v%d local", got.header.Version)
	default:
		return fmt.Sprintf("v%d of %s", got.header.Version, got.header.SourceAddr)
	}
}

// A server that wants the header wants it of the checks, too.
func TestChecksFollowTheProxyHeader(t *testing.T) {
	for _, c := range []struct {
		name, handler, backend, checks, want string
	}{
		{"v2", `"proxy_protocol":"v2"`, ``, ``, "v2 local"},
		{"v1", `"proxy_protocol":"v1"`, ``, ``, "v1 local"},
		{"the backend's own", `"proxy_protocol":"v1"`, `,"proxy_protocol":"v2"`, ``, "v2 local"},
		{"but not this one", `"proxy_protocol":"v1"`, `,"proxy_protocol":"off"`, ``, "none"},
		{"but not the checks", `"proxy_protocol":"v1"`, ``, `"proxy_protocol":"off"`, "none"},
		{"the checks' own", `"proxy_protocol":"v1"`, ``, `"proxy_protocol":"v2"`, "v2 local"},
		{"by a kind of its own", `"proxy_protocol":"v2"`, ``, `"dialogue":[{"send":"x"},{"expect":"x"}]`, "v2 local"},
		{"to another port", `"proxy_protocol":"v2"`, `,"health_port":%d`, ``, "none"},
		{"to another port, if said", `"proxy_protocol":"v2"`, `,"health_port":%d`, `"proxy_protocol":"v1"`, "v1 local"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, seen := headedServer(t)
			address, backend := s.address, c.backend
			if backend == `,"health_port":%d` {
				backend = fmt.Sprintf(backend, s.ln.Addr().(*net.TCPAddr).Port)
				address = freeAddress(t)
			}
			runCaddy(t, lbConfig(freeAddress(t), fmt.Sprintf(`{"backends":[{"address":%q%s}],%s,"health_checks":{"active":{%s}}}`, address, backend, c.handler, c.checks)))
			require.Equal(t, c.want, commandOf(t, seen))
			checked(t)
		})
	}
}

// A reload that changes how connections begin has the backend asked again, at once.
func TestChecksFollowTheNewProxyHeader(t *testing.T) {
	s, seen := headedServer(t)
	config := func(version string) string {
		return lbConfig(freeAddress(t), fmt.Sprintf(`{%s,"proxy_protocol":%q,"health_checks":{"active":{"interval":"24h"}}}`, backendsJSON(s.address), version))
	}
	runCaddy(t, config("v1"))
	require.Equal(t, "v1 local", commandOf(t, seen))
	checked(t)
	reload(t, config("v2"))
	require.Equal(t, "v2 local", commandOf(t, seen))
}
