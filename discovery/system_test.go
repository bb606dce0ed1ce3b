package discovery

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// asTheSystemsConfig sets the text of resolv.conf.
func asTheSystemsConfig(t testing.TB, text string) {
	t.Helper()
	file, before := filepath.Join(t.TempDir(), "resolv.conf"), systemConfig
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	systemConfig = file
	t.Cleanup(func() { systemConfig = before })
}

func skipWithoutConfig(t testing.TB) {
	if withoutConfig {
		t.Skip("the system has no resolv.conf")
	}
}

func TestTheSystemsServers(t *testing.T) {
	skipWithoutConfig(t)
	asTheSystemsConfig(t, "nameserver 10.0.0.53\nnameserver fd00::53\nsearch one.internal two.internal. . bad..domain\noptions ndots:2 timeout:3 attempts:4\n")
	s := systemServers()
	require.Equal(t, []string{"10.0.0.53:53", "[fd00::53]:53"}, s.nameServers)
	require.Equal(t, 3*time.Second, s.timeout)
	require.Equal(t, 4, s.attempts)
	require.True(t, s.hosts)
	require.Equal(t, []string{"db.x.one.internal.", "db.x.two.internal.", "db.x."}, s.names("db.x"), "too few dots")
	require.Equal(t, []string{"db.x.y.", "db.x.y.one.internal.", "db.x.y.two.internal."}, s.names("db.x.y"))
	require.Equal(t, []string{"db."}, s.names("db."))

	asTheSystemsConfig(t, "nameserver 10.0.0.54\noptions timeout:1000 attempts:1000\nsearch x\n")
	s = systemServers()
	require.Equal(t, []string{"10.0.0.54:53"}, s.nameServers, "it is read anew")
	require.Equal(t, lookupTimeout, s.timeout)
	require.Equal(t, 10, s.attempts)

	systemConfig = filepath.Join(t.TempDir(), "none")
	s = systemServers()
	require.Equal(t, []string{"127.0.0.1:53", "[::1]:53"}, s.nameServers)
	require.Contains(t, s.names("db.internal"), "db.internal.")
}

func TestOwnServers(t *testing.T) {
	s := ownServers([]string{"10.0.0.53", "10.0.0.54:5353", "fd00::53", "[fd00::54]", "[fd00::55]:53", "dns.internal"})
	require.Equal(t, []string{"10.0.0.53:53", "10.0.0.54:5353", "[fd00::53]:53", "[fd00::54]:53", "[fd00::55]:53", "dns.internal:53"}, s.nameServers)
	require.False(t, s.hosts)
	require.Equal(t, []string{"db."}, s.names("db"), "no search domains")
}

// TestNamesOfTheHostsFile are found there, and DNS is not asked for them.
func TestNamesOfTheHostsFile(t *testing.T) {
	if len(lookupHostsFile(context.Background(), "localhost")) == 0 {
		t.Skip("localhost is not in this system's hosts file")
	}
	s := startNameServer(t, "localhost. 60 A 10.6.6.6", "localhost.one. 60 A 10.6.6.6", "_pg._tcp.internal. 60 SRV 1 1 1 localhost.")
	r := asking(s.address)
	r.hosts = true
	r.names = func(name string) []string { return []string{name + ".one.", name + "."} }
	f := anAddressFinder()
	f.name, f.wanted.v6 = "localhost", false
	res, err := f.find(context.Background(), r)
	require.NoError(t, err)
	require.Equal(t, []string{"127.0.0.1:5432"}, addressesOf(res.found))
	require.Equal(t, forever, res.ttl)
	require.Empty(t, s.questions())

	r = asking(s.address)
	r.hosts = true
	service := aServiceFinder()
	service.wanted.v6 = false
	require.Equal(t, []string{"127.0.0.1:1"}, addressesFound(t, service, r))
	require.Equal(t, []string{"SRV _pg._tcp.internal."}, s.questions())

	r.hosts = false
	require.Equal(t, []string{"10.6.6.6:5432"}, addressesFound(t, f, r))
	require.Empty(t, lookupHostsFile(context.Background(), "no.such.host.invalid"))
}

// TestTheSystemsLibrary is for where there is no resolv.conf.
func TestTheSystemsLibrary(t *testing.T) {
	s := startNameServer(t, "db.internal. 60 A 10.0.0.1", "db.internal. 60 AAAA fd00::1", "db.internal. 60 A 0.0.0.0",
		"_pg._tcp.internal. 60 SRV 1 20 1 db.internal.", "_pg._tcp.internal. 60 SRV 2 30 2 db.internal.")
	library := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.address)
	}}
	r := newRound(servers{library: library, names: func(name string) []string { return []string{name + "."} }}, slots)
	require.Equal(t, []string{"10.0.0.1:5432", "[fd00::1]:5432"}, addressesFound(t, anAddressFinder(), r))
	res, err := aServiceFinder().find(context.Background(), r)
	require.NoError(t, err)
	require.Equal(t, []Found{{Address: "10.0.0.1:1", Weight: 20}, backup("10.0.0.1:2", 30), {Address: "[fd00::1]:1", Weight: 20}, backup("[fd00::1]:2", 30)}, res.found)

	s.set()
	_, err = anAddressFinder().find(context.Background(), r)
	require.ErrorIs(t, err, errNone)
	_, err = aServiceFinder().find(context.Background(), r)
	require.ErrorIs(t, err, errNone)
	s.says(dns.RcodeServerFailure)
	_, err = anAddressFinder().find(context.Background(), r)
	require.Error(t, err)
	require.NotErrorIs(t, err, errNone)
	_, err = aServiceFinder().find(context.Background(), r)
	require.Error(t, err)
	require.NotErrorIs(t, err, errNone)
}

func TestMappedAddressesAreIPv4(t *testing.T) {
	require.False(t, connectable(netip.Addr{}))
	require.Equal(t, []netip.Addr{netip.MustParseAddr("10.0.0.1")}, usable([]dns.RR{&dns.AAAA{AAAA: net.ParseIP("::ffff:10.0.0.1")}}))
}
