//go:build unix

package tcplb

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// blackHole listens, and leaves every connection waiting: its queue is full.
func blackHole(t testing.TB) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Close(fd) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, unix.Listen(fd, 0))
	name, err := unix.Getsockname(fd)
	require.NoError(t, err)
	address := (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*unix.SockaddrInet4).Port}).String()
	// One finds room, however long that takes here. From then on a connect that takes
	// longer than a moment is one that waits.
	patience := hangTimeout
	for range 10 {
		c, err := net.DialTimeout("tcp", address, patience)
		if err != nil {
			require.NotEqual(t, hangTimeout, patience, "%v", err)
			return address
		}
		t.Cleanup(func() { _ = c.Close() })
		patience = 100 * time.Millisecond
	}
	t.Skip("this kernel does not let a listener's queue be full")
	return ""
}

func TestFaultBlackHoled(t *testing.T) {
	watchLeftovers(t)
	hole, s := blackHole(t), namedServer(t, "a")
	// For the good one the time has to be enough, too, hence all at once.
	lb := startLB(t, `"dial_timeout":"2s","health_checks":{"active":{"disabled":true}}`, hole, s.address)
	var found findings
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if name, err := ask(lb); err != nil || name != "a" {
				found.add("%q, %v", name, err)
			}
		})
	}
	wg.Wait()
	found.require(t)
	requireBooksBalance(t, 4)
	timeouts := dialErrors(t, hole, dialTimeout)
	require.Positive(t, timeouts)
	require.Equal(t, timeouts, metric(t, "retries_total", labels("backend", hole)))
	require.Zero(t, metric(t, "connections_total", labels("backend", hole)))
}

func TestFaultBlackHoledIsFoundByChecks(t *testing.T) {
	watchLeftovers(t)
	hole, s := blackHole(t), namedServer(t, "a")
	lb := startLB(t, `"health_checks":{"active":{"interval":"1h","fast_interval":"10ms","timeout":"50ms"}}`, hole, s.address)
	checked(t)
	eventually(t, func() bool { return backendStatuses(t)[s.address].Healthy }, "up, if its first check took too long, too")
	require.False(t, backendStatuses(t)[hole].Healthy)
	require.Contains(t, backendStatuses(t)[hole].LastError, "timeout")
	for range 3 {
		name, err := ask(lb)
		require.NoError(t, err)
		require.Equal(t, "a", name)
	}
	requireBooksBalance(t, 3)
	require.Zero(t, dialErrors(t, hole, dialTimeout), "no client's connection was tried on it")
}

func TestFaultNameStopsResolving(t *testing.T) {
	watchLeftovers(t)
	s, other := duoServer(t, "named"), duoServer(t, "other")
	host := "db-" + portOf(s.address) + ".tcp-lb.test"
	names := startNameServer(t)
	names.answer(host, "127.0.0.1")
	named := host + ":" + portOf(s.address)
	lb := freeAddress(t)
	config := func(checks string) string {
		return lbConfig("tcp_lb/"+lb, backendsJSON(named, other.address)+","+checks+"}")
	}
	runCaddy(t, config(triggeredChecks))
	checked(t)
	require.True(t, backendStatuses(t)[named].Healthy)
	l := startLoad(lb, 2, 4) // streams to both

	names.answer(host)
	eventually(t, func() bool { return !backendStatuses(t)[named].Healthy }, "down, by the failed connect")
	require.Contains(t, backendStatuses(t)[named].LastError, "no such host")
	require.Positive(t, dialErrors(t, named, dialOther))
	eventually(t, func() bool { return metric(t, "connections_active", labels("backend", named)) == 2 }, "its streams are left")
	names.answer(host, "127.0.0.1")
	reload(t, config(fastChecks))
	eventually(t, func() bool { return backendStatuses(t)[named].Healthy }, "up again")
	served := metric(t, "connections_total", labels("backend", named))
	eventually(t, func() bool { return metric(t, "connections_total", labels("backend", named)) > served }, "and in use")
	l.finish(t)
	requireBooksBalance(t, int(l.short.Load())+4)
}

func TestDialTargetEndsWithItsContext(t *testing.T) {
	watchLeftovers(t)
	hole := blackHole(t)
	host := "hole-" + portOf(hole) + ".tcp-lb.test"
	names := startNameServer(t)
	for _, c := range []struct {
		name, address string
		fault         fault
	}{
		{"an address", hole, faultNone},
		{"a name", host + ":" + portOf(hole), faultNone},
		{"a name that is being looked up", "un" + host + ":80", faultSilent},
	} {
		t.Run(c.name, func(t *testing.T) {
			names.answer(host, "127.0.0.1", "::1")
			names.fail(c.fault)
			to, err := parseTarget(c.address)
			require.NoError(t, err)
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			_, err = dialTarget(ctx, to, 2*hangTimeout)
			require.ErrorIs(t, err, context.Canceled)
		})
	}
}

// A server is found whichever of the name's addresses it has, and what was tried
// beside it is closed.
func TestDialTargetTriesAllAddresses(t *testing.T) {
	watchLeftovers(t)
	names := startNameServer(t)
	s := echoServer(t)
	host := "all-" + portOf(s.address) + ".tcp-lb.test"
	name, err := parseTarget(host + ":" + portOf(s.address))
	require.NoError(t, err)
	for _, list := range [][]string{{"127.0.0.1"}, {"::1", "127.0.0.1"}, {"127.0.0.1", "::1"}, {"127.255.255.254", "127.0.0.1"}} {
		names.answer(host, list...)
		c, err := dialTarget(t.Context(), name, hangTimeout)
		require.NoError(t, err, list)
		require.Equal(t, s.address, c.RemoteAddr().String())
		require.NoError(t, c.Close())
	}
	names.answer(host, "::1")
	c, err := dialTarget(t.Context(), name, hangTimeout)
	require.Error(t, err)
	require.Nil(t, c, "a nil interface, not a nil pointer in one")
	names.answer(host)
	_, err = dialTarget(t.Context(), name, hangTimeout)
	require.ErrorContains(t, err, "dial tcp: lookup "+host)
	require.ErrorContains(t, err, "no such host")
	require.Equal(t, dialOther, classify(err))
}

// A connect that takes long does not keep the process: drain_timeout is the
// bound for all that a connection does, and the log says so.
func TestExitEndsConnects(t *testing.T) {
	hole, lb := blackHole(t), freeAddress(t)
	options := `"dial_timeout":"1h","drain_timeout":"1s",` + checksDisabled + ","
	c := startChild(t, strings.Replace(lbConfig("tcp_lb/"+lb, options+backendsJSON(hole)+"}"), `"ERROR"`, `"DEBUG"`, 1))
	eventually(t, func() bool { return listens(lb) }, "listening")
	conn := dialClient(t, lb)
	write(t, conn, "x")
	c.line(t, conn.LocalAddr().String()) // it was accepted
	c.signal(t, terminate)
	require.LessOrEqual(t, c.line(t, "waiting for open connections")["at_most"], 2.0)
	expectClosed(t, conn)
	require.Equal(t, 0, c.wait(t))
}
