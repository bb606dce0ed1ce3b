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

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

var (
	soakTime = flag.Duration("soak", 5*time.Second, "how long TestSoak goes on")
	soakSeed = flag.Uint64("soak.seed", 0, "seed of TestSoak; 0 = another one each time")
)

// TestSoak drives everything at once, at random: clients of all kinds, backends
// that die, stall and come back, reloads and loads that fail. A client may fail
// only if something happened to its backend, and never take a cut stream for a
// complete one. In the end every connection has one line in the access log,
// which agrees with its client, and the counters agree with the lines.
func TestSoak(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	seed := *soakSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d, for %s", seed, *soakTime)
	s := startSoak(t, seed)
	books := startBookkeeper(s.absences)
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
	backends []*soakBackend
	drain    string         // drain_timeout of the running config
	did      map[string]int // what, how often

	stop    chan struct{}
	clients sync.WaitGroup

	recordsMu sync.Mutex
	records   []soakRecord // of connections that went well
	excused   int          // connections that failed as their backend did
}

// soakBackend is a backend, and what has happened to it.
type soakBackend struct {
	*server
	id    byte
	dead  bool         // for the driver only
	stall sync.RWMutex // held for writing while it accepts and does not serve

	// Odd while something happens that breaks its connections.
	disturbed atomic.Uint64
	// Odd while no config names it, and a little longer.
	absent atomic.Uint64
}

func startSoak(t testing.TB, seed uint64) *soak {
	s := &soak{
		t:    t,
		rnd:  rand.New(rand.NewPCG(seed, 0)),
		lb:   freeAddress(t),
		did:  make(map[string]int),
		stop: make(chan struct{}),
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
		rnd := rand.New(rand.NewPCG(seed, uint64(1+i)))
		s.clients.Go(func() {
			for !isClosed(s.stop) {
				s.connect(rnd)
			}
		})
	}
	return s
}

// configOf is a config over the backends with random weights.
func (s *soak) configOf(backends []*soakBackend, drain, more string) string {
	var list []string
	for _, b := range backends {
		list = append(list, fmt.Sprintf(`{"address":%q,"weight":%d}`, b.address, 1+s.rnd.IntN(5)))
	}
	config := lbConfig("tcp_lb/"+s.lb, fmt.Sprintf(
		`"drain_timeout":%q,"access_log":true,"load_balancing":{"retries":10,"try_duration":"30s","try_interval":"10ms"},%s,%s"backends":[%s]}`,
		drain, fastChecks, more, strings.Join(list, ",")))
	return strings.Replace(config, `"logs":{`, `"logs":{"access":{"level":"INFO","writer":{"output":"tcp_lb_test_memory"},`+
		`"encoder":{"format":"json"},"include":["layer4.handlers.tcp_lb.access"]},`, 1)
}

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
	case n < 85:
		s.count("stall")
		b.stall.Lock()
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
		b.stall.Unlock()
	default:
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
	}
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
// connections cut if the config that ends gives them little time.
func (s *soak) reload() {
	var used, cut, back []*soakBackend
	for i, b := range s.backends {
		wasAbsent := isOdd(&b.absent)
		switch {
		case i == 0 || s.rnd.IntN(4) > 0:
			used = append(used, b)
			if wasAbsent {
				back = append(back, b)
			}
		case !wasAbsent:
			b.absent.Add(1)
			if s.drain != longDrain {
				cut = append(cut, b)
			}
		}
	}
	s.drain = []string{longDrain, "30ms"}[s.rnd.IntN(2)]
	config := s.configOf(used, s.drain, "")
	during(cut, func() {
		if err := caddy.Load([]byte(config), true); err != nil {
			s.add("reload: %v", err)
		}
	})
	for _, b := range back {
		b.absent.Add(1)
	}
}

const longDrain = "1h"

func isOdd(n *atomic.Uint64) bool { return n.Load()%2 == 1 }

// failToLoad loads a config that can't be run, in one of several ways.
func (s *soak) failToLoad() {
	config := s.configOf(s.backends[:1], "0s", `"max_connections":1,`)
	switch s.rnd.IntN(3) {
	case 0:
		config = strings.Replace(config, `"max_connections":1`, `"max_connections":-1`, 1)
	case 1:
		config = strings.Replace(config, `"apps":{`, `"apps":{"http":{"servers":{"srv":{"listen":["unix//nonexistent/socket"]}}},`, 1)
	case 2:
		config = config[:len(config)/2]
	}
	if err := caddy.Load([]byte(config), true); err == nil {
		s.add("a bad config was loaded")
	}
}

// absences tells, for the bookkeeper, how often each backend left the config or
// came back; odd while its series may end.
func (s *soak) absences() map[string]uint64 {
	counts := make(map[string]uint64)
	for _, b := range s.backends {
		counts[b.address] = b.absent.Load()
	}
	return counts
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
	case disturbed && isReset(err) && !errors.Is(err, io.ErrUnexpectedEOF):
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
	lines := soakLog.lines(t)
	require.Equal(t, len(s.records)+s.excused, len(lines), "one line for each connection")

	var sum totals
	byClient := make(map[string][]soakLine)
	for _, l := range lines {
		require.NotEmpty(t, l.Backend, "%+v", l)
		byClient[l.Client] = append(byClient[l.Client], l)
		sum.connections++
		sum.received += l.Received
		sum.sent += l.Sent
		sum.errors += l.Attempts - 1 // the last one worked
		if l.Reason == reasonDrainTimeout.String() {
			sum.cut++
		}
	}
	for _, r := range s.records {
		i := slices.IndexFunc(byClient[r.client], r.agrees)
		require.GreaterOrEqual(t, i, 0, "no line agrees with %+v, but there are %+v", r, byClient[r.client])
		byClient[r.client] = slices.Delete(byClient[r.client], i, i+1)
	}
	views := registry.snapshot()
	require.Len(t, views, 1)
	total := views[0].total()
	require.LessOrEqual(t, total.retries, total.errors)
	sum.retries = total.retries // not of the last failure of a round
	require.Equal(t, sum, total)
	for _, b := range views[0].backends {
		_, active, _ := b.stats.connections()
		require.Zero(t, active, b.address)
	}
	t.Logf("%d connections went well, %d ended with their backend, %d of them by the drain timeout; %v",
		len(s.records), s.excused, sum.cut, s.did)
}

// soakLine is a line of the access log.
type soakLine struct {
	Client   string `json:"client"`
	Backend  string `json:"backend"`
	Attempts uint64 `json:"attempts"`
	Received uint64 `json:"received_bytes"`
	Sent     uint64 `json:"sent_bytes"`
	Reason   string `json:"reason"`
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
		return l.Reason == r.why.String() || l.Reason == reasonBackendReset.String() || l.Reason == reasonDrainTimeout.String()
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

func (m *logMemory) lines(t testing.TB) (list []soakLine) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for d := json.NewDecoder(&m.buf); d.More(); {
		var l soakLine
		require.NoError(t, d.Decode(&l))
		list = append(list, l)
	}
	return list
}
