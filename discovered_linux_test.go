package tcplb

import (
	"io"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

// onOnePort starts servers at 127.0.0.<n> for each n, all on one port, which say
// their address.
func onOnePort(t testing.TB, last ...int) (port string, servers []*server) {
	t.Helper()
	_, port, err := net.SplitHostPort(freeAddress(t))
	require.NoError(t, err)
	for _, n := range last {
		address := net.JoinHostPort("127.0.0."+strconv.Itoa(n), port)
		ln, err := net.Listen("tcp", address)
		require.NoError(t, err)
		s := &server{t: t, address: address, conns: make(map[*net.TCPConn]bool), handle: func(c *net.TCPConn) {
			_, _ = c.Write([]byte(address))
			echo(c)
		}}
		s.startOn(ln)
		t.Cleanup(s.kill)
		servers = append(servers, s)
	}
	return port, servers
}

// greeting returns the first n bytes that a client of the balancer gets.
func greeting(lb string, n int) (string, error) {
	c, err := net.DialTimeout("tcp", lb, hangTimeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(hangTimeout)); err != nil {
		return "", err
	}
	buf := make([]byte, n)
	_, err = io.ReadFull(c, buf)
	return string(buf), err
}

// TestBackendsComeAndGoWithDNS drives clients while the answers change, fail and
// are empty, and over a reload.
func TestBackendsComeAndGoWithDNS(t *testing.T) {
	watchLeftovers(t)
	names := startNameServer(t)
	port, servers := onOnePort(t, 2, 3)
	first, second := servers[0].address, servers[1].address
	lb := freeAddress(t)
	config := lbConfig("tcp_lb/"+lb, `"name":"web","dynamic_backends":[{"source":"a","name":"db.internal","port":`+port+
		`,"refresh":"1s","versions":["ipv4"],"resolvers":["`+names.packets.LocalAddr().String()+`"]}],`+checksDisabled+"}")
	require.NoError(t, validate(t, config))
	require.Zero(t, names.questions(), "a config that is only checked asks nobody")

	// There is no such name yet.
	runCaddy(t, config)
	name := "a db.internal " + port
	source := labels("lb", "web", "source", name)
	eventually(t, func() bool {
		return metric(t, "source_lookups_total", labels("lb", "web", "source", name, "status", "empty")) > 0
	}, "a first lookup")
	require.EqualValues(t, 1, metric(t, "source_failing", source))
	refused(t, lb)

	names.answer("db.internal", "127.0.0.2")
	eventually(t, func() bool { return metric(t, "source_backends", source) == 1 }, "it is found")
	require.Zero(t, metric(t, "source_failing", source))
	held := dialClient(t, lb)
	expect(t, held, first)

	names.answer("db.internal", "127.0.0.3")
	eventually(t, func() bool { said, err := greeting(lb, len(second)); return err == nil && said == second }, "the other takes its place")
	write(t, held, "x")
	expect(t, held, "x") // it has time to end

	// Trouble of each kind changes nothing, nor does a reload in the middle.
	for _, c := range []struct {
		status string
		begin  func()
	}{
		{"failure", func() { names.fail(faultFails, dnsmessage.TypeA) }},
		{"empty", func() { names.fail(faultNone, dnsmessage.TypeA); names.answer("db.internal") }},
	} {
		c.begin()
		of := labels("lb", "web", "source", name, "status", c.status)
		before := metric(t, "source_lookups_total", of)
		eventually(t, func() bool { return metric(t, "source_lookups_total", of) > before }, "%s", c.status)
		require.EqualValues(t, 1, metric(t, "source_failing", source))
		for _, next := range []string{config, replaceOnce(t, config, `"name":"web"`, `"name":"web","access_log":true`), config} {
			reload(t, next)
			said, err := greeting(lb, len(second))
			require.NoError(t, err)
			require.Equal(t, second, said)
		}
		require.GreaterOrEqual(t, metric(t, "source_lookups_total", of), before, "counted on over reloads")
	}
	sources := poolSummaries(t)["web"].Sources
	require.Len(t, sources, 1)
	require.Equal(t, name, sources[0].Source)
	require.NotEmpty(t, sources[0].Error)
	require.False(t, sources[0].FailingSince.IsZero())
	require.Equal(t, 1, sources[0].Backends)

	names.fail(faultNone, dnsmessage.TypeA)
	names.answer("db.internal", "127.0.0.2", "127.0.0.3")
	eventually(t, func() bool { return poolSummaries(t)["web"].Available == 2 }, "both")
	require.Empty(t, poolSummaries(t)["web"].Sources[0].Error)
	require.NoError(t, held.Close())
}
