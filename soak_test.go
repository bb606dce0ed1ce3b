package tcplb

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/stretchr/testify/require"
)

var (
	soakTime = flag.Duration("soak", 5*time.Second, "how long TestSoak goes on")
	soakSeed = flag.Uint64("soak.seed", 0, "seed of TestSoak; 0 = another one each time")
)

// TestSoak drives everything at once, at random: clients of all kinds, backends
// that die, stall and come back, moments without any, reloads and loads that
// fail, each with another policy, states and weights set by hand, connections cut
// by hand, and answers of DNS, with and without PROXY headers to the backends, which
// know who has come, and with TLS to two of them. A client may fail only if something happened to its
// backend, and never take a cut stream for a complete one. No connection goes to a
// backend that takes none, to a backup beside others, or over a backend's limit. In
// the end every connection has one line in the access log, which agrees with its
// client, and the counters agree with the lines.
//
// Beside them go clients who want nothing: who leave before they have a backend
// and, at a port of their own, receivers that stall for longer than the idle
// timeout, or live for longer than they may, or say nothing at all; and a crowd that
// wants more connections than one client may have. Only a world in which some peer stops reading
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
	s.well.finish()
	close(s.stop)
	s.clients.Wait()
	books.finish(t)
	s.require(t)
	require.Len(t, s.relays, 2, "%v", s.relays)
	s.requireAccounts()
	s.requireSeriesToEnd()
}

// soak is the state of one run.
type soak struct {
	findings
	t        testing.TB
	rnd      *rand.Rand // the driver's; each client has its own
	lb       string
	wrapped  string // the address behind whose port connections are no bare sockets
	crowd    string // the address for clients that want more than one may have
	stalls   string // the address for clients that stall, …
	silences string // … and for those that never get as far as the handler
	backends []*soakBackend
	first    *Backend // the one that always lives, in the pool
	names    *nameServer
	drain    string          // drain_timeout of the running config
	ca       *issuer         // of the backends that speak TLS
	did      map[string]int  // what, how often
	killed   int             // connections that the admin API said it cuts
	relays   map[string]bool // kinds that were seen

	stop    chan struct{}
	clients sync.WaitGroup

	recordsMu sync.Mutex
	records   []soakRecord // of connections that went well
	excused   int          // connections that failed as their backend did

	stalled stallCounts
	crowded crowdCounts

	well          *wellness
	conversations int // in its pool
}

const (
	soakPool = "soak"
	soakName = "soak.test." // of the backends in DNS

	longDrain, shortDrain = "1h", "30ms"
)

func startSoak(t testing.TB, seed uint64) *soak {
	s := &soak{
		t:        t,
		rnd:      rand.New(rand.NewPCG(seed, 0)),
		lb:       freeAddress(t),
		wrapped:  freeAddress(t),
		crowd:    freeAddress(t),
		stalls:   freeAddress(t),
		silences: freeAddress(t),
		names:    startNameServer(t),
		drain:    longDrain,
		ca:       newIssuer(t),
		did:      make(map[string]int),
		relays:   make(map[string]bool),
		stop:     make(chan struct{}),
	}
	for i, limit := range []int{4, 2, 0, 0, 0} {
		var secure *tls.Config
		if i == 1 || i == 3 {
			secure = &tls.Config{Certificates: []tls.Certificate{s.ca.issue(nil)}}
		}
		s.addBackend(listen(t), limit, secure)
	}
	_, port, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	for i := range 3 {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.%d:%s", 11+i, port))
		require.NoError(t, err)
		s.addBackend(ln, 0, nil).inDNS = true
	}
	s.names.answer(strings.TrimSuffix(soakName, "."), s.answers()...)
	s.startWellness()
	soakLog.reset()
	soakArrivals.Clear()
	t.Cleanup(forgetHands)
	members := s.drawMembers(false)
	runCaddy(t, s.configOf(members, s.drain, ""))
	s.nowHas(members)
	eventually(t, func() bool { return len(s.configured()) == len(s.backends) }, "the answer of DNS")
	checked(t)
	s.first = registry.newest(soakPool).members()[0].Backend
	for i := range 24 {
		s.repeat(seed, 1+i, s.connect)
	}
	for i := range 8 {
		s.repeat(seed, 100+i, s.stall)
		s.repeat(seed, 200+i, s.beSilent)
		s.repeat(seed, 300+i, s.join)
		s.repeat(seed, 400+i, func(rnd *rand.Rand) { s.well.connect(rnd, i < 3) })
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

var soakPolicies = []string{"round_robin", "least_conn", "random", "random_choose", "first", "ip_hash"}

// configOf is a config of the members, and of those in DNS, with a random policy.
func (s *soak) configOf(members []soakMember, drain, more string) string {
	var list []string
	for _, m := range members {
		list = append(list, fmt.Sprintf(`{"address":%q,"weight":%d,"backup":%v,"max_connections":%d%s}`, m.address, m.weight, m.backup, m.limit, s.tlsOf(m)))
	}
	policy := soakPolicies[s.rnd.IntN(len(soakPolicies))]
	header := fmt.Sprintf(`"proxy_protocol":%q,`, soakHeaders[s.rnd.IntN(len(soakHeaders))])
	server := func(listen, match, before, name, more string) string {
		return fmt.Sprintf(`%q:{"listen":["tcp_lb/%s"],"routes":[{%s"handle":[%s{"handler":"tcp_lb","name":%q,"drain_timeout":%q,"access_log":true,"access_log_connects":true,"access_log_interval":"1s",
			"load_balancing":{"selection_policy":{"policy":%q},"retries":10,"try_duration":"30s","try_interval":"10ms"},%s,%s%s,"backends":[%s]}]}]}`,
			listen, listen, match, before, name, drain, policy, fastChecks, more, s.source(), strings.Join(list, ","))
	}
	config := layer4Config(server(s.lb, "", "", soakPool, header+more) + "," +
		server(s.wrapped, "", `{"handler":"throttle","read_bytes_per_second":1e9,"read_burst_size":1000000},`, soakPool, header+more) + "," +
		server(s.silences, `"match":[{"tls":{}}],`, "", soakPool, header+more) + "," +
		server(s.crowd, "", "", crowdPool, header+`"local_address":"127.0.0.7",`+more+crowdOptions) + "," +
		server(s.stalls, "", "", stallPool, stallHeader+more+stallOptions) + s.well.config())
	config = strings.Replace(config, `"apps":{`, `"apps":{"tcp_lb":{"handshake_timeout":"1s"},`, 1)
	return strings.Replace(config, `"logs":{`, `"logs":{"access":{"level":"INFO","writer":{"output":"tcp_lb_test_memory"},`+
		`"encoder":{"format":"json"},"include":["layer4.handlers.tcp_lb.access"]},`, 1)
}

// tlsOf is the member's TLS, if it speaks that. Where a renegotiation could come, the
// relay is another one.
func (s *soak) tlsOf(m soakMember) string {
	if m.secure == nil {
		return ""
	}
	return "," + s.ca.trusted(fmt.Sprintf(`"renegotiation":%q`, []string{"never", "once"}[s.rnd.IntN(2)]))
}

func (s *soak) count(what string) { s.did[what]++ }

// connect makes one connection of a random kind and judges how it went.
func (s *soak) connect(rnd *rand.Rand) {
	before := s.look()
	c := &soakClient{rnd: rnd, kind: soakKinds[rnd.IntN(len(soakKinds))], backend: -1}
	err := c.run([]string{s.lb, s.wrapped}[rnd.IntN(2)])
	disturbed := s.disturbedSince(before, c.backend)
	if c.backend >= 0 {
		c.record.outOfTurn = s.isOutOfTurn(before, c.backend)
		if b := s.backends[c.backend]; b.closed.heldSince(before.backends[c.backend].closed) {
			s.add("backend %d got a connection though it took none since before that began", b.id)
		}
	}
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
