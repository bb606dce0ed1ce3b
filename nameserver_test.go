package tcplb

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

// nameServer is a DNS server over UDP and TCP. It says that a name that it was
// not told of does not exist.
type nameServer struct {
	packets net.PacketConn
	streams net.Listener
	wg      sync.WaitGroup

	mu      sync.Mutex
	known   map[string][]netip.Addr
	faults  map[dnsmessage.Type]fault
	asked   int                   // questions that came
	clients map[net.Conn]struct{} // connections of the resolver
	gone    bool
}

// fault is what is wrong with the server's answers.
type fault int

const (
	faultNone      fault = iota
	faultSilent          // it answers nothing
	faultFails           // SERVFAIL
	faultRefuses         // REFUSED
	faultTruncates       // over UDP, so that it is asked over TCP
	faultGarbage         // no DNS message
	faultEmpty           // of another family only: no data
)

// testNameServer is asked in place of the system's if it is set.
var testNameServer atomic.Pointer[nameServer]

func init() {
	resolver.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		if s := testNameServer.Load(); s != nil {
			return s.dial(ctx, network)
		}
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}
}

// startNameServer has all names resolved by a server of the test's.
func startNameServer(t testing.TB) *nameServer {
	t.Helper()
	s := &nameServer{
		known: make(map[string][]netip.Addr), faults: make(map[dnsmessage.Type]fault), clients: make(map[net.Conn]struct{}),
	}
	var err error
	s.packets, err = net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	s.streams, err = net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.wg.Go(s.servePackets)
	s.wg.Go(s.serveStreams)
	require.True(t, testNameServer.CompareAndSwap(nil, s), "one name server at a time")
	t.Cleanup(func() { s.stop(t) })
	return s
}

// stop ends the server and the lookups that wait for it.
func (s *nameServer) stop(t testing.TB) {
	s.mu.Lock()
	s.gone = true
	for c := range s.clients {
		_ = c.Close()
	}
	s.mu.Unlock()
	_, _ = s.packets.Close(), s.streams.Close()
	s.wg.Wait()
	eventually(t, func() bool { return lookupsUnderWay() == 0 }, "no lookup is under way")
	testNameServer.Store(nil)
}

func lookupsUnderWay() (count int) {
	names.mu.Lock()
	defer names.mu.Unlock()
	for _, p := range names.byHost {
		if n := p.Value(); n != nil {
			n.mu.Lock()
			if n.flight != nil {
				count++
			}
			n.mu.Unlock()
		}
	}
	return count
}

// answer sets the addresses of a name; none = it does not exist.
func (s *nameServer) answer(name string, addresses ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, name+".")
	for _, a := range addresses {
		s.known[name+"."] = append(s.known[name+"."], netip.MustParseAddr(a))
	}
}

// fail sets what is wrong with all answers, or with those of one type.
func (s *nameServer) fail(f fault, types ...dnsmessage.Type) {
	if len(types) == 0 {
		types = []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range types {
		s.faults[t] = f
	}
}

func (s *nameServer) questions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func (s *nameServer) dial(ctx context.Context, network string) (net.Conn, error) {
	address := s.packets.LocalAddr()
	if network == "tcp" {
		address = s.streams.Addr()
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, address.String())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		_ = c.Close()
		return nil, errors.New("the test's name server is gone")
	}
	s.clients[c] = struct{}{}
	return c, nil
}

func (s *nameServer) servePackets() {
	buf := make([]byte, 1500)
	for {
		n, from, err := s.packets.ReadFrom(buf)
		if err != nil {
			return
		}
		if answer := s.reply(buf[:n], true); answer != nil {
			_, _ = s.packets.WriteTo(answer, from)
		}
	}
}

func (s *nameServer) serveStreams() {
	for {
		c, err := s.streams.Accept()
		if err != nil {
			return
		}
		s.serveStream(c)
	}
}

// serveStream answers one question.
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
	if answer := s.reply(question, false); answer != nil {
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
	}
}

// reply returns the answer to a question; nil = none.
func (s *nameServer) reply(question []byte, packet bool) []byte {
	var m dnsmessage.Message
	if m.Unpack(question) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	addresses, exists := s.known[q.Name.String()]
	if !exists {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addresses {
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			m.Answers = append(m.Answers, resource(q, &dnsmessage.AResource{A: a.As4()}))
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			m.Answers = append(m.Answers, resource(q, &dnsmessage.AAAAResource{AAAA: a.As16()}))
		}
	}
	switch s.faults[q.Type] {
	case faultSilent:
		return nil
	case faultFails:
		m.RCode, m.Answers = dnsmessage.RCodeServerFailure, nil
	case faultRefuses:
		m.RCode, m.Answers = dnsmessage.RCodeRefused, nil
	case faultTruncates:
		if packet {
			m.Truncated, m.Answers = true, nil
		}
	case faultEmpty:
		m.RCode, m.Answers = dnsmessage.RCodeSuccess, nil
	case faultGarbage:
		return append(question[:12:12], 0xff)
	}
	answer, err := m.Pack()
	if err != nil {
		return nil
	}
	return answer
}

func resource(q dnsmessage.Question, body dnsmessage.ResourceBody) dnsmessage.Resource {
	return dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class}, Body: body}
}
