package discovery

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// nameServer is a DNS server over UDP and TCP, on one port. It has all zones, and
// is asked as a resolver is.
type nameServer struct {
	t       testing.TB
	address string
	packets net.PacketConn
	streams net.Listener
	wg      sync.WaitGroup

	mu      sync.Mutex
	records []dns.RR
	deviate deviation
	asked   []string // "A db.internal.", in order
	clients map[net.Conn]struct{}
	closed  bool
}

// deviation gives other messages than the proper answer, which it may change;
// none = silence.
type deviation func(question, answer *dns.Msg, network string) [][]byte

func startNameServer(t testing.TB, records ...string) *nameServer {
	t.Helper()
	s := &nameServer{t: t, clients: make(map[net.Conn]struct{})}
	for s.packets == nil {
		streams, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		packets, err := net.ListenPacket("udp", streams.Addr().String())
		if err != nil { // somebody else's
			_ = streams.Close()
			continue
		}
		s.packets, s.streams, s.address = packets, streams, streams.Addr().String()
	}
	s.set(records...)
	s.wg.Go(s.servePackets)
	s.wg.Go(s.serveStreams)
	t.Cleanup(s.stop)
	return s
}

func (s *nameServer) stop() {
	s.mu.Lock()
	s.closed = true
	for c := range s.clients {
		_ = c.Close()
	}
	s.mu.Unlock()
	_, _ = s.packets.Close(), s.streams.Close()
	s.wg.Wait()
}

// set replaces all records, which are lines of a zone file.
func (s *nameServer) set(records ...string) {
	s.t.Helper()
	var all []dns.RR
	for _, line := range records {
		rr, err := dns.NewRR(line)
		require.NoError(s.t, err)
		all = append(all, rr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records = all
}

func (s *nameServer) deviates(d deviation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deviate = d
}

func (s *nameServer) questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *nameServer) servePackets() {
	buf := make([]byte, 4096)
	for {
		n, from, err := s.packets.ReadFrom(buf)
		if err != nil {
			return
		}
		for _, m := range s.reply(buf[:n], "udp") {
			_, _ = s.packets.WriteTo(m, from)
		}
	}
}

func (s *nameServer) serveStreams() {
	for {
		c, err := s.streams.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.clients[c] = struct{}{}
		if s.closed {
			_ = c.Close()
		}
		s.mu.Unlock()
		s.wg.Go(func() { s.serveStream(c) })
	}
}

// serveStream answers one question. Messages follow each other as they are, so
// that a deviation may send the length or not.
func (s *nameServer) serveStream(c net.Conn) {
	defer c.Close()
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return
	}
	question := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, question); err != nil {
		return
	}
	messages := s.reply(question, "tcp")
	for _, m := range messages {
		if len(m) == 0 { // the mark for keeping it open
			_, _ = c.Read(length[:])
		}
		if _, err := c.Write(m); err != nil {
			return
		}
	}
}

// reply returns what to send in answer to a question.
func (s *nameServer) reply(packed []byte, network string) [][]byte {
	question := new(dns.Msg)
	if question.Unpack(packed) != nil || len(question.Question) != 1 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	q := question.Question[0]
	s.asked = append(s.asked, dns.Type(q.Qtype).String()+" "+q.Name)
	answer := new(dns.Msg).SetReply(question)
	answer.RecursionAvailable = true
	s.fillLocked(answer, q)
	if s.deviate != nil {
		return s.deviate(question, answer, network)
	}
	return [][]byte{wire(s.t, answer, network)}
}

// fillLocked puts in the records of the name, of those that it is an alias of, and
// the addresses of SRV targets.
func (s *nameServer) fillLocked(answer *dns.Msg, q dns.Question) {
	exists, name := false, q.Name
	for range 20 {
		next := ""
		for _, rr := range s.records {
			if !strings.EqualFold(rr.Header().Name, name) {
				continue
			}
			exists = true
			if alias, ok := rr.(*dns.CNAME); ok {
				answer.Answer, next = append(answer.Answer, rr), alias.Target
			} else if rr.Header().Rrtype == q.Qtype {
				answer.Answer = append(answer.Answer, rr)
			}
		}
		if next == "" {
			break
		}
		name = next
	}
	if !exists {
		answer.Rcode = dns.RcodeNameError
	}
}

// wire is a message as it is sent, over UDP cut down to what the other side takes.
func wire(t testing.TB, m *dns.Msg, network string) []byte {
	m.Compress = true
	if network == "udp" {
		m.Truncate(udpSize)
	}
	packed, err := m.Pack()
	require.NoError(t, err)
	if network == "tcp" {
		return append(binary.BigEndian.AppendUint16(nil, uint16(len(packed))), packed...)
	}
	return packed
}

// says answers with a code alone, to questions of a type or to all (0).
func (s *nameServer) says(rcode int, types ...uint16) {
	s.deviates(func(question, answer *dns.Msg, network string) [][]byte {
		if len(types) == 0 || slices.Contains(types, question.Question[0].Qtype) {
			answer.Rcode, answer.Answer = rcode, nil
		}
		return [][]byte{wire(s.t, answer, network)}
	})
}

func silence(_, _ *dns.Msg, _ string) [][]byte { return nil }

// asking is a round that asks these servers, long and often enough for a machine
// that is busy.
func asking(addresses ...string) *round {
	s := ownServers(addresses)
	s.timeout, s.attempts = 10*time.Second, 2
	return newRound(s, slots)
}

// hasty is one for servers that are silent. It asks so often that one that is
// not is heard all the same.
func hasty(addresses ...string) *round {
	s := ownServers(addresses)
	s.timeout, s.attempts = 100*time.Millisecond, 100
	return newRound(s, slots)
}

// once asks each server once.
func once(addresses ...string) *round {
	s := ownServers(addresses)
	s.timeout, s.attempts = 100*time.Millisecond, 1
	return newRound(s, slots)
}

func anAddressFinder() *addressFinder {
	return &addressFinder{name: "db.internal", port: 5432, wanted: families{v4: true, v6: true}}
}

// addressesFound are the addresses that a lookup finds, in full.
func addressesFound(t testing.TB, f finder, r *round) []string {
	t.Helper()
	res, err := f.find(context.Background(), r)
	require.NoError(t, err)
	require.NoError(t, res.partial)
	return addressesOf(res.found)
}

func addressesOf(found []Found) (addresses []string) {
	for _, f := range found {
		addresses = append(addresses, f.Address)
	}
	return addresses
}
