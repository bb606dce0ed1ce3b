package tcplb

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// soakBackend is a backend, and what has happened to it.
type soakBackend struct {
	*server
	findings *findings
	id       byte
	limit    int          // its max_connections; 0 = none
	inDNS    bool         // which has it instead of the config
	secure   *tls.Config  // it speaks TLS; nil = it does not
	stall    sync.RWMutex // held for writing while it accepts and does not serve

	// For the driver only: what it has done last.
	dead   bool
	absent bool // from the config, or surely not found in DNS
	weight int
	backup bool
	hand   hand
	// withdrawn: not in the answers of DNS; awaited until the balancer knows of that,
	// or of the opposite.
	withdrawn, awaited bool

	broken trouble // that its connections are in
	closed phase   // no new connection may go to it
	spare  phase   // it is a backup

	mu     sync.Mutex
	guests map[*net.TCPConn]troubleMark // see receive; when they came
	most   int                          // of them at once
}

// phase is a time in which something holds for sure, one after the other. One
// goroutine sets it.
type phase struct{ n atomic.Uint64 } // odd within one

func (p *phase) set(holds bool) {
	if p.n.Load()%2 == 1 != holds {
		p.n.Add(1)
	}
}

// heldSince reports whether it has held all the time since it was n.
func (p *phase) heldSince(n uint64) bool { return n%2 == 1 && p.n.Load() == n }

// trouble is what breaks connections, from begin to end.
type trouble struct {
	ongoing atomic.Int32
	began   atomic.Uint64
}

func (t *trouble) begin() { t.ongoing.Add(1); t.began.Add(1) }

func (t *trouble) end() { t.ongoing.Add(-1) }

// troubleMark is a moment of it.
type troubleMark struct {
	ongoing bool
	began   uint64
}

func (t *trouble) mark() (m troubleMark) {
	m.began = t.began.Load() // first: what begins now is later than that, or ongoing
	m.ongoing = t.ongoing.Load() > 0
	return m
}

// since reports whether there was any since then.
func (t *trouble) since(m troubleMark) bool { return m.ongoing || t.began.Load() != m.began }

// during says that connections to the backends may break meanwhile, or soon after
// if they are there by then.
func during(backends []*soakBackend, disturb func()) {
	for _, b := range backends {
		b.broken.begin()
	}
	disturb()
	for _, b := range backends {
		b.broken.end()
	}
}

// isClosed reports whether what the driver has done keeps new connections away.
func (b *soakBackend) isClosed() bool {
	return b.absent || b.hand.state != stateReady || b.hand.weightOr(b.weight) == 0
}

func (s *soak) addBackend(ln net.Listener, limit int, secure *tls.Config) *soakBackend {
	b := &soakBackend{id: byte(len(s.backends)), limit: limit, secure: secure, weight: defaultWeight, findings: &s.findings, guests: make(map[*net.TCPConn]troubleMark)}
	b.server = startServerOn(s.t, ln, b.serve)
	s.backends = append(s.backends, b)
	return b
}

func (b *soakBackend) serve(socket *net.TCPConn) {
	kind, c := b.greet(socket)
	if c == nil {
		return
	}
	switch kind {
	case soakShort, soakStream, soakRequest, soakDownload, soakReset:
		b.receive(socket)
		defer b.bid(socket)
	}
	if secure, ok := c.(*tls.Conn); ok && kind != soakReset {
		defer func() { _ = secure.CloseWrite() }()
	}
	b.stall.RLock()
	_, _ = c.Write([]byte{b.id})
	b.stall.RUnlock()
	switch kind {
	case soakShort:
		_, _ = io.WriteString(c, "ok")
	case soakStream, soakAbort:
		echo(c)
	case soakUpload:
		pause(b.naps(), nil)
		fallthrough
	case soakRequest:
		var h hashing
		if _, err := io.Copy(&h, c); err == nil {
			_ = binary.Write(c, binary.BigEndian, h.sum)
		}
	case soakDownload, soakBulk:
		var size uint32
		if binary.Read(c, binary.BigEndian, &size) == nil {
			_, _ = io.CopyN(c, &pattern{seed: b.id}, int64(size))
		}
	case soakReset:
		_, _ = io.WriteString(c, "bye")
		_ = socket.SetLinger(0)
	}
}

// naps is for how long a backend leaves an upload unread.
func (b *soakBackend) naps() time.Duration { return rand.N(2 * stallTimeout) }

// receive counts a connection that only the backend ends, so that the balancer
// has it, too, unless there was trouble. Of these there are never more than the
// limit.
func (b *soakBackend) receive(c *net.TCPConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.guests[c] = b.broken.mark()
	open := 0
	for _, m := range b.guests {
		if !b.broken.since(m) {
			open++
		}
	}
	b.most = max(b.most, open)
	if b.limit > 0 && open > b.limit {
		b.findings.add("backend %d has %d connections, its limit is %d", b.id, open, b.limit)
	}
}

// bid says goodbye, before the connection is closed.
func (b *soakBackend) bid(c *net.TCPConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.guests, c)
}

// soakLook is how things were at a moment.
type soakLook struct {
	backends []backendLook
	// firstIsUp: the health of the one that always lives, and how often it was down.
	firstIsUp bool
	downs     uint64
}

type backendLook struct {
	broken        troubleMark
	closed, spare uint64
}

func (s *soak) look() (l soakLook) {
	for _, b := range s.backends {
		l.backends = append(l.backends, backendLook{b.broken.mark(), b.closed.n.Load(), b.spare.n.Load()})
	}
	// A picker is made a moment after a backend has turned up, and before that the
	// backups may be asked.
	justUp := time.Since(time.Unix(0, s.first.stats.turnedAt.Load())) < time.Second
	l.downs, l.firstIsUp = s.first.stats.turnedDown.Load(), s.first.healthy.Load() && !justUp
	return l
}

// disturbedSince reports whether something happened to the backend since, or to any
// if it is not known.
func (s *soak) disturbedSince(before soakLook, backend int) bool {
	for i, b := range s.backends {
		if (backend < 0 || i == backend) && b.broken.since(before.backends[i].broken) {
			return true
		}
	}
	return false
}

// isOutOfTurn reports whether a backup has got a connection though an ordinary
// backend was available all the time. That may only be one whose connects failed.
func (s *soak) isOutOfTurn(before soakLook, backend int) bool {
	return s.backends[backend].spare.heldSince(before.backends[backend].spare) &&
		before.firstIsUp && s.first.healthy.Load() && s.first.stats.turnedDown.Load() == before.downs
}
