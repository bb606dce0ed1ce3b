package tcplb

import (
	"math"
	"net"
	"net/netip"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A connection at rest has a session and a relay, of which there may be tens of
// thousands: nothing of how it was accepted and connected is kept beside them.
func TestIdleConnectionsTakeLittleMemory(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	const some, most = 1000, 700 // bytes each
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer backend.Close() // it accepts nobody: that would take memory, too
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, backendsJSON(backend.Addr().String())+"}"))
	to := netip.MustParseAddrPort(lb)
	clients := make([]int, 0, 4*some)
	t.Cleanup(func() {
		for _, fd := range clients {
			_ = unix.Close(fd)
		}
	})
	connect := func(n int) {
		t.Helper()
		before := open.n.Load()
		for range n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			clients = append(clients, fd)
			require.NoError(t, unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}))
		}
		eventually(t, func() bool { return open.n.Load() == before+int64(n) && goroutinesOf("layer4.(*Server).handle(") == 0 }, "all are relayed")
	}
	inUse := func() uint64 {
		runtime.GC()
		runtime.GC() // what pools kept of the first
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	connect(some) // and what Go keeps of goroutines that have ended
	least := int64(math.MaxInt64)
	for range 3 { // there may be more goroutines at once than before
		before := inUse()
		connect(some)
		least = min(least, int64(inUse()-before)/some)
	}
	require.Less(t, least, int64(most), "bytes for each of them")
}
