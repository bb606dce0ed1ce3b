package discovery

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

func TestEveryAddressIsABackend(t *testing.T) {
	s := startNameServer(t,
		"db.internal. 60 A 10.0.0.2", "db.internal. 20 A 10.0.0.1", "DB.internal. 60 AAAA fd00::1",
		"db.internal. 60 AAAA ::ffff:10.0.0.2", "db.internal. 60 TXT other", "other.internal. 60 A 10.0.0.9")
	f := anAddressFinder()
	res, err := f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, result{ttl: 20 * time.Second, found: []Found{
		{Address: "10.0.0.1:5432"}, {Address: "10.0.0.2:5432"}, {Address: "[fd00::1]:5432"},
	}}, res, "sorted, each once")

	f.wanted = families{v6: true}
	s.set("db.internal. 60 A 10.0.0.2", "db.internal. 60 AAAA fd00::2")
	require.Equal(t, []string{"[fd00::2]:5432"}, addressesFound(t, f, asking(s.address)))
	require.NotContains(t, s.questions()[2:], "A db.internal.")
}

func TestAddressesThatLeadNowhereAreLeftOut(t *testing.T) {
	s := startNameServer(t, "db.internal. 60 A 0.0.0.0", "db.internal. 60 A 224.0.0.1", "db.internal. 60 A 255.255.255.255",
		"db.internal. 60 A 169.254.1.1", "db.internal. 60 AAAA ::", "db.internal. 60 AAAA fe80::1")
	require.Equal(t, []string{"169.254.1.1:5432"}, addressesFound(t, anAddressFinder(), asking(s.address)))
	s.set("db.internal. 60 A 0.0.0.0")
	_, err := anAddressFinder().find(context.Background(), asking(s.address))
	require.ErrorIs(t, err, errNone)
}

// TestWhatFailsKeepsWhatItHad has one family's half of the answer fail.
func TestWhatFailsKeepsWhatItHad(t *testing.T) {
	both := []string{"db.internal. 60 A 10.0.0.1", "db.internal. 60 AAAA fd00::1"}
	s := startNameServer(t, both...)
	f := anAddressFinder()
	require.Len(t, addressesFound(t, f, asking(s.address)), 2)

	s.set("db.internal. 60 A 10.0.0.2")
	s.says(dns.RcodeServerFailure, dns.TypeAAAA)
	res, err := f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.2:5432", "[fd00::1]:5432"}, addressesOf(res.found))
	require.ErrorContains(t, res.partial, "AAAA db.internal.: "+s.address+": the server says SERVFAIL")

	s.set("db.internal. 60 A 10.0.0.3")
	s.deviates(nil)
	require.Equal(t, []string{"10.0.0.3:5432"}, addressesFound(t, f, asking(s.address)), "there are none of IPv6 any more")

	s.set(both...)
	require.Len(t, addressesFound(t, f, asking(s.address)), 2)
	s.set("db.internal. 60 TXT none")
	s.says(dns.RcodeServerFailure, dns.TypeA)
	_, err = f.find(context.Background(), asking(s.address))
	require.ErrorContains(t, err, "SERVFAIL", "no address at all is no answer")
	s.set(both[1])
	res, err = f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.1:5432", "[fd00::1]:5432"}, addressesOf(res.found), "and forgets nothing")
}

func TestAThousandAddresses(t *testing.T) {
	var records []string
	for i := range 1000 {
		records = append(records, fmt.Sprintf("db.internal. 60 A 10.0.%d.%d", i/250, i%250), fmt.Sprintf("db.internal. 60 AAAA fd00::%x", i))
	}
	s := startNameServer(t, records...)
	require.Len(t, addressesFound(t, anAddressFinder(), asking(s.address)), 2000)
	require.Len(t, s.questions(), 4, "each over UDP, then TCP")

	all := make(backends)
	for i := range maxFound + 1 {
		all.add(addrPort(fmt.Sprintf("10.%d.%d.1:80", i/256, i%256)), tier{})
	}
	_, err := all.sorted()
	require.ErrorContains(t, err, "10001 backends, more than 10000 can't be meant")
}

func TestAliases(t *testing.T) {
	chain := []string{"db.internal. 60 CNAME a.internal.", "a.internal. 5 CNAME B.internal."}
	s := startNameServer(t, append(chain, "b.internal. 60 A 10.0.0.1", "b.internal. 60 AAAA fd00::1")...)
	f := anAddressFinder()
	res, err := f.find(context.Background(), asking(s.address))
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.1:5432", "[fd00::1]:5432"}, addressesOf(res.found))
	require.Equal(t, 5*time.Second, res.ttl)

	t.Run("that lead nowhere", func(t *testing.T) {
		s.set(chain...)
		_, err := f.find(context.Background(), asking(s.address))
		require.ErrorIs(t, err, errNone)
	})
	t.Run("without end", func(t *testing.T) {
		s.set(append(chain, "b.internal. 60 CNAME db.internal.")...)
		_, err := f.find(context.Background(), asking(s.address))
		require.ErrorContains(t, err, "aliases without end")
		require.NotErrorIs(t, err, errNone)
	})
	t.Run("of which a server tells one at a time", func(t *testing.T) {
		s.set(append(chain, "b.internal. 60 A 10.0.0.2")...)
		s.deviates(func(_, answer *dns.Msg, network string) [][]byte {
			answer.RecursionAvailable, answer.Authoritative = false, true
			answer.Answer = answer.Answer[:min(1, len(answer.Answer))]
			return [][]byte{wire(t, answer, network)}
		})
		require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, asking(s.address)))
		s.set(append(chain, "b.internal. 60 CNAME db.internal.")...)
		_, err := f.find(context.Background(), asking(s.address))
		require.ErrorContains(t, err, "aliases without end")
	})
}

// TestSearch goes through the names that a name may stand for.
func TestSearch(t *testing.T) {
	s := startNameServer(t, "db.two. 60 A 10.0.0.2")
	r := asking(s.address)
	r.names = func(name string) []string { return []string{name + ".one.", name + ".two.", name + "."} }
	f := anAddressFinder()
	f.name = "db"
	require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, r))
	require.Equal(t, "db.two.", f.known.name)

	failing := func(question, answer *dns.Msg, network string) [][]byte {
		if question.Question[0].Name == "db.one." {
			answer.Rcode, answer.Answer = dns.RcodeServerFailure, nil
		}
		return [][]byte{wire(t, answer, network)}
	}
	s.deviates(failing)
	require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, r), "it was this one before")

	s.set("db.one. 60 A 10.0.0.1", "db.two. 60 A 10.0.0.2")
	s.deviates(nil)
	require.Equal(t, []string{"10.0.0.1:5432"}, addressesFound(t, f, r))
	s.deviates(failing)
	_, err := f.find(context.Background(), r)
	require.ErrorContains(t, err, "db.one.", "while the first fails, another one's addresses don't take its place")

	s.set("db.two. 60 AAAA fd00::2")
	s.deviates(nil)
	require.Equal(t, []string{"[fd00::2]:5432"}, addressesFound(t, f, r), "and take it once it is gone")
	s.set("db.one. 60 A 10.0.0.1")
	s.says(dns.RcodeServerFailure, dns.TypeAAAA)
	res, err := f.find(context.Background(), r)
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.1:5432"}, addressesOf(res.found), "another name's half is not kept")
}
