package discovery

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// changed is a proper answer after a change.
func changed(t testing.TB, answer *dns.Msg, network string, change func(*dns.Msg)) []byte {
	other := answer.Copy()
	change(other)
	return wire(t, other, network)
}

// lies are all that is not the answer to the question.
func lies(t testing.TB, answer *dns.Msg, network string) [][]byte {
	evil, err := dns.NewRR(answer.Question[0].Name + " 60 A 10.6.6.6")
	require.NoError(t, err)
	change := func(change func(*dns.Msg)) []byte {
		return changed(t, answer, network, func(m *dns.Msg) { m.Answer = []dns.RR{evil}; change(m) })
	}
	garbage := []byte("no DNS message at all")
	if network == "tcp" {
		garbage = append(binary.BigEndian.AppendUint16(nil, uint16(len(garbage))), garbage...)
	}
	return [][]byte{
		change(func(m *dns.Msg) { m.Id++ }),
		change(func(m *dns.Msg) { m.Response = false }),
		change(func(m *dns.Msg) { m.Question[0].Name = "other." }),
		change(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeTXT }),
		change(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }),
		change(func(m *dns.Msg) { m.Question = nil }),
		change(func(m *dns.Msg) { m.Opcode = dns.OpcodeStatus }),
		garbage,
	}
}

func TestLiesAreNoAnswer(t *testing.T) {
	s := startNameServer(t, "db.internal. 60 A 10.0.0.1")
	s.deviates(func(_, answer *dns.Msg, network string) [][]byte {
		return append(lies(t, answer, network), wire(t, answer, network))
	})
	require.Equal(t, []string{"10.0.0.1:5432"}, addressesFound(t, anAddressFinder(), asking(s.address)), "others' packets end nothing")

	for i := range 8 {
		s.deviates(func(_, answer *dns.Msg, network string) [][]byte {
			return lies(t, answer, network)[i : i+1]
		})
		_, err := anAddressFinder().find(context.Background(), once(s.address))
		require.ErrorContains(t, err, "no answer within 100ms")

		s.deviates(func(_, answer *dns.Msg, network string) [][]byte {
			if network == "udp" {
				return [][]byte{changed(t, answer, network, func(m *dns.Msg) { m.Truncated = true })}
			}
			return lies(t, answer, network)[i : i+1]
		})
		_, err = anAddressFinder().find(context.Background(), asking(s.address))
		require.ErrorContains(t, err, "over TCP, as the answer is too long for UDP: ")
	}
}

func TestTheErrorSaysWhatCame(t *testing.T) {
	s := startNameServer(t)
	s.deviates(func(_, answer *dns.Msg, network string) [][]byte { return lies(t, answer, network)[:1] })
	require.Eventually(t, func() bool { // that it comes in time
		_, err := anAddressFinder().find(context.Background(), once(s.address))
		return strings.Contains(err.Error(), "no answer within 100ms, what came is the answer to another question")
	}, time.Minute, time.Millisecond)
}

// TestStreamsThatLeadNowhere has servers that truncate, and do no better over TCP.
func TestStreamsThatLeadNowhere(t *testing.T) {
	s := startNameServer(t, "db.internal. 60 A 10.0.0.1")
	over := func(tcp func(answer *dns.Msg) [][]byte) {
		s.deviates(func(_, answer *dns.Msg, network string) [][]byte {
			if network == "udp" {
				return [][]byte{changed(t, answer, network, func(m *dns.Msg) { m.Truncated, m.Answer = true, nil })}
			}
			return tcp(answer)
		})
	}
	for _, c := range []struct {
		name, message string
		tcp           func(answer *dns.Msg) [][]byte
	}{
		{"nothing", "EOF", func(*dns.Msg) [][]byte { return nil }},
		{"half of it", "unexpected EOF", func(answer *dns.Msg) [][]byte { return [][]byte{wire(t, answer, "tcp")[:20]} }},
		{"truncated again", "truncated, also over TCP", func(answer *dns.Msg) [][]byte {
			return [][]byte{changed(t, answer, "tcp", func(m *dns.Msg) { m.Truncated = true })}
		}},
		{"half, and then silence", "no answer within", func(answer *dns.Msg) [][]byte { return [][]byte{wire(t, answer, "tcp")[:20], nil} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			over(c.tcp)
			r := asking(s.address)
			if strings.Contains(c.message, "within") {
				r = once(s.address)
				r.timeout = time.Second // enough for UDP
			}
			_, err := anAddressFinder().find(context.Background(), r)
			require.ErrorContains(t, err, c.message)
		})
	}
}

// TestTricklesGainNothing has a byte come now and then, each well in time.
func TestTricklesGainNothing(t *testing.T) {
	streams, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c, err := streams.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if _, err := c.Write([]byte{1}); err != nil {
				return
			}
		}
	}()
	_, err = transfer(context.Background(), "tcp", streams.Addr().String(), new(dns.Msg).SetQuestion("db.internal.", dns.TypeA), 300*time.Millisecond)
	require.ErrorContains(t, err, "no answer within 300ms")
	<-ended
	require.NoError(t, streams.Close())
}

func TestServersAreAskedInTurn(t *testing.T) {
	first := startNameServer(t)
	second := startNameServer(t, "db.internal. 60 A 10.0.0.2")
	closed := startNameServer(t)
	closed.stop()
	f := anAddressFinder()

	for name, rcode := range map[string]int{"fails": dns.RcodeServerFailure, "refuses": dns.RcodeRefused} {
		t.Run("the first "+name, func(t *testing.T) {
			first.says(rcode)
			require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, asking(first.address, second.address)))
		})
	}
	t.Run("the first is not there", func(t *testing.T) {
		require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, asking(closed.address, second.address)))
	})
	t.Run("the first is silent", func(t *testing.T) {
		first.deviates(silence)
		require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, hasty(first.address, second.address)))
	})
	t.Run("the first is not the name's, and asks no others", func(t *testing.T) {
		first.deviates(func(_, answer *dns.Msg, network string) [][]byte {
			answer.Rcode, answer.RecursionAvailable = dns.RcodeSuccess, false
			return [][]byte{wire(t, answer, network)}
		})
		require.Equal(t, []string{"10.0.0.2:5432"}, addressesFound(t, f, asking(first.address, second.address)))
	})
	t.Run("that there is no such name is an answer", func(t *testing.T) {
		first.deviates(nil)
		asked := len(second.questions())
		_, err := f.find(context.Background(), asking(first.address, second.address))
		require.ErrorIs(t, err, errNone)
		require.Len(t, second.questions(), asked)
	})
	t.Run("all fail", func(t *testing.T) {
		first.says(dns.RcodeServerFailure)
		_, err := f.find(context.Background(), asking(first.address, closed.address))
		require.ErrorContains(t, err, "A db.internal.: "+first.address+": the server says SERVFAIL; "+closed.address+": ")
		require.NotErrorIs(t, err, errNone)
	})
}

// TestASilentServerIsAskedLast for the rest of a lookup, so that a thousand
// questions don't each wait for it.
func TestASilentServerIsAskedLast(t *testing.T) {
	r := asking("10.0.0.1", "10.0.0.2", "10.0.0.3")
	r.silent["10.0.0.1:53"] = true
	require.Equal(t, []string{"10.0.0.2:53", "10.0.0.3:53", "10.0.0.1:53"}, r.order())

	silent, other := startNameServer(t), startNameServer(t, "db.internal. 60 A 10.0.0.2")
	silent.deviates(silence)
	r = hasty(silent.address, other.address)
	addressesFound(t, anAddressFinder(), r)
	require.True(t, r.silent[silent.address])
}

// TestServersWithoutEDNS are those that say so, and those that say nothing.
func TestServersWithoutEDNS(t *testing.T) {
	s := startNameServer(t, "db.internal. 60 A 10.0.0.1")
	for _, rcode := range []int{dns.RcodeFormatError, dns.RcodeNotImplemented} {
		s.deviates(func(question, answer *dns.Msg, network string) [][]byte {
			if question.IsEdns0() != nil {
				answer.Rcode, answer.Answer, answer.Question = rcode, nil, nil
			}
			return [][]byte{wire(t, answer, network)}
		})
		require.Equal(t, []string{"10.0.0.1:5432"}, addressesFound(t, anAddressFinder(), asking(s.address)))
	}
	s.deviates(func(question, answer *dns.Msg, network string) [][]byte {
		if question.IsEdns0() != nil {
			return nil
		}
		return [][]byte{wire(t, answer, network)}
	})
	require.Equal(t, []string{"10.0.0.1:5432"}, addressesFound(t, anAddressFinder(), hasty(s.address)))
}

// FuzzAnswer takes any message for the answer.
func FuzzAnswer(f *testing.F) {
	question := new(dns.Msg).SetQuestion("_db._tcp.internal.", dns.TypeSRV)
	for _, record := range []string{"_db._tcp.internal. 60 SRV 1 2 3 a.internal.", "_db._tcp.internal. 60 CNAME a.internal.", "_db._tcp.internal. 60 CNAME _db._tcp.internal."} {
		rr, err := dns.NewRR(record)
		require.NoError(f, err)
		answer := new(dns.Msg).SetReply(question)
		answer.Answer = []dns.RR{rr}
		packed, err := answer.Pack()
		require.NoError(f, err)
		f.Add(packed[2:])
	}
	f.Fuzz(func(t *testing.T, rest []byte) {
		packed := append(binary.BigEndian.AppendUint16(nil, question.Id), rest...)
		answer, err := parseAnswer(question, packed)
		if err != nil {
			return
		}
		for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV} {
			found, last, ttl, err := follow(answer, "_db._tcp.internal.", kind)
			if err != nil {
				continue
			}
			require.NotEmpty(t, last)
			require.GreaterOrEqual(t, ttl, time.Duration(0))
			for _, addr := range usable(found) {
				require.True(t, connectable(addr))
			}
		}
		both := (&serviceFinder{wanted: families{v4: true, v6: true}}).related(answer.Extra)
		for _, h := range both {
			require.GreaterOrEqual(t, min(h.v4.ttl, h.v6.ttl), time.Duration(0))
		}
	})
}

// TestTheEndOfASourceEndsItsLookup wherever that waits.
func TestTheEndOfASourceEndsItsLookup(t *testing.T) {
	s := startNameServer(t, "db.internal. 60 A 10.0.0.1")
	find := func(t *testing.T, r *round, waits func() bool) {
		t.Helper()
		r.timeout = time.Hour
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			_, err := anAddressFinder().find(ctx, r)
			ended <- err
		}()
		require.Eventually(t, waits, time.Minute, time.Millisecond)
		cancel()
		select {
		case err := <-ended:
			require.ErrorContains(t, err, "context canceled")
		case <-time.After(time.Minute):
			t.Fatal("it goes on")
		}
	}
	t.Run("for a packet", func(t *testing.T) {
		s.deviates(silence)
		find(t, asking(s.address), func() bool { return len(s.questions()) >= 2 })
	})
	t.Run("for the rest of a stream", func(t *testing.T) {
		asked := len(s.questions())
		s.deviates(func(_, answer *dns.Msg, network string) [][]byte {
			if network == "tcp" {
				return [][]byte{wire(t, answer, network)[:20], nil}
			}
			return [][]byte{changed(t, answer, network, func(m *dns.Msg) { m.Truncated = true })}
		})
		find(t, asking(s.address), func() bool { return len(s.questions()) >= asked+4 })
	})
	t.Run("for its turn", func(t *testing.T) {
		r := asking(s.address)
		r.slots = make(semaphore, 1)
		r.slots <- struct{}{}
		asked := len(s.questions())
		find(t, r, func() bool { return true })
		require.Len(t, s.questions(), asked)
	})
}
