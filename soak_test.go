package tcplb

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

var (
	soakTime = flag.Duration("soak", 5*time.Second, "how long TestSoak goes on")
	soakSeed = flag.Uint64("soak.seed", 0, "seed of TestSoak; 0 = another one each time")
)

// TestSoak drives everything at once, at random: clients of all kinds, backends
// that die, stall and come back, moments without any, reloads and loads that
// fail. A client may fail only if something happened to its backend, and never
// take a cut stream for a complete one. In the end every connection has one line
// in the access log, which agrees with its client, and the counters agree with
// the lines.
//
// Beside them go clients who want nothing: who leave before they have a backend
// and, at a port of their own, receivers that stall for longer than the idle
// timeout or say nothing at all. Only a world in which some peer stops reading
// can show a relay that waits for it, and only one without a backend what becomes
// of those who wait.
func TestSoak(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d, for %s", seed, *soakTime)
	s := startSoak(t, seed)
	books := startBookkeeper()
	for deadline := time.Now().Add(*soakTime); time.Now().Before(deadline) && s.none(); {
		s.disturb()
	}
	close(s.stop)
	s.clients.Wait()
	books.finish(t)
	s.require(t)
	s.requireAccounts()
}

// soak is the state of one run.
type soak struct {
	findings
	t        testing.TB
	rnd      *rand.Rand // the driver's; each client has its own
	lb       string
	stalls   string // the address for clients that stall, …
	silences string // … and for those that never get as far as the handler
	backends []*soakBackend
	drain    string         // drain_timeout of the running config
	did      map[string]int // what, how often

	stop    chan struct{}
	clients sync.WaitGroup

	recordsMu sync.Mutex
	records   []soakRecord // of connections that went well
	excused   int          // connections that failed as their backend did

	stalled stallCounts
}

// soakBackend is a backend, and what has happened to it.
type soakBackend struct {
	*server
	id           byte
	dead, absent bool         // absent from the config; both for the driver only
	stall        sync.RWMutex // held for writing while it accepts and does not serve

	// Odd while something happens that breaks its connections.
	disturbed atomic.Uint64
}

func startSoak(t testing.TB, seed uint64) *soak {
	s := &soak{
		t:        t,
		rnd:      rand.New(rand.NewPCG(seed, 0)),
		lb:       freeAddress(t),
		stalls:   freeAddress(t),
		silences: freeAddress(t),
		did:      make(map[string]int),
		stop:     make(chan struct{}),
	}
	for i := range 5 {
		b := &soakBackend{id: byte(i)}
		b.server = startServer(t, b.serve)
		s.backends = append(s.backends, b)
	}
	soakLog.reset()
	s.drain = longDrain
	runCaddy(t, s.configOf(s.backends, s.drain, ""))
	checked(t)
	for i := range 24 {
		s.repeat(seed, 1+i, s.connect)
	}
	for i := range 8 {
		s.repeat(seed, 100+i, s.stall)
		s.repeat(seed, 200+i, s.beSilent)
	}
	return s
}

// repeat makes one connection after another until the end.
func (s *soak) repeat(seed uint64, client int, connect func(*rand.Rand)) {
	rnd := rand.New(rand.NewPCG(seed, uint64(client)))
	s.clients.Go(func() {
		for !isClosed(s.stop) {
			connect(rnd)
		}
	})
}

// configOf is a config over the backends with random weights.
func (s *soak) configOf(backends []*soakBackend, drain, more string) string {
	var list []string
	for _, b := range backends {
		list = append(list, fmt.Sprintf(`{"address":%q,"weight":%d}`, b.address, 1+s.rnd.IntN(5)))
	}
	server := func(listen, match, name, more string) string {
		return fmt.Sprintf(`%q:{"listen":["tcp_lb/%s"],"routes":[{%s"handle":[{"handler":"tcp_lb","name":%q,"drain_timeout":%q,"access_log":true,
			"load_balancing":{"retries":10,"try_duration":"30s","try_interval":"10ms"},%s,%s"backends":[%s]}]}]}`,
			listen, listen, match, name, drain, fastChecks, more, strings.Join(list, ","))
	}
	config := layer4Config(server(s.lb, "", soakPool, more) + "," +
		server(s.silences, `"match":[{"tls":{}}],`, soakPool, more) + "," +
		server(s.stalls, "", stallPool, more+stallOptions))
	config = strings.Replace(config, `"apps":{`, `"apps":{"tcp_lb":{"handshake_timeout":"1s"},`, 1)
	return strings.Replace(config, `"logs":{`, `"logs":{"access":{"level":"INFO","writer":{"output":"tcp_lb_test_memory"},`+
		`"encoder":{"format":"json"},"include":["layer4.handlers.tcp_lb.access"]},`, 1)
}

const soakPool = "soak"

// disturb does something, or nothing for a while.
func (s *soak) disturb() {
	b := s.backends[1+s.rnd.IntN(len(s.backends)-1)] // the first always lives
	switch n := s.rnd.IntN(100); {
	case n < 30:
		s.count("reload")
		s.reload()
	case n < 40:
		s.count("failed load")
		s.failToLoad()
	case n < 55 && !b.dead:
		s.count("kill")
		during([]*soakBackend{b}, b.kill)
		b.dead = true
	case n < 75 && b.dead:
		s.count("revival")
		b.start()
		b.dead = false
	case n < 80:
		s.count("outage")
		s.outage()
	case n < 88:
		s.count("stall")
		b.stall.Lock()
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
		b.stall.Unlock()
	default:
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
	}
}

// outage leaves no backend for a moment. Nothing but the connections that are
// open may be lost by it: new clients wait, also while a config follows another.
func (s *soak) outage() {
	var alive []*soakBackend
	for _, b := range s.backends {
		if !b.dead {
			alive = append(alive, b)
		}
	}
	during(alive, func() {
		for _, b := range alive {
			b.kill()
		}
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
		if s.rnd.IntN(2) == 0 {
			s.reload()
		}
		for _, b := range alive {
			b.start()
		}
	})
}

func (s *soak) count(what string) { s.did[what]++ }

// during marks all connections to the backends that live meanwhile.
func during(backends []*soakBackend, disturb func()) {
	for _, b := range backends {
		b.disturbed.Add(1)
	}
	disturb()
	for _, b := range backends {
		b.disturbed.Add(1)
	}
}

// reload runs a config over some of the backends. Those that leave have their
// connections cut if that gives them little time.
func (s *soak) reload() {
	var used, cut []*soakBackend
	for i, b := range s.backends {
		wasAbsent := b.absent
		b.absent = i > 0 && s.rnd.IntN(4) == 0
		if !b.absent {
			used = append(used, b)
		} else if !wasAbsent {
			cut = append(cut, b)
		}
	}
	s.drain = []string{longDrain, "30ms"}[s.rnd.IntN(2)]
	config := s.configOf(used, s.drain, "")
	load := func() {
		if err := caddy.Load([]byte(config), true); err != nil {
			s.add("reload: %v", err)
		}
	}
	if s.drain == longDrain {
		load()
	} else {
		during(cut, load)
	}
}

const longDrain = "1h"

// failToLoad loads a config that can't be run, in one of several ways.
func (s *soak) failToLoad() {
	config := s.configOf(s.backends[:1], "0s", `"max_connections":1,`)
	switch s.rnd.IntN(3) {
	case 0:
		config = strings.ReplaceAll(config, `"max_connections":1`, `"max_connections":-1`)
	case 1:
		config = strings.Replace(config, `"apps":{`, `"apps":{"http":{"servers":{"srv":{"listen":["unix//nonexistent/socket"]}}},`, 1)
	case 2:
		config = config[:len(config)/2]
	}
	if err := caddy.Load([]byte(config), true); err == nil {
		s.add("a bad config was loaded")
	}
}

// connect makes one connection of a random kind and judges how it went.
func (s *soak) connect(rnd *rand.Rand) {
	before := s.disturbances()
	c := &soakClient{rnd: rnd, kind: soakKinds[rnd.IntN(len(soakKinds))], backend: -1}
	err := c.run(s.lb)
	disturbed := s.haveBeen(before, c.backend)
	s.recordsMu.Lock()
	defer s.recordsMu.Unlock()
	switch {
	case err == nil:
		c.record.disturbed = disturbed
		s.records = append(s.records, c.record)
	case disturbed && relay.IsReset(err) && !errors.Is(err, io.ErrUnexpectedEOF):
		s.excused++
	default:
		s.add("a connection of kind %c to backend %d, disturbed: %v: %v", c.kind, c.backend, disturbed, err)
	}
}

// disturbances returns how much has happened to each backend so far.
func (s *soak) disturbances() []uint64 {
	var counts []uint64
	for _, b := range s.backends {
		counts = append(counts, b.disturbed.Load())
	}
	return counts
}

// haveBeen reports whether something happened to the backend since, or to any
// if it is not known.
func (s *soak) haveBeen(before []uint64, backend int) bool {
	for i, now := range s.disturbances() {
		if (backend < 0 || i == backend) && (before[i]%2 == 1 || now != before[i]) {
			return true
		}
	}
	return false
}

// requireAccounts compares clients, access log and counters.
func (s *soak) requireAccounts() {
	t := s.t
	eventually(t, func() bool { return open.n.Load() == 0 }, "all connections ended")
	lines, stalled := soakLog.lines(t)
	require.Equal(t, len(s.records)+s.excused, len(lines), "one line for each connection")
	require.Equal(t, s.stalled.total(), len(stalled))

	byClient := make(map[string][]soakLine)
	for _, l := range lines {
		require.True(t, l.Backend != "" || l.left(), "%+v", l)
		byClient[l.Client] = append(byClient[l.Client], l)
	}
	for _, r := range s.records {
		i := slices.IndexFunc(byClient[r.client], r.agrees)
		require.GreaterOrEqual(t, i, 0, "no line agrees with %+v, but there are %+v", r, byClient[r.client])
		byClient[r.client] = slices.Delete(byClient[r.client], i, i+1)
	}
	views := registry.snapshot()
	require.Len(t, views, 2)
	requireSum(t, lines, views[0].total())
	requireSum(t, stalled, views[1].total())
	for _, v := range views {
		require.Zero(t, v.active.Load())
		require.Zero(t, v.waiters.n.Load())
		for _, b := range v.backends {
			_, active, _ := b.stats.connections()
			require.Zero(t, active, b.address)
		}
	}
	require.EqualValues(t, s.stalled.early.Load(), metric(t, "listener_connections_closed_total", labels("reason", "handshake_timeout")))
	s.stalled.log(t)
	t.Logf("%d connections went well, %d ended with their backend, %d of them by the drain timeout; %v",
		len(s.records), s.excused, views[0].total().cut, s.did)
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

// soakLine is a line of the access log.
type soakLine struct {
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

	// The client went without waiting for the end, before which something may
	// have happened to the backend.
	aborted bool
}

func (r soakRecord) agrees(l soakLine) bool {
	switch {
	case r.aborted:
		return l.left() || l.Reason == reasonBackendReset.String() || l.Reason == reasonDrainTimeout.String()
	case l.Received != r.received || l.Sent != r.sent:
		return false
	default:
		return r.disturbed || l.Reason == r.why.String()
	}
}

// soakLog is a log writer module that keeps the access log in memory.
var soakLog = new(logMemory)

type logMemory struct {
	mu  sync.Mutex
	buf bytes.Buffer
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
}

func (m *logMemory) lines(t testing.TB) (list, stalled []soakLine) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for d := json.NewDecoder(&m.buf); d.More(); {
		var l soakLine
		require.NoError(t, d.Decode(&l))
		if l.LB == stallPool {
			stalled = append(stalled, l)
		} else {
			list = append(list, l)
		}
	}
	return list, stalled
}
