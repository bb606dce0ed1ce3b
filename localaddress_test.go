package tcplb

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// fromServer is an echo server that tells where connections are from.
func fromServer(t testing.TB) (s *server, seen chan string) {
	t.Helper()
	seen = make(chan string, 1000)
	return startServer(t, func(c *net.TCPConn) {
		seen <- c.RemoteAddr().(*net.TCPAddr).IP.String()
		echo(c)
	}), seen
}

// needAddress skips where the system has no more loopback addresses than one.
func needAddress(t testing.TB, address string) {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Skip("needs another loopback address: ", err)
	}
	require.NoError(t, ln.Close())
}

func TestLocalAddress(t *testing.T) {
	needAddress(t, "127.0.0.5")
	needAddress(t, "127.0.0.6")
	t.Setenv("TCPLB_TEST_LOCAL", "127.0.0.5")
	one, seenByOne := fromServer(t)
	two, seenByTwo := fromServer(t)
	lb := freeAddress(t)
	_, port, err := net.SplitHostPort(two.address)
	require.NoError(t, err)
	config := func(more string) string {
		return lbConfig(lb, fmt.Sprintf(`{"backends":[{"address":%q},{"address":%q%s}],"local_address":"{env.TCPLB_TEST_LOCAL}","health_checks":{"active":{"interval":"24h"}}}`,
			one.address, "localhost:"+port, more))
	}
	runCaddy(t, config(`,"local_address":"127.0.0.6"`))
	checked(t)
	require.Equal(t, "127.0.0.5", <-seenByOne, "the check")
	require.Equal(t, "127.0.0.6", <-seenByTwo, "the check, of a name")
	for range 2 {
		echoed(t, lb, 10)
	}
	require.Equal(t, "127.0.0.5", <-seenByOne)
	require.Equal(t, "127.0.0.6", <-seenByTwo)

	reload(t, config(`,"local_address":"off"`))
	require.Equal(t, "127.0.0.1", <-seenByTwo, "the check asks again, from elsewhere")
	for range 2 {
		echoed(t, lb, 10)
	}
	require.Equal(t, "127.0.0.5", <-seenByOne)
	require.Equal(t, "127.0.0.1", <-seenByTwo)
}

// An address that the machine does not have, or not now, is told of, and makes
// what it is for unavailable: this instance can't serve.
func TestLocalAddressOfAnotherMachine(t *testing.T) {
	s := echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig(lb, fmt.Sprintf(`{%s,"local_address":"192.0.2.9"}`, backendsJSON(s.address))))
	checked(t)
	b := registry.newest("tcp_lb").members()[0].Backend
	eventually(t, func() bool { return !b.Available() }, "it is found down")
	require.Equal(t, "local_address 192.0.2.9: this machine does not have that address", *b.lastError.Load())

	to, err := parseTarget(s.address)
	require.NoError(t, err)
	to.from = netip.MustParseAddr("192.0.2.9")
	_, err = dialTarget(context.Background(), to, hangTimeout)
	require.ErrorIs(t, err, errNotHere)
	require.False(t, isScarcity(err))
	require.Equal(t, dialOther, classify(err))
}

// Of a name's addresses only those of the local address's family will do.
func TestLocalAddressOfOneFamily(t *testing.T) {
	needAddress(t, "127.0.0.5")
	s, seen := fromServer(t)
	name := &hostName{host: "db.example"}
	to := target{host: "db.example", name: name, port: s.ln.Addr().(*net.TCPAddr).AddrPort().Port(), from: netip.MustParseAddr("127.0.0.5")}
	answers := func(addrs ...string) {
		name.lookup = func(context.Context, string) (a answer, err error) {
			for _, each := range addrs {
				a.addrs = append(a.addrs, netip.MustParseAddr(each))
			}
			return a, nil
		}
	}
	answers("::1", "127.0.0.1")
	c, err := dialTarget(t.Context(), to, hangTimeout)
	require.NoError(t, err)
	defer c.Close()
	require.Equal(t, "127.0.0.5", <-seen)

	answers("::1", "fd00::1")
	_, err = dialTarget(t.Context(), to, hangTimeout)
	require.EqualError(t, err, "dial tcp: lookup db.example: no IPv4 address, as local_address 127.0.0.5 is")
	require.Equal(t, dialOther, classify(err))
	require.False(t, isScarcity(err))

	to.from = netip.MustParseAddr("::1")
	answers("127.0.0.1")
	_, err = dialTarget(t.Context(), to, hangTimeout)
	require.ErrorContains(t, err, "no IPv6 address, as local_address ::1 is")

	to = target{literal: netip.MustParseAddr("127.0.0.1"), port: 1, from: netip.MustParseAddr("::1")}
	_, err = dialTarget(t.Context(), to, hangTimeout)
	require.ErrorContains(t, err, "local_address ::1 is an IPv6 address, and this an IPv4 one")
	require.NotErrorIs(t, err, syscall.ECONNREFUSED)
}

func TestLocalAddressesThatAreNone(t *testing.T) {
	for text, want := range map[string]string{
		"10.0.0.9:80":     "want an IP address without a port, which the system chooses",
		"[::1]:80":        "want an IP address without a port",
		"10.0.0.0/24":     "want an IP address of this machine",
		"eth0":            "want an IP address of this machine",
		"db.internal":     "want an IP address of this machine",
		"0.0.0.0":         "leave it out for any address of this machine",
		"::":              "leave it out for any address of this machine",
		"224.0.0.1":       "no connection is from that",
		"255.255.255.255": "no connection is from that",
		"ff02::1":         "no connection is from that",
	} {
		require.ErrorContains(t, checkLocalAddress(text), text+": "+want)
	}
	for _, text := range []string{"off", "10.0.0.9", "fd00::9", "fe80::1%eth0", "{env.NODE}"} {
		require.NoError(t, checkLocalAddress(text))
	}
	require.Equal(t, "10.0.0.9", localAddress("::ffff:10.0.0.9").String())
}

// One fingerprint however it is spelled.
func TestLocalAddressIsCanonical(t *testing.T) {
	var prints []string
	for _, text := range []string{"FD00::0009", "fd00::9"} {
		h := handlerOf(t, fmt.Sprintf(`{"backends":[{"address":"[::1]:80","local_address":%q}],"local_address":%q}`, text, text))
		require.NoError(t, h.fill())
		require.NoError(t, h.check())
		print, err := h.fingerprint()
		require.NoError(t, err)
		prints = append(prints, print)
	}
	require.Equal(t, prints[0], prints[1])
	require.Equal(t, 2, strings.Count(prints[0], "fd00::9"))
}
