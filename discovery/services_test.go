package discovery

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

func aServiceFinder() *serviceFinder {
	return &serviceFinder{name: "_pg._tcp.internal", wanted: families{v4: true, v6: true}}
}

// backup is Found of a backup.
func backup(address string, weight int) Found {
	return Found{Address: address, Weight: weight, Backup: true}
}

func TestServersOfAService(t *testing.T) {
	s := startNameServer(t,
		"_pg._tcp.internal. 60 SRV 10 20 5432 a.internal.",
		"_pg._tcp.internal. 60 SRV 10 10 5433 B.internal.",
		"_pg._tcp.internal. 60 SRV 20 5 5432 c.internal.",
		"_pg._tcp.internal. 60 SRV 30 7 5432 d.internal.",
		"_pg._tcp.internal. 60 SRV 0 1 5432 .", // of no service
		"_pg._tcp.internal. 60 SRV 0 1 0 a.internal.",
		"a.internal. 60 A 10.0.0.1", "a.internal. 60 AAAA fd00::1", "b.internal. 7 A 10.0.0.1",
		"c.internal. 60 CNAME e.internal.", "e.internal. 60 A 10.0.0.3", "d.internal. 60 A 10.0.0.4", "d.internal. 60 A 10.0.0.1")
	f := aServiceFinder()
	res, err := f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.NoError(t, res.partial)
	require.Equal(t, []Found{
		{Address: "10.0.0.1:5432", Weight: 20}, {Address: "10.0.0.1:5433", Weight: 10}, backup("10.0.0.3:5432", 5), backup("10.0.0.4:5432", 7),
		{Address: "[fd00::1]:5432", Weight: 20},
	}, res.found)
	require.Equal(t, 7*time.Second, res.ttl)

	s.set("_pg._tcp.internal. 60 SRV 0 1 5432 .")
	_, err = f.find(context.Background(), asking(s.address))
	require.ErrorIs(t, err, errNone, "there is decidedly no such service")
	s.set()
	_, err = f.find(context.Background(), asking(s.address))
	require.ErrorIs(t, err, errNone)

	s.set("_pg._tcp.internal. 60 SRV 10 20 5432 10.0.0.9.")
	require.Equal(t, []string{"10.0.0.9:5432"}, addressesFound(t, f, asking(s.address)), "an address for a name is what many servers let pass")
}

// TestWeights compares those of SRV records with those of backends.
func TestWeights(t *testing.T) {
	for _, c := range []struct {
		records []uint16
		weights []int
	}{
		{[]uint16{0, 0}, []int{1, 1}},
		{[]uint16{1, 256}, []int{1, 256}},
		{[]uint16{60, 40}, []int{60, 40}},
		{[]uint16{100, 300}, []int{85, 256}},
		{[]uint16{1, 65535}, []int{1, 256}},
		{[]uint16{32768, 65535, 65535}, []int{128, 256, 256}},
		{[]uint16{0, 1}, []int{1, 256}},
		{[]uint16{0, 60, 40}, []int{1, 256, 171}},
		{[]uint16{0, 65535, 1}, []int{1, 256, 1}},
	} {
		var records []*dns.SRV
		for _, w := range c.records {
			records = append(records, &dns.SRV{Weight: w})
		}
		scaled := weights(records)
		var got []int
		for _, w := range c.records {
			got = append(got, scaled(w))
		}
		require.Equal(t, c.weights, got, "%v", c.records)
	}
}

// TestTiersAreScaledApart has weights of backups that do not fit, beside others
// that do.
func TestTiersAreScaledApart(t *testing.T) {
	s := startNameServer(t,
		"_pg._tcp.internal. 60 SRV 1 30 1 a.internal.", "_pg._tcp.internal. 60 SRV 1 10 2 a.internal.",
		"_pg._tcp.internal. 60 SRV 2 1000 3 a.internal.", "_pg._tcp.internal. 60 SRV 3 500 4 a.internal.", "a.internal. 60 A 10.0.0.1")
	res, err := aServiceFinder().find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []Found{{Address: "10.0.0.1:1", Weight: 30}, {Address: "10.0.0.1:2", Weight: 10}, backup("10.0.0.1:3", 256), backup("10.0.0.1:4", 128)}, res.found)
}

// TestOneServerTwice is of one address under two names.
func TestOneServerTwice(t *testing.T) {
	s := startNameServer(t,
		"_pg._tcp.internal. 60 SRV 2 50 1 a.internal.", "_pg._tcp.internal. 60 SRV 1 10 1 b.internal.", "_pg._tcp.internal. 60 SRV 1 20 1 c.internal.",
		"a.internal. 60 A 10.0.0.1", "b.internal. 60 A 10.0.0.1", "c.internal. 60 A 10.0.0.1")
	for range 3 {
		res, err := aServiceFinder().find(context.Background(), asking(s.address))
		require.NoError(t, err)
		require.Equal(t, []Found{{Address: "10.0.0.1:1", Weight: 20}}, res.found)
	}
}

// TestTargetsThatFail keep what they had, while the others' answers count.
func TestTargetsThatFail(t *testing.T) {
	service := []string{"_pg._tcp.internal. 60 SRV 1 1 1 a.internal.", "_pg._tcp.internal. 60 SRV 1 1 2 b.internal."}
	s := startNameServer(t, append(service, "a.internal. 60 A 10.0.0.1", "b.internal. 60 A 10.0.0.2")...)
	failing := func(name string) {
		s.deviates(func(question, answer *dns.Msg, network string) [][]byte {
			if name == "" || question.Question[0].Name == name {
				answer.Rcode, answer.Answer = dns.RcodeServerFailure, nil
			}
			return [][]byte{wire(t, answer, network)}
		})
	}
	f := aServiceFinder()

	failing("b.internal.")
	res, err := f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.1:1"}, addressesOf(res.found), "the rest is better than nothing")
	require.ErrorContains(t, res.partial, "b.internal.")

	s.deviates(nil)
	require.Len(t, addressesFound(t, f, asking(s.address)), 2)
	s.set(append(service, "a.internal. 60 A 10.0.0.3", "b.internal. 60 A 10.0.0.4")...)
	failing("b.internal.")
	res, err = f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.2:2", "10.0.0.3:1"}, addressesOf(res.found))
	require.ErrorContains(t, res.partial, "b.internal.")

	s.set(append(service, "a.internal. 60 A 10.0.0.3")...)
	s.deviates(nil)
	res, err = f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.2:2", "10.0.0.3:1"}, addressesOf(res.found), "a record still names it")
	require.ErrorContains(t, res.partial, "target b.internal.: no such name")

	s.set(service...)
	_, err = f.find(context.Background(), asking(s.address))
	require.ErrorIs(t, err, errNone)
	failing("b.internal.")
	_, err = f.find(context.Background(), asking(s.address))
	require.Error(t, err)
	require.NotErrorIs(t, err, errNone, "one of them failed")
	failing("")
	_, err = f.find(context.Background(), asking(s.address))
	require.ErrorContains(t, err, "SRV _pg._tcp.internal.: ")

	s.set(service[0], "a.internal. 60 A 10.0.0.3")
	s.deviates(nil)
	require.Equal(t, []string{"10.0.0.3:1"}, addressesFound(t, f, asking(s.address)), "without its record it is gone")
}

// TestAddressesThatComeAlong with the records are not asked for.
func TestAddressesThatComeAlong(t *testing.T) {
	s := startNameServer(t, "_pg._tcp.internal. 60 SRV 1 1 1 a.internal.", "a.internal. 60 AAAA fd00::1", "a.internal. 60 A 10.6.6.6")
	s.deviates(func(question, answer *dns.Msg, network string) [][]byte {
		if question.Question[0].Qtype == dns.TypeSRV {
			for _, line := range []string{"A.internal. 9 A 10.0.0.1", "a.internal. 5 A 10.0.0.2", "evil.internal. 1 A 10.6.6.6"} {
				rr, err := dns.NewRR(line)
				require.NoError(t, err)
				answer.Extra = append(answer.Extra, rr)
			}
		}
		return [][]byte{wire(t, answer, network)}
	})
	f := aServiceFinder()
	res, err := f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1"}, addressesOf(res.found), "the other family is asked for")
	require.Equal(t, 5*time.Second, res.ttl)
	require.NotContains(t, s.questions(), "A a.internal.")

	f.wanted = families{v6: true}
	require.Equal(t, []string{"[fd00::1]:1"}, addressesFound(t, f, asking(s.address)))
}

// TestAThousandServers each have a name of their own, and their first name server
// is silent.
func TestAThousandServers(t *testing.T) {
	var records []string
	for i := range 1000 {
		records = append(records,
			fmt.Sprintf("_pg._tcp.internal. 60 SRV 1 1 %d s%d.internal.", i+1, i), fmt.Sprintf("s%d.internal. 60 A 10.0.%d.%d", i, i/250, i%250))
	}
	s, silent := startNameServer(t, records...), startNameServer(t)
	silent.deviates(silence)
	r := asking(silent.address, s.address)
	r.timeout = time.Second
	f := aServiceFinder()
	f.wanted = families{v4: true}
	res, err := f.find(context.Background(), r)
	require.NoError(t, err)
	require.NoError(t, res.partial)
	require.Len(t, res.found, 1000)
	require.Less(t, len(silent.questions()), 10, "it is asked once, and then no more")
	require.True(t, slices.IsSortedFunc(res.found, func(a, b Found) int { return addrPort(a.Address).Compare(addrPort(b.Address)) }))

	s.says(dns.RcodeServerFailure, dns.TypeA)
	_, err = f.find(context.Background(), asking(s.address))
	require.ErrorContains(t, err, "and 997 more")
	require.False(t, strings.Contains(err.Error(), "\n"))
}
