//go:build unix

package tcplb

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
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
	for range 10 {
		c, err := net.DialTimeout("tcp", address, 100*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	t.Skip("this kernel does not let a listener's queue be full")
	return ""
}

func TestFaultBlackHoled(t *testing.T) {
	watchLeftovers(t)
	hole, s := blackHole(t), namedServer(t, "a")
	lb := startLB(t, `"dial_timeout":"50ms","health_checks":{"active":{"disabled":true}}`, hole, s.address)
	for range 4 {
		name, err := ask(lb)
		require.NoError(t, err)
		require.Equal(t, "a", name)
	}
	requireBooksBalance(t, 4)
	timeouts := dialErrors(t, hole, dialTimeout)
	require.Positive(t, timeouts)
	require.Equal(t, timeouts, metric(t, "retries_total", labels("backend", hole)))
	require.Zero(t, metric(t, "connections_total", labels("backend", hole)))
}

func TestFaultBlackHoledIsFoundByChecks(t *testing.T) {
	watchLeftovers(t)
	hole, s := blackHole(t), namedServer(t, "a")
	lb := startLB(t, `"health_checks":{"active":{"interval":"1h","timeout":"50ms"}}`, hole, s.address)
	checked(t)
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

// nameServer is a DNS server that knows one name, or for a while does not.
type nameServer struct {
	name  dnsmessage.Name
	known atomic.Bool
}

// testNameServer is asked in place of the system's if it is set.
var testNameServer atomic.Pointer[string]

func init() {
	resolver.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		if a := testNameServer.Load(); a != nil {
			network, address = "udp", *a
		}
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}
}

func startNameServer(t testing.TB, name string) *nameServer {
	t.Helper()
	s := &nameServer{name: dnsmessage.MustNewName(name + ".")}
	s.known.Store(true)
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	address := conn.LocalAddr().String()
	testNameServer.Store(&address)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.serve(conn)
	}()
	t.Cleanup(func() {
		testNameServer.Store(nil)
		_ = conn.Close()
		<-done
	})
	return s
}

func (s *nameServer) serve(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		m.Response, m.Additionals = true, nil
		switch {
		case q.Name != s.name || !s.known.Load():
			m.RCode = dnsmessage.RCodeNameError
		case q.Type == dnsmessage.TypeA:
			m.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
				Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
			}}
		}
		if answer, err := m.Pack(); err == nil {
			_, _ = conn.WriteTo(answer, from)
		}
	}
}

func TestFaultNameStopsResolving(t *testing.T) {
	watchLeftovers(t)
	const host = "db.tcp-lb.test"
	names := startNameServer(t, host)
	s, other := duoServer(t, "named"), duoServer(t, "other")
	named := host + ":" + portOf(s.address)
	lb := freeAddress(t)
	config := func(checks string) string {
		return lbConfig("tcp_lb/"+lb, backendsJSON(named, other.address)+","+checks+"}")
	}
	runCaddy(t, config(triggeredChecks))
	checked(t)
	require.True(t, backendStatuses(t)[named].Healthy)
	l := startLoad(lb, 2, 4) // streams to both

	names.known.Store(false)
	eventually(t, func() bool { return !backendStatuses(t)[named].Healthy }, "down, by the failed connect")
	require.Contains(t, backendStatuses(t)[named].LastError, "no such host")
	require.Positive(t, dialErrors(t, named, dialOther))
	eventually(t, func() bool { return metric(t, "connections_active", labels("backend", named)) == 2 }, "its streams are left")
	names.known.Store(true)
	reload(t, config(fastChecks))
	eventually(t, func() bool { return backendStatuses(t)[named].Healthy }, "up again")
	served := metric(t, "connections_total", labels("backend", named))
	eventually(t, func() bool { return metric(t, "connections_total", labels("backend", named)) > served }, "and in use")
	l.finish(t)
	requireBooksBalance(t, int(l.short.Load())+4)
}
