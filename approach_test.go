package tcplb

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/loop"
	"github.com/caddyserver/caddy/v2"
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
				watchLeftovers(t)
				s, seen := headedServer(t)
				lb := freeAddress(t)
				runCaddy(t, lbConfig(network+lb, fmt.Sprintf(`{%s,"proxy_protocol":%q,"local_address":"127.0.0.1",%s}`, backendsJSON(s.address), version, uncheckedJSON)))
				c := hold(t, lb)
				got := next(t, seen)
				require.NoError(t, got.err)
				require.Equal(t, number, got.header.Version)
				require.Equal(t, proxyproto.PROXY, got.header.Command)
				require.Equal(t, c.LocalAddr().String(), got.header.SourceAddr.String())
				require.Equal(t, lb, got.header.DestinationAddr.String())
				if network != "" && loop.Available {
					require.Equal(t, map[string]int{"*relay.Looped": 1}, relaysOf(t), "it costs no more than others")
				}
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

// pipes is a network of backends none of which reads what is sent to it.
type pipes struct {
	mu  sync.Mutex
	far []net.Conn // the backends' ends
}

func (p *pipes) dial(context.Context, target, time.Duration) (net.Conn, error) {
	near, far := net.Pipe()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.far = append(p.far, far)
	return near, nil
}

// A header that can't be sent is a failed connect: the next backend has the client.
func TestProxyHeaderThatCanNotBeSent(t *testing.T) {
	f := newFakeNet() // whose backends close at once
	g, _ := testGeneration(t, f, func(h *Handler) {
		h.Backends = []BackendConfig{{Address: one, ApproachConfig: ApproachConfig{ProxyProtocol: "v2"}}, {Address: two}}
		checksOff(h)
		h.passiveChecks().FailDuration = caddy.Duration(time.Minute)
	})
	g.start()
	defer g.stop()
	l, err := connect(g)
	require.NoError(t, err)
	defer l.release()
	require.Equal(t, two, l.backend.address)
	require.Equal(t, 2, l.attempts)
	require.Len(t, l.failed, 1)
	require.Equal(t, "sending the PROXY header: io: read/write on closed pipe", l.failed[0].err.Error())
	failed := g.members()[0].Backend
	require.EqualValues(t, 1, failed.stats.errors[dialOther].Load())
	require.EqualValues(t, 1, failed.stats.retries.Load())
	require.Zero(t, failed.stats.opened.Load())
	require.Zero(t, failed.Load())
	require.False(t, failed.Available(), "it fails clients")
}

// What stalls has no more than the connect's time, of which the connect is a part.
func TestProxyHeaderThatStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pipes
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
			h.Backends = backendList(one)
			h.ProxyProtocol = "v1"
			checksOff(h)
		})
		g.dial = func(ctx context.Context, to target, timeout time.Duration) (net.Conn, error) {
			time.Sleep(time.Second)
			return p.dial(ctx, to, timeout)
		}
		g.start()
		defer g.stop()
		began := time.Now()
		_, err := connect(g)
		require.ErrorContains(t, err, "sending the PROXY header: ")
		require.Equal(t, defaultDialTimeout, time.Since(began))
		require.EqualValues(t, 1, g.members()[0].Backend.stats.errors[dialTimeout].Load())
		_, err = p.far[0].Read(make([]byte, 1))
		require.Equal(t, io.EOF, err, "it is closed")
	})
}

// The end of the client's patience ends it.
func TestProxyHeaderIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		near, far := net.Pipe()
		defer far.Close()
		began := time.Now()
		time.AfterFunc(time.Second, func() { cancel(gone) })
		a, err := newApproach(caddy.Context{}, ApproachConfig{ProxyProtocol: "v2"}, nil)
		require.NoError(t, err)
		conn, err := a.open(ctx, nil, near, began.Add(time.Minute), parties{}, nil)
		require.Nil(t, conn)
		require.Error(t, err)
		require.Equal(t, time.Second, time.Since(began))
		_, err = near.Write([]byte("x"))
		require.ErrorIs(t, err, io.ErrClosedPipe, "it is closed")
	})
}
