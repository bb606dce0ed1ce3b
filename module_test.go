package tcplb

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/require"
)

// fastChecks finds a dead backend without waiting for traffic.
const fastChecks = `"health_checks":{"active":{"interval":"50ms","fast_interval":"10ms","timeout":"2s"}}`

// startLB runs a balancer with a name and options over the backends, and
// returns its address.
func startLB(t testing.TB, options string, backends ...string) string {
	t.Helper()
	address := freeAddress(t)
	if options != "" {
		options = "," + options
	}
	runCaddy(t, lbConfig(address, backendsJSON(backends...)+options+"}"))
	return address
}

func TestRoundRobinOverConnections(t *testing.T) {
	lb := startLB(t, "", namedServer(t, "a").address, namedServer(t, "b").address, namedServer(t, "c").address)
	got := ""
	for range 6 {
		name, err := ask(lb)
		require.NoError(t, err)
		got += name
	}
	require.Equal(t, "abcabc", got)
}

func TestWeightsAreExactUnderConcurrency(t *testing.T) {
	a, b, c := namedServer(t, "a"), namedServer(t, "b"), namedServer(t, "c")
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, fmt.Sprintf(`"backends":[{"address":%q,"weight":5},{"address":%q},{"address":%q}]}`, a.address, b.address, c.address)))

	const total, workers = 10_003, 100 // whole periods of 7
	var next, failed atomic.Int64
	counts := make([]map[string]int, workers)
	var wg sync.WaitGroup
	for i := range workers {
		counts[i] = make(map[string]int)
		wg.Go(func() {
			for next.Add(1) <= total {
				name, err := ask(lb)
				if err != nil {
					failed.Add(1)
				}
				counts[i][name]++
			}
		})
	}
	wg.Wait()
	sum := make(map[string]int)
	for _, m := range counts {
		for name, n := range m {
			sum[name] += n
		}
	}
	require.Zero(t, failed.Load())
	require.Equal(t, map[string]int{"a": total / 7 * 5, "b": total / 7, "c": total / 7}, sum)
	requireBooksBalance(t, total)
}

// requireBooksBalance waits for all connections to end, and checks that each
// was counted once everywhere.
func requireBooksBalance(t testing.TB, total int) {
	t.Helper()
	eventually(t, func() bool { return metric(t, "connections_active", nil) == 0 && open.n.Load() == 0 }, "all connections ended")
	require.EqualValues(t, total, metric(t, "connections_total", nil))
	closed := metric(t, "connections_closed_total", nil) -
		metric(t, "connections_closed_total", labels("backend", ""))
	require.EqualValues(t, total, closed)
	require.EqualValues(t, total, metric(t, "connection_duration_seconds", nil))
	require.EqualValues(t, total, metric(t, "dial_duration_seconds", nil))
}

func TestKillOneOfThreeUnderLoad(t *testing.T) {
	a, b, c := namedServer(t, "a"), namedServer(t, "b"), namedServer(t, "c")
	lb := startLB(t, fastChecks, a.address, b.address, c.address)
	checked(t)

	const workers, each = 16, 120
	var done, failed atomic.Int64
	var wg sync.WaitGroup
	// A connection in the queue of a listener that closes is lost by nature, as
	// one that is established is: the backend dies between two connections.
	var alive sync.RWMutex
	for range workers {
		wg.Go(func() {
			for range each {
				alive.RLock()
				name, err := ask(lb)
				alive.RUnlock()
				if err != nil || name == "" {
					failed.Add(1)
				}
				done.Add(1)
			}
		})
	}
	eventually(t, func() bool { return done.Load() > workers*each/4 }, "load")
	alive.Lock()
	b.kill()
	alive.Unlock()
	wg.Wait()
	require.Zero(t, failed.Load(), "no client saw the dead backend")

	eventually(t, func() bool { return !backendStatuses(t)[b.address].Healthy }, "b is found down")
	require.NotEmpty(t, backendStatuses(t)[b.address].LastError)
	require.EqualValues(t, 1, metric(t, "health_transitions_total", labels("backend", b.address, "to", "down")))
	served := metric(t, "connections_total", labels("backend", b.address))
	for range 10 {
		_, err := ask(lb)
		require.NoError(t, err)
	}
	require.Equal(t, served, metric(t, "connections_total", labels("backend", b.address)), "a down backend gets nothing")

	b.start()
	eventually(t, func() bool { return backendStatuses(t)[b.address].Healthy }, "b recovers")
	got := ""
	for range 6 {
		name, err := ask(lb)
		require.NoError(t, err)
		got += name
	}
	require.Equal(t, 2, strings.Count(got, "b"), "its share and no burst: %s", got)
}

func TestByteExactBothWaysAtOnce(t *testing.T) {
	const size = 200 << 20
	sums := make(chan uint32, 1)
	s := startServer(t, func(c *net.TCPConn) {
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			_, _ = io.Copy(c, io.LimitReader(&pattern{seed: 2}, size))
			_ = c.CloseWrite()
		}()
		h := &hashing{}
		n, _ := io.Copy(h, c)
		<-sent
		if n > 0 { // no probe
			sums <- h.sum
		}
	})
	lb := startLB(t, "", s.address)
	c := dialClient(t, lb)
	require.NoError(t, c.SetDeadline(time.Now().Add(4*hangTimeout)))
	errs := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, io.LimitReader(&pattern{seed: 1}, size))
		errs <- errors.Join(err, c.CloseWrite())
	}()
	h := &hashing{}
	n, err := io.Copy(h, c)
	require.NoError(t, err)
	require.NoError(t, <-errs)
	require.EqualValues(t, size, n)
	want := func(seed byte) uint32 {
		h := &hashing{}
		_, _ = io.Copy(h, io.LimitReader(&pattern{seed: seed}, size))
		return h.sum
	}
	require.Equal(t, want(2), h.sum, "down")
	require.Equal(t, want(1), <-sums, "up")
	requireBooksBalance(t, 1)
	require.EqualValues(t, size, metric(t, "received_bytes_total", nil))
	require.EqualValues(t, size, metric(t, "sent_bytes_total", nil))
}

// pattern is an endless stream that never repeats.
type pattern struct {
	seed byte
	at   uint64 // bytes read so far
	rnd  *rand.ChaCha8
}

func (p *pattern) Read(b []byte) (int, error) {
	if p.rnd == nil {
		p.rnd = rand.NewChaCha8([32]byte{p.seed})
	}
	p.at += uint64(len(b))
	return p.rnd.Read(b)
}

// hashing sums a stream up, order and all (CRC-32, Castagnoli).
type hashing struct{ sum uint32 }

var crcTable = crc32.MakeTable(crc32.Castagnoli)

func (h *hashing) Write(b []byte) (int, error) {
	h.sum = crc32.Update(h.sum, crcTable, b)
	return len(b), nil
}

func TestEndsOfConnections(t *testing.T) {
	// The backend does what the first line of the client says.
	s := startServer(t, func(c *net.TCPConn) {
		line := make([]byte, 5)
		if _, err := io.ReadFull(c, line); err != nil {
			return
		}
		switch string(line) {
		case "close":
			_, _ = io.WriteString(c, "bye")
		case "reset":
			_, _ = io.WriteString(c, "bye")
			_ = c.SetLinger(0)
		case "reads":
			_, err := io.Copy(io.Discard, c)
			if err == nil {
				_, _ = io.WriteString(c, "all read")
			}
		}
	})
	lb := startLB(t, "", s.address)
	reasons := func() string {
		var list []string
		for _, why := range backendClosedReasons {
			if n := metric(t, "connections_closed_total", labels("backend", s.address, "reason", why.String())); n > 0 {
				list = append(list, fmt.Sprint(why, " ", n))
			}
		}
		return strings.Join(list, ", ")
	}

	c := dialClient(t, lb)
	write(t, c, "close")
	expect(t, c, "bye")
	expectEOF(t, c)
	require.NoError(t, c.Close())
	requireBooksBalance(t, 1)
	require.Equal(t, "backend_closed 1", reasons())

	c = dialClient(t, lb)
	write(t, c, "reset")
	got, err := io.ReadAll(c)
	require.ErrorIs(t, err, syscall.ECONNRESET, "a cut stream is seen as one")
	require.Equal(t, "bye", string(got))
	requireBooksBalance(t, 2)
	require.Equal(t, "backend_closed 1, backend_reset 1", reasons())

	c = dialClient(t, lb)
	write(t, c, "readsxxxxx")
	require.NoError(t, c.CloseWrite())
	expect(t, c, "all read")
	expectEOF(t, c)
	requireBooksBalance(t, 3)
	require.Equal(t, "client_closed 1, backend_closed 1, backend_reset 1", reasons())

	c = dialClient(t, lb)
	write(t, c, "readsxxxxx")
	eventually(t, func() bool { return metric(t, "connections_active", nil) == 1 }, "connected")
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	requireBooksBalance(t, 4)
	require.Equal(t, "client_closed 1, backend_closed 1, client_reset 1, backend_reset 1", reasons())
}

func TestRetryBeforeAnyByteIsConsumed(t *testing.T) {
	dead := freeAddress(t)
	s := echoServer(t)
	lb := startLB(t, `"health_checks":{"active":{"disabled":true}}`, dead, s.address)
	for range 4 {
		c := dialClient(t, lb)
		write(t, c, "first bytes")
		require.NoError(t, c.CloseWrite())
		expect(t, c, "first bytes")
		expectEOF(t, c)
	}
	requireBooksBalance(t, 4)
	refused := metric(t, "connection_errors_total", labels("backend", dead, "error_type", "dial_refused"))
	require.Positive(t, refused)
	require.Equal(t, refused, metric(t, "retries_total", labels("backend", dead)))
	require.Zero(t, metric(t, "connections_total", labels("backend", dead)))
}

func TestNoBackend(t *testing.T) {
	lb := startLB(t, fastChecks, freeAddress(t), freeAddress(t))
	checked(t)
	for range 3 {
		got, err := ask(lb)
		require.Empty(t, got)
		require.NoError(t, err, "closed, as there is nothing to say")
	}
	eventually(t, func() bool { return open.n.Load() == 0 }, "all ended")
	require.EqualValues(t, 3, metric(t, "connection_errors_total", labels("backend", "", "error_type", "no_backend")))
	require.EqualValues(t, 3, metric(t, "connections_closed_total", labels("reason", "no_backend")))
	require.Zero(t, metric(t, "connections_total", nil))
}

func TestTryDurationWaitsForABackend(t *testing.T) {
	s := namedServer(t, "late")
	s.kill()
	lb := startLB(t, fastChecks+`,"load_balancing":{"try_duration":"30s","try_interval":"10ms"}`, s.address)
	eventually(t, func() bool { return !backendStatuses(t)[s.address].Healthy }, "down")
	answer := make(chan string, 1)
	go func() {
		name, _ := ask(lb)
		answer <- name
	}()
	eventually(t, func() bool { return open.n.Load() == 1 }, "a waiting connection")
	s.start()
	require.Equal(t, "late", <-answer)
}

func TestMaxConnections(t *testing.T) {
	s := echoServer(t)
	lb := startLB(t, `"max_connections":3`, s.address)
	var held []*net.TCPConn
	for range 3 {
		c := dialClient(t, lb)
		write(t, c, "x")
		expect(t, c, "x")
		held = append(held, c)
	}
	for range 2 {
		got, err := ask(lb)
		require.Empty(t, got)
		require.True(t, err == nil || errors.Is(err, syscall.ECONNRESET), "%v", err)
	}
	require.EqualValues(t, 2, metric(t, "connection_errors_total", labels("error_type", "max_connections", "backend", "")))
	require.EqualValues(t, 2, metric(t, "connections_closed_total", labels("reason", "max_connections")))
	require.EqualValues(t, 3, metric(t, "connections_active", nil))
	for _, c := range held {
		write(t, c, "still here")
		expect(t, c, "still here")
	}
	require.NoError(t, held[0].Close())
	eventually(t, func() bool { return metric(t, "connections_active", nil) == 2 }, "room for one")
	c := dialClient(t, lb)
	write(t, c, "y")
	expect(t, c, "y")
}

func TestIdleTimeoutOfAConnection(t *testing.T) {
	s := echoServer(t)
	lb := startLB(t, `"idle_timeout":"50ms"`, s.address)
	n := 0
	for got := ""; got != "x"; n++ { // where the test itself is idle for as long, it is cut before
		c := dialClient(t, lb)
		_, written := io.WriteString(c, "x")
		b, read := io.ReadAll(c)
		require.ErrorIs(t, errors.Join(written, read), syscall.ECONNRESET)
		got = string(b)
	}
	requireBooksBalance(t, n)
	require.EqualValues(t, n, metric(t, "connections_closed_total", labels("reason", "idle_timeout")))
}

func TestUnixSocketAndNameAsBackends(t *testing.T) {
	socket := t.TempDir() + "/backend"
	ln, err := net.Listen("unix", socket)
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				echo(c)
			})
		}
	})
	defer wg.Wait()
	defer ln.Close()
	s := echoServer(t)
	_, port, _ := net.SplitHostPort(s.address)
	lb := startLB(t, "", "unix/"+socket, "localhost:"+port)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for range 2 {
		c := dialClient(t, lb)
		go func() {
			_, _ = c.Write(data)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	}
	requireBooksBalance(t, 2)
	require.EqualValues(t, 1, metric(t, "connections_total", labels("backend", "unix/"+socket)))
	require.EqualValues(t, 1, metric(t, "connections_total", labels("backend", "localhost:"+port)))
}

// Both sides are gone, and nothing is left: goroutines (TestMain), files.
func TestNoFileIsLeft(t *testing.T) {
	s := echoServer(t)
	lb := startLB(t, "", s.address)
	round := func() {
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				c, err := net.Dial("tcp", lb)
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = c.Write(make([]byte, 500_000))
				_, _ = io.ReadFull(c, make([]byte, 500_000))
			})
		}
		wg.Wait()
		eventually(t, func() bool { return open.n.Load() == 0 }, "all ended")
	}
	round()
	require.Zero(t, files.Process.Used(), "the budget has it all back")
	require.EqualValues(t, 0, registry.snapshot()[0].active.Load())
}
