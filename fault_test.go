package tcplb

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// A probe comes only when a connect fails, so that what is found is found by
// that.
const triggeredChecks = `"health_checks":{"active":{"interval":"1h","fast_interval":"10ms","timeout":"2s"}}`

// closed returns how many connections to the backend ended for the reason.
func closedFor(t testing.TB, s *server, why reason) float64 {
	t.Helper()
	return metric(t, "connections_closed_total", labels("backend", s.address, "reason", why.String()))
}

func dialErrors(t testing.TB, backend string, kind dialError) float64 {
	t.Helper()
	return metric(t, "connection_errors_total", labels("backend", backend, "error_type", dialErrorNames[kind]))
}

func TestFaultRefused(t *testing.T) {
	watchLeftovers(t)
	a, b := namedServer(t, "a"), namedServer(t, "b")
	lb := startLB(t, triggeredChecks, a.address, b.address)
	checked(t)
	b.kill()
	for range 4 {
		name, err := ask(lb)
		require.NoError(t, err)
		require.Equal(t, "a", name)
	}
	eventually(t, func() bool { return !backendStatuses(t)[b.address].Healthy }, "found by the failed connect")
	require.Contains(t, backendStatuses(t)[b.address].LastError, "refused")
	refused := dialErrors(t, b.address, dialRefused)
	require.Positive(t, refused)
	require.Equal(t, refused, metric(t, "retries_total", labels("backend", b.address)))
	require.Equal(t, 1.0, metric(t, "health_transitions_total", labels("backend", b.address, "to", "down")))
	requireBooksBalance(t, 4)
}

func TestFaultAcceptedThenClosed(t *testing.T) {
	watchLeftovers(t)
	closes := startServer(t, func(*net.TCPConn) {})
	// Not at once: a reset before the connect is done is one more connect that failed.
	resets := startServer(t, func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	lb := startLB(t, "", closes.address, resets.address)
	checked(t)
	for range 10 {
		c := dialClient(t, lb)
		expectEOF(t, c)
		require.NoError(t, c.Close())
		c = dialClient(t, lb)
		write(t, c, "x")
		expectReset(t, c)
	}
	requireBooksBalance(t, 20)
	require.EqualValues(t, 10, closedFor(t, closes, reasonBackendClosedEarly), "told apart from an ordinary end")
	require.EqualValues(t, 10, closedFor(t, resets, reasonBackendReset))
	require.True(t, backendStatuses(t)[resets.address].Healthy, "it accepts, which is what a TCP check sees")
}

// A reset in the middle of a bulk transfer reaches the other side, either way.
func TestFaultResetMidStream(t *testing.T) {
	watchLeftovers(t)
	var resetAfter atomic.Int64 // bytes that the backend takes; 0 = all there are
	seen := make(chan error, 1)
	s := startServer(t, func(c *net.TCPConn) {
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err != nil {
			return
		}
		if n := resetAfter.Load(); n > 0 {
			_, _ = io.CopyN(io.Discard, c, n)
			_ = c.SetLinger(0)
			return
		}
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	lb := startLB(t, "", s.address)
	const size = 10 << 20

	c := dialClient(t, lb)
	_, err := c.Write(make([]byte, size))
	require.NoError(t, err)
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	require.True(t, relay.IsReset(<-seen), "the backend sees a reset, not an end")
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, closedFor(t, s, reasonClientReset))

	resetAfter.Store(size)
	c = dialClient(t, lb)
	_, err = c.Write(make([]byte, 8*size))
	if err == nil {
		_, err = io.ReadAll(c)
	}
	require.True(t, relay.IsReset(err), "the client sees a reset: %v", err)
	requireBooksBalance(t, 2)
	require.EqualValues(t, 1, closedFor(t, s, reasonBackendReset))
}

// Half-closed connections go on for as long as the other way is of use, and are
// subject to the idle timeout like any other.
func TestFaultHalfClosedForLong(t *testing.T) {
	watchLeftovers(t)
	more := make(chan string)
	s := startServer(t, func(c *net.TCPConn) {
		if n, _ := io.Copy(io.Discard, c); n == 0 {
			return // a probe
		}
		for text := range more {
			_, _ = io.WriteString(c, text)
		}
	})
	lb := startLB(t, fastChecks+`,"idle_timeout":"3s"`, s.address)
	c := dialClient(t, lb)
	write(t, c, "request")
	require.NoError(t, c.CloseWrite())
	probes := func() float64 { return metric(t, "health_checks_total", nil) }
	for _, text := range []string{"one", "two", "three"} {
		before := probes()
		eventually(t, func() bool { return probes() > before+2 }, "time passes")
		more <- text
		expect(t, c, text)
	}
	require.EqualValues(t, 1, metric(t, "connections_active", nil))
	expectReset(t, c) // cut in the end, not ended
	close(more)
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, closedFor(t, s, reasonIdleTimeout))
	require.EqualValues(t, len("onetwothree"), metric(t, "sent_bytes_total", nil))
}

// A reader that never reads holds up its own backend, and nothing else.
func TestFaultReaderNeverReads(t *testing.T) {
	watchLeftovers(t)
	s := startServer(t, func(c *net.TCPConn) {
		first := make([]byte, 1)
		if _, err := io.ReadFull(c, first); err != nil || first[0] == 'e' {
			echo(c)
			return
		}
		for err := error(nil); err == nil; {
			_, err = c.Write(make([]byte, 64<<10))
		}
	})
	lb := startLB(t, "", s.address)
	const readers = 20
	var stuck []*net.TCPConn
	for range readers {
		c := dialClient(t, lb)
		write(t, c, "g")
		stuck = append(stuck, c)
	}
	other := dialClient(t, lb)
	write(t, other, "e")
	sent := func() float64 { return metric(t, "sent_bytes_total", nil) }
	// Once nothing is delivered any more, all that there was to fill is full.
	last := -1.0
	eventually(t, func() bool {
		for range 50 {
			write(t, other, "ping")
			expect(t, other, "ping")
		}
		now := sent() - metric(t, "received_bytes_total", nil) // less the pings
		same := now == last
		last = now
		return same && now > 0
	}, "the backend is held up")
	require.Less(t, last/readers, float64(32<<20), "no more than sockets hold")
	for _, c := range stuck {
		require.NoError(t, c.SetLinger(0))
		require.NoError(t, c.Close())
	}
	require.NoError(t, other.Close())
	requireBooksBalance(t, readers+1)
	require.EqualValues(t, readers, closedFor(t, s, reasonClientReset))
}

func TestFaultBackendDiesWithConnections(t *testing.T) {
	watchLeftovers(t)
	const connections = 500
	dies, stays := echoServer(t), echoServer(t)
	lb := startLB(t, triggeredChecks, dies.address, stays.address)
	checked(t)
	held := make([]*net.TCPConn, 2*connections)
	for i := range held {
		held[i] = dialClient(t, lb)
		write(t, held[i], "x")
		expect(t, held[i], "x")
	}
	require.EqualValues(t, connections, metric(t, "connections_active", labels("backend", dies.address)))
	dies.kill()
	reset := 0
	for _, c := range held {
		_, written := io.WriteString(c, "y")
		_, read := io.ReadFull(c, make([]byte, 1))
		if err := errors.Join(written, read); err != nil {
			require.True(t, relay.IsReset(err), "%v", err) // the first of the two has it
			reset++
		}
	}
	require.Equal(t, connections, reset)
	eventually(t, func() bool { return closedFor(t, dies, reasonBackendReset) == connections }, "all are counted")
	require.EqualValues(t, connections, metric(t, "connections_active", nil), "those of the other go on")
	for range 10 { // and new ones find it
		c := dialClient(t, lb)
		write(t, c, "x")
		expect(t, c, "x")
		require.NoError(t, c.Close())
	}
	for _, c := range held {
		_ = c.Close()
	}
	requireBooksBalance(t, 2*connections+10)
}

func TestFaultAllDownThenUp(t *testing.T) {
	watchLeftovers(t)
	all := []*server{namedServer(t, "a"), namedServer(t, "b"), namedServer(t, "c")}
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, fastChecks+","+backendsOf(all)+"}"))
	checked(t)
	for _, s := range all {
		s.kill()
	}
	eventually(t, func() bool { return registry.newest("tcp_lb").health().Available == 0 }, "unavailable")
	for range 5 {
		got, err := ask(lb)
		require.NoError(t, err)
		require.Empty(t, got)
	}
	eventually(t, func() bool { return metric(t, "connections_closed_total", labels("reason", "no_backend")) == 5 }, "counted")
	for _, s := range all {
		s.start()
	}
	eventually(t, func() bool { return registry.newest("tcp_lb").health().Available == len(all) }, "all are up")
	var names []string
	for range 2 * len(all) {
		name, err := ask(lb)
		require.NoError(t, err)
		names = append(names, name)
	}
	require.Contains(t, "abcabcabcabc", strings.Join(names, ""))
	for _, s := range all {
		require.EqualValues(t, 1, metric(t, "health_transitions_total", labels("backend", s.address, "to", "up")))
		require.EqualValues(t, 1, metric(t, "health_transitions_total", labels("backend", s.address, "to", "down")))
	}
	requireBooksBalance(t, 2*len(all))
}

func TestFaultFlappingBackend(t *testing.T) {
	watchLeftovers(t)
	stays, flaps := namedServer(t, "stays"), namedServer(t, "flaps")
	lb := startLB(t, fastChecks, stays.address, flaps.address)
	checked(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var found findings
	var done atomic.Int64
	var alive sync.RWMutex // see TestKillOneOfThreeUnderLoad
	for range 8 {
		wg.Go(func() {
			for !isClosed(stop) {
				alive.RLock()
				name, err := ask(lb)
				alive.RUnlock()
				if err != nil || name == "" {
					found.add("%q, %v", name, err)
				}
				done.Add(1)
			}
		})
	}
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for range 8 {
		alive.Lock()
		flaps.kill()
		alive.Unlock()
		<-tick.C
		flaps.start()
		<-tick.C
	}
	close(stop)
	wg.Wait()
	found.require(t)
	eventually(t, func() bool { return backendStatuses(t)[flaps.address].Healthy }, "it is up in the end")
	up := metric(t, "health_transitions_total", labels("backend", flaps.address, "to", "up"))
	down := metric(t, "health_transitions_total", labels("backend", flaps.address, "to", "down"))
	require.Equal(t, up, down)
	require.Positive(t, down)
	require.Zero(t, metric(t, "health_transitions_total", labels("backend", stays.address)))
	requireBooksBalance(t, int(done.Load()))
}

// panickingModule is a selection policy that panics when it picks.
type panickingModule struct{ panickingPolicy }

func (panickingModule) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.tcp_lb_test_panic",
		New: func() caddy.Module { return new(panickingModule) },
	}
}

func init() { caddy.RegisterModule(panickingModule{}) }

func TestFaultPanic(t *testing.T) {
	watchLeftovers(t)
	s := namedServer(t, "a")
	file := filepath.Join(t.TempDir(), "log")
	bad, good := freeAddress(t), freeAddress(t)
	server := func(name, listen, options string) string {
		return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[{"handler":"tcp_lb","name":%q,%s%s}]}]}`,
			name, listen, name, options, backendsJSON(s.address))
	}
	config := layer4Config(server("bad", bad, `"load_balancing":{"selection_policy":{"policy":"tcp_lb_test_panic"}},`) + "," + server("good", good, ""))
	runCaddy(t, strings.Replace(config, `{"level":"ERROR"}`, fmt.Sprintf(`{"level":"ERROR","writer":{"output":"file","filename":%q}}`, file), 1))
	for range 3 {
		got, err := ask(bad)
		require.NoError(t, err)
		require.Empty(t, got)
		got, err = ask(good)
		require.NoError(t, err)
		require.Equal(t, "a", got, "others don't notice")
	}
	eventually(t, func() bool {
		return metric(t, "connections_closed_total", labels("lb", "bad", "reason", "error")) == 3
	}, "counted")
	requireBooksBalance(t, 3)
	log, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, 3, strings.Count(string(log), "panic while handling a connection"))
	require.Contains(t, string(log), "panickingPicker", "with its stack")
	require.Contains(t, string(log), "out of luck")
}
