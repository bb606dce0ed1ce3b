package tcplb

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// clientKey is who counts as one client: an IPv4 address, also one that a NAT64 has
// translated, or the first 64 bits of an IPv6 address, all others of which are the
// client's to choose. The zero value is nobody, a client of a Unix socket.
type clientKey struct {
	kind uint64 // 0, 4 or 6
	bits uint64
}

// nat64 has the IPv4 addresses of the world in the last 32 bits (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

func clientKeyOf(client netip.Addr) clientKey {
	client = client.Unmap()
	switch {
	case nat64.Contains(client):
		a := client.As16()
		return clientKey{4, uint64(binary.BigEndian.Uint32(a[12:]))}
	case client.Is4():
		a := client.As4()
		return clientKey{4, uint64(binary.BigEndian.Uint32(a[:]))}
	case client.Is6():
		a := client.As16()
		return clientKey{6, binary.BigEndian.Uint64(a[:8])}
	}
	return clientKey{}
}

// String returns the address, or the prefix of IPv6.
func (k clientKey) String() string {
	switch k.kind {
	case 4:
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(k.bits)))).String()
	case 6:
		var a [16]byte
		binary.BigEndian.PutUint64(a[:], k.bits)
		return netip.PrefixFrom(netip.AddrFrom16(a), 64).String()
	}
	return ""
}

// clients counts a pool's connections by client, those that wait for a backend
// among them, whether there is a limit or not: one that comes with a reload holds
// for what is open by then. Who has no connection has no entry, so that there are
// never more of these than connections.
type clients struct {
	shards  [clientShards]clientShard
	refused atomic.Pointer[clientKey] // the last one over the limit

	pausesMu sync.Mutex
	pausing  int               // in enterSoon
	pauses   map[clientKey]int // by client; those that are 0 have no entry
}

type clientShard struct {
	mu    sync.Mutex
	open  map[clientKey]int64
	grown int // most entries since the map was made
}

const (
	clientShards = 16
	// smallMap is up to where an empty map is kept. Maps never shrink.
	smallMap = 1024
)

var clientSeed = maphash.MakeSeed()

func (c *clients) shard(k clientKey) *clientShard {
	return &c.shards[maphash.Comparable(clientSeed, k)%clientShards]
}

// enter counts a connection of the client's, unless it has as many as the limit;
// 0 = none.
func (c *clients) enter(k clientKey, limit int64) bool {
	if k.kind == 0 {
		return true
	}
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.open[k]
	if limit > 0 && n >= limit {
		return false
	}
	if s.open == nil {
		s.open = make(map[clientKey]int64)
	}
	s.open[k] = n + 1
	s.grown = max(s.grown, len(s.open))
	return true
}

// leave takes back an enter.
func (c *clients) leave(k clientKey) {
	if k.kind == 0 {
		return
	}
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.open[k]; n > 1 {
		s.open[k] = n - 1
		return
	}
	delete(s.open, k)
	if len(s.open) == 0 && s.grown > smallMap {
		s.open, s.grown = nil, 0
	}
}

// clientPauses are how long a client over its limit waits from look to look. One
// that ends a connection and begins another may be seen to do the latter first.
var clientPauses = []time.Duration{time.Millisecond, 4 * time.Millisecond, 15 * time.Millisecond, 60 * time.Millisecond}

// A flood is refused without: so many connections of a pool do so at once, and of
// one client so many, which leaves places for others.
const (
	mostPausing      = 64
	mostPausingOfOne = 4
)

// enterSoon is enter, for a client that may have ended another connection just now.
func (c *clients) enterSoon(k clientKey, limit int64) bool {
	if c.enter(k, limit) {
		return true
	}
	if !c.pause(k) {
		return false
	}
	defer c.resume(k)
	for _, d := range clientPauses {
		time.Sleep(d)
		if c.enter(k, limit) {
			return true
		}
	}
	return false
}

// pause has one more of the client's connections wait, unless too many do.
func (c *clients) pause(k clientKey) bool {
	c.pausesMu.Lock()
	defer c.pausesMu.Unlock()
	if c.pausing == mostPausing || c.pauses[k] == mostPausingOfOne {
		return false
	}
	if c.pauses == nil {
		c.pauses = make(map[clientKey]int)
	}
	c.pausing++
	c.pauses[k]++
	return true
}

func (c *clients) resume(k clientKey) {
	c.pausesMu.Lock()
	defer c.pausesMu.Unlock()
	c.pausing--
	if c.pauses[k]--; c.pauses[k] == 0 {
		delete(c.pauses, k)
	}
}
