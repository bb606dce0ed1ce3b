package tcplb

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// requireAccounts compares clients, access log and counters.
func (s *soak) requireAccounts() {
	t := s.t
	byPool, connected := s.requireLines()
	lines, stalled, asked := byPool[soakPool], byPool[stallPool], byPool[wellPool]
	requireConnectedLines(t, connected, slices.Concat(lines, stalled, byPool[crowdPool]))

	early := cutEarly(t, s.lb, s.wrapped)
	byClient := make(map[string][]soakLine)
	for _, l := range lines {
		require.True(t, l.Backend != "" || l.left(), "%+v", l)
		byClient[l.Client] = append(byClient[l.Client], l)
	}
	for _, r := range s.records {
		i := slices.IndexFunc(byClient[r.client], r.agrees)
		if i < 0 && r.isUnheard() && early > 0 {
			early--
			continue
		}
		require.GreaterOrEqual(t, i, 0, "no line agrees with %+v, but there are %+v", r, byClient[r.client])
		byClient[r.client] = slices.Delete(byClient[r.client], i, i+1)
	}
	views := registry.snapshot()
	require.Len(t, views, 4)
	s.requireCrowd(byPool[crowdPool], views[0])
	requireSum(t, lines, views[1].total())
	requireSum(t, stalled, views[2].total())
	requireSum(t, asked, views[3].total())
	requireReasons(t, soakPool, lines)
	requireReasons(t, stallPool, stalled)
	requireReasons(t, wellPool, asked)
	require.Positive(t, metric(t, "connections_closed_total", labels("lb", wellPool, "reason", "backend_down")))
	require.Positive(t, metric(t, "ejections_total", labels("lb", wellPool)))
	// Some had ended by themselves, or been cut, when the hand came.
	require.LessOrEqual(t, metric(t, "connections_closed_total", labels("lb", soakPool, "reason", "killed")), float64(s.killed))
	for _, v := range views {
		require.Zero(t, v.active.Load())
		require.Zero(t, v.waiters.n.Load())
		require.Zero(t, v.waiters.waiting.Load())
		for _, b := range v.backends {
			_, active, _ := b.stats.connections()
			require.Zero(t, active, b.address)
			require.Zero(t, b.Load(), b.address)
		}
	}
	require.EqualValues(t, s.stalled.early.Load(), cutEarly(t, s.silences))
	s.stalled.log(t)
	for _, b := range s.backends {
		t.Logf("backend %d had at most %d connections at once, its limit is %d", b.id, b.most, b.limit)
	}
	t.Logf("%d connections went well, %d ended with their backend, %d of them by the drain timeout; %v",
		len(s.records), s.excused, views[1].total().cut, s.did)
}

// requireLines waits until there is one line for each connection, but for those that
// were cut ahead of the handler, and returns them. Of a client that has gone the
// connection may have yet to be accepted.
func (s *soak) requireLines() (byPool map[string][]soakLine, connected []soakLine) {
	t := s.t
	want := map[string]int{
		soakPool:  len(s.records) + s.excused,
		stallPool: s.stalled.total(),
		wellPool:  s.conversations,
		crowdPool: int(s.crowded.dialed.Load()),
	}
	have := make(map[string]int)
	for deadline := time.Now().Add(hangTimeout); ; time.Sleep(10 * time.Millisecond) {
		byPool, connected = soakLog.lines(t)
		for pool, ports := range map[string][]string{soakPool: {s.lb, s.wrapped}, stallPool: {s.stalls}, wellPool: {s.well.address}, crowdPool: {s.crowd}} {
			have[pool] = len(byPool[pool]) + cutEarly(t, ports...)
		}
		// Who has a line may have yet to be counted.
		if maps.Equal(want, have) && open.n.Load() == 0 {
			return byPool, connected
		}
		if time.Now().After(deadline) {
			require.Equal(t, want, have, "one line for each connection")
			require.Zero(t, open.n.Load(), "all connections ended")
		}
	}
}

// cutEarly is how many connections were cut ahead of the handler, at the ports.
func cutEarly(t testing.TB, ports ...string) (n int) {
	for _, port := range ports {
		n += int(metric(t, "listener_connections_closed_total", labels("listener", port, "reason", "handshake_timeout")))
	}
	return n
}

// sumOf is what a pool's counters have to say, and how many connects there were
// of which that can't be told.
func sumOf(lines []soakLine) (sum totals, unclear uint64) {
	for _, l := range lines {
		if l.Attempts > 0 {
			sum.errors += l.Attempts - 1
		}
		if l.Backend == "" {
			unclear += min(l.Attempts, 1) // the last one failed, or ended with the client
			continue
		}
		sum.connections++
		sum.received += l.Received
		sum.sent += l.Sent
		if l.Reason == reasonDrainTimeout.String() {
			sum.cut++
		}
	}
	return sum, unclear
}

func requireSum(t testing.TB, lines []soakLine, total totals) {
	t.Helper()
	sum, unclear := sumOf(lines)
	require.LessOrEqual(t, total.retries, total.errors)
	require.GreaterOrEqual(t, total.errors, sum.errors)
	require.LessOrEqual(t, total.errors, sum.errors+unclear)
	sum.retries, sum.errors = total.retries, total.errors // not of the last failure of a round
	require.Equal(t, sum, total)
}

// requireReasons compares why connections ended with the metrics.
func requireReasons(t testing.TB, lb string, lines []soakLine) {
	t.Helper()
	ended := make(map[string]int)
	for _, l := range lines {
		ended[l.Reason]++
	}
	for why := reasonNone + 1; why < numReasons; why++ {
		require.EqualValues(t, ended[why.String()], metric(t, "connections_closed_total", labels("lb", lb, "reason", why.String())), why)
		delete(ended, why.String())
	}
	require.Empty(t, ended)
}

// requireSeriesToEnd checks that of all backends that came and went nothing is
// left, but for what was set by hand.
func (s *soak) requireSeriesToEnd() {
	t, only := s.t, s.backends[0]
	s.well.gone = true
	reload(t, strings.Replace(s.configOf([]soakMember{{only, 1, false}}, shortDrain, ""), s.source(), `"dynamic_backends":[]`, -1))
	eventually(t, func() bool { return len(backendStatuses(t)) == 1 }, "the others are gone")
	registry.mu.Lock()
	registry.departed.prune(time.Now().Add(departedFor))
	registry.mu.Unlock()
	families, err := gathererOf(collector{}).Gather()
	require.NoError(t, err)
	for _, f := range families {
		require.NotContains(t, f.GetName(), "tcp_lb_source")
		for _, m := range f.GetMetric() {
			require.Contains(t, []string{"", only.address}, labelValue(m, "backend"), f.GetName())
		}
	}
}

// soakLine is a line of the access log.
type soakLine struct {
	Message  string `json:"msg"`
	LB       string `json:"lb"`
	Client   string `json:"client"`
	Backend  string `json:"backend"`
	Attempts uint64 `json:"attempts"`
	Received uint64 `json:"received_bytes"`
	Sent     uint64 `json:"sent_bytes"`
	Reason   string `json:"reason"`
}

// left reports whether the client ended it.
func (l soakLine) left() bool {
	return l.Reason == reasonClientClosed.String() || l.Reason == reasonClientReset.String()
}

// soakRecord is what a client knows of its connection.
type soakRecord struct {
	client         string
	received, sent uint64 // by the balancer
	why            reason
	disturbed      bool // the reason may be another
	outOfTurn      bool // went to a backup: another connect failed before

	// The client went without waiting for the end, before which something may
	// have happened to the backend.
	aborted bool
}

// isUnheard reports whether it may have been cut ahead of the handler, and its client
// would not know.
func (r soakRecord) isUnheard() bool { return r.aborted && r.received == 0 }

// cuts are what may come before the end of a connection that is over for its client.
var cuts = []string{reasonDrainTimeout.String(), reasonKilled.String()}

func (r soakRecord) agrees(l soakLine) bool {
	switch {
	case r.aborted:
		return l.left() || l.Reason == reasonBackendReset.String() || slices.Contains(cuts, l.Reason)
	case r.outOfTurn && l.Attempts < 2:
		return false
	case l.Received != r.received || l.Sent != r.sent:
		return false
	default:
		// One that ended in order may be cut between the client's end and the balancer's.
		return r.disturbed || l.Reason == r.why.String() || slices.Contains(cuts, l.Reason)
	}
}

// soakLog is a log writer module that keeps the access log in memory.
var soakLog = new(logMemory)

type logMemory struct {
	mu  sync.Mutex
	buf bytes.Buffer // what was not yet asked for

	ended     map[string][]soakLine // by pool
	connected []soakLine
}

func init() { caddy.RegisterModule(soakLog) }

func (*logMemory) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.logging.writers.tcp_lb_test_memory", New: func() caddy.Module { return new(logMemory) }}
}

func (*logMemory) String() string                      { return "memory" }
func (*logMemory) WriterKey() string                   { return "tcp_lb_test_memory" }
func (*logMemory) OpenWriter() (io.WriteCloser, error) { return soakLog, nil }
func (*logMemory) Close() error                        { return nil }

func (m *logMemory) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.buf.Write(p)
}

func (m *logMemory) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.buf.Reset()
	m.ended, m.connected = make(map[string][]soakLine), nil
}

// lines returns those of ends by pool, and those of connects.
func (m *logMemory) lines(t testing.TB) (ended map[string][]soakLine, connected []soakLine) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for d := json.NewDecoder(&m.buf); d.More(); {
		var l soakLine
		require.NoError(t, d.Decode(&l))
		switch l.Message {
		case "connected":
			m.connected = append(m.connected, l)
		case "connection":
			m.ended[l.LB] = append(m.ended[l.LB], l)
		default:
			require.Equal(t, "open", l.Message)
		}
	}
	return maps.Clone(m.ended), m.connected
}
