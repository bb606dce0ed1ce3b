package tcplb

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Of many backends that are asked by HTTP a tenth take the question and don't
// answer, or never come to the end of it. The checks of the others keep their
// interval, spread over it, from the first on, and files stay bounded.
func TestStalledAnswersHoldUpNobody(t *testing.T) {
	if raceDetector {
		t.Skip("Go's race detector crashes in a bubble of thousands: run this without -race, as .ci/run does")
	}
	synctest.Test(t, func(t *testing.T) {
		s := manyBackends()
		l := useLanes(t, s.budget)
		list, addresses := s.list()
		f := newFakeNet()
		f.latency = time.Millisecond
		stalled := make(map[string]func(net.Conn))
		for i, a := range addresses[:s.backends/10] {
			stalled[a] = []func(net.Conn){stallHTTP, trickleHTTP}[i%2]
		}
		open, most := 0, 0 // connections
		count := func(by int) {
			f.mu.Lock()
			defer f.mu.Unlock()
			open += by
			most = max(most, open)
		}
		f.serve = func(address string, c net.Conn) {
			count(1)
			defer count(-1)
			defer c.Close()
			if !readRequest(c) {
				return
			}
			if stall := stalled[address]; stall != nil {
				stall(c)
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
		}
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = list
			h.activeChecks().URI = "/healthz"
		})
		began := time.Now()
		g.start()
		time.Sleep(40 * time.Second)
		byAddress := make(map[string]*Backend)
		for _, m := range g.members() {
			byAddress[m.Backend.address] = m.Backend
			require.Equal(t, stalled[m.Backend.address] == nil, m.Backend.Available(), m.Backend.address)
		}
		g.stop()
		synctest.Wait()

		var first, gap time.Duration
		atOnce := make(map[time.Duration]int) // by tenths of a second, once checks are spread
		for _, a := range addresses[len(stalled):] {
			times := f.times(a)
			first = max(first, times[0].Sub(began))
			for i := 1; i < len(times); i++ {
				gap = max(gap, times[i].Sub(times[i-1]))
				if at := times[i].Sub(began); at > 15*time.Second {
					atOnce[at/(100*time.Millisecond)]++
				}
			}
		}
		together := slices.Max(slices.Collect(maps.Values(atOnce)))
		t.Logf("%d backends, %d of them stalled: first checks within %v, then at most %v apart, %d in a tenth of a second at most; %d files at most",
			s.backends, len(stalled), first, gap, together, most)
		require.LessOrEqual(t, first, time.Second/2+promptTime*time.Duration(2*len(stalled)/s.budget.Probes()))
		require.LessOrEqual(t, gap, 10*time.Second+promptTime)
		require.LessOrEqual(t, together, 2*s.backends/100, "they are spread over the interval")
		require.LessOrEqual(t, most, s.budget.Probes()+l.mostBorrowed)
		require.Zero(t, s.budget.Used(), "what was borrowed is back")
		for _, a := range addresses[:2] {
			require.Contains(t, *byAddress[a].lastError.Load(), "no verdict within 2s: no HTTP response")
		}
	})
}

// readRequest reads up to the end of a request without a body.
func readRequest(c net.Conn) bool {
	var request []byte
	for buf := make([]byte, 512); !bytes.HasSuffix(request, []byte("\r\n\r\n")); {
		n, err := c.Read(buf)
		if err != nil {
			return false
		}
		request = append(request, buf[:n]...)
	}
	return true
}

// stallHTTP says nothing for as long as somebody listens.
func stallHTTP(c net.Conn) { _, _ = io.Copy(io.Discard, c) }

// trickleHTTP says something now and then, and never comes to an end.
func trickleHTTP(c net.Conn) {
	_, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n")
	for err == nil {
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err = c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			_, err = io.WriteString(c, "X-Wait: a little\r\n")
		}
	}
}
