package tcplb

import (
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// newHost is a name that nothing remembers of an earlier test.
func newHost(s *server) string { return "at-" + portOf(s.address) + ".tcp-lb.test" }

// serverOn is a duoServer on the port of another, at another loopback address.
func serverOn(t testing.TB, host, port, name string) *server {
	t.Helper()
	s := &server{t: t, address: host + ":" + port, conns: make(map[*net.TCPConn]bool)}
	s.handle = func(c *net.TCPConn) { serveDuo(c, name) }
	s.start()
	t.Cleanup(s.kill)
	return s
}

// Both backends run all the time. Their resolver stalls, over a reload, and comes
// back with another address for each.
func TestFaultResolverStalls(t *testing.T) {
	for name, f := range map[string]fault{"says nothing": faultSilent, "fails": faultFails, "refuses": faultRefuses} {
		t.Run(name, func(t *testing.T) { testFaultResolver(t, f) })
	}
}

func testFaultResolver(t *testing.T, f fault) {
	watchLeftovers(t)
	logs := observeNames(t)
	oldA, oldB := duoServer(t, "old"), duoServer(t, "old")
	hostA, hostB := newHost(oldA), newHost(oldB)
	names := startNameServer(t)
	names.answer(hostA, "127.0.0.1")
	names.answer(hostB, "127.0.0.1")
	a, b := hostA+":"+portOf(oldA.address), hostB+":"+portOf(oldB.address)
	newA, newB := serverOn(t, "127.0.0.2", portOf(oldA.address), "new"), serverOn(t, "127.0.0.2", portOf(oldB.address), "new")
	lb := freeAddress(t)
	config := func(options string) string {
		return lbConfig("tcp_lb/"+lb, backendsJSON(a, b)+`,"dial_timeout":"2s","health_checks":{"active":{"interval":"50ms","fast_interval":"10ms","timeout":"2s"}}`+options+"}")
	}
	runCaddy(t, config(""))
	checked(t)
	l := startLoad(lb, 2, 4)
	inTrouble := func() bool {
		for _, s := range backendStatuses(t) {
			if !strings.Contains(s.LastError, "; using its addresses of 20") {
				return false
			}
		}
		return true
	}

	names.fail(f)
	eventually(t, inTrouble, "last_error says so: %v", lazily(func() any { return backendStatuses(t) }))
	reload(t, config(`,"access_log":true`))
	served := l.short.Load()
	checks := metric(t, "health_checks_total", labels("status", "success"))
	eventually(t, func() bool { return l.short.Load() > served+50 }, "clients are served")
	eventually(t, func() bool { return metric(t, "health_checks_total", labels("status", "success")) > checks+10 }, "checks pass")
	require.True(t, inTrouble(), "the reload keeps what is remembered")
	require.Zero(t, newA.acceptedCount()+newB.acceptedCount())

	names.answer(hostA, "127.0.0.2")
	names.answer(hostB, "127.0.0.2")
	names.fail(faultNone)
	eventually(t, func() bool {
		name, err := tellName(lb)
		l.short.Add(1)
		return err == nil && name == "new" && newA.acceptedCount() > 0 && newB.acceptedCount() > 0
	}, "connects go to the new addresses")
	eventually(t, func() bool { return !inTrouble() }, "and the trouble is over")
	l.finish(t)
	for _, s := range backendStatuses(t) {
		require.True(t, s.Healthy)
	}
	require.Zero(t, metric(t, "health_checks_total", labels("status", "failure")))
	require.Zero(t, metric(t, "connection_errors_total", nil))
	require.Zero(t, metric(t, "health_transitions_total", nil))
	requireBooksBalance(t, int(l.short.Load())+4)
	eventually(t, func() bool { return logs.Len() == 4 }, "the log tells the beginning and the end, for each name: %v", lazily(func() any { return logs.All() }))
	require.ElementsMatch(t, []string{logServesOn, logServesOn, logAnswered, logAnswered}, logged(logs))
}

func TestFaultResolverStalledFromTheStart(t *testing.T) {
	watchLeftovers(t)
	s := namedServer(t, "a")
	host := newHost(s)
	names := startNameServer(t)
	names.answer(host, "127.0.0.1")
	names.fail(faultSilent)
	backend := host + ":" + portOf(s.address)
	lb := startLB(t, `"dial_timeout":"1s","health_checks":{"active":{"interval":"50ms","fast_interval":"10ms","timeout":"1s"}}`, backend)
	got, _ := ask(lb)
	require.Empty(t, got)
	require.Equal(t, 1, lookupsUnderWay(), "the client did not wait for its end")
	eventually(t, func() bool { return !backendStatuses(t)[backend].Healthy }, "down")
	require.Contains(t, backendStatuses(t)[backend].LastError, "lookup "+host+": i/o timeout")

	names.fail(faultNone)
	eventually(t, func() bool { return backendStatuses(t)[backend].Healthy }, "up when the resolver is back")
	name, err := ask(lb)
	require.NoError(t, err)
	require.Equal(t, "a", name)
	eventually(t, func() bool { return backendStatuses(t)[backend].LastError == "" }, "a lookup is answered in time")
}

// A name's memory ends with the backends that have it.
func TestNamesAreForgotten(t *testing.T) {
	const host = "forgotten.tcp-lb.test"
	target, err := parseTarget(host + ":80")
	require.NoError(t, err)
	has := func() bool {
		names.mu.Lock()
		defer names.mu.Unlock()
		_, ok := names.byHost[host]
		return ok
	}
	require.True(t, has())
	runtime.GC()
	require.True(t, has(), "as long as somebody has it")
	runtime.KeepAlive(target)
	eventually(t, func() bool { runtime.GC(); return !has() }, "forgotten")
}
