package socket

import (
	"net"
	"strconv"
	"sync"
	"time"
)

// zones knows the names of interfaces, which are zones of IPv6 addresses, for a
// while: the kernel is asked for all of them at once, which takes time.
var zones zoneCache

const zonesLast = time.Minute

type zoneCache struct {
	mu     sync.Mutex
	asked  time.Time
	byName map[string]uint32
	byID   map[uint32]string
}

// name returns the interface's name, or its number if it has none; "" for 0.
func (z *zoneCache) name(id uint32) string {
	if id == 0 {
		return ""
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	known := func() bool { _, ok := z.byID[id]; return ok }
	if z.refreshLocked(known); known() {
		return z.byID[id]
	}
	return strconv.FormatUint(uint64(id), 10)
}

// id is the reverse of name; 0 for what is no interface's name or number.
func (z *zoneCache) id(name string) uint32 {
	if name == "" {
		return 0
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	known := func() bool { _, ok := z.byName[name]; return ok }
	if z.refreshLocked(known); known() {
		return z.byName[name]
	}
	id, _ := strconv.ParseUint(name, 10, 32)
	return uint32(id)
}

// refreshLocked asks the kernel again if that was long ago, or not quite so long
// and what is sought was not there.
func (z *zoneCache) refreshLocked(known func() bool) {
	now := time.Now()
	if age := now.Sub(z.asked); age < time.Second || age < zonesLast && known() {
		return
	}
	z.asked = now
	list, err := net.Interfaces()
	if err != nil {
		return // what was known may still hold
	}
	z.byName, z.byID = make(map[string]uint32, len(list)), make(map[uint32]string, len(list))
	for _, i := range list {
		z.byName[i.Name] = uint32(i.Index)
		z.byID[uint32(i.Index)] = i.Name
	}
}
