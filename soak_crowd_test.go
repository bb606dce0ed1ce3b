package tcplb

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The clients of the crowd have addresses of their own, and a pool of their own, which
// limits what each has.
const (
	crowdPool    = "crowd"
	crowdClients = 3
	crowdLimit   = 2
)

var crowdOptions = fmt.Sprintf(`"max_connections_per_client":%d,`, crowdLimit)

// crowdCounts is what became of them.
type crowdCounts struct {
	dialed, served atomic.Int64
}

// join makes one connection of the crowd, which is served or turned away.
func (s *soak) join(rnd *rand.Rand) {
	from := net.IPv4(127, 0, 1, byte(1+rnd.IntN(crowdClients)))
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}, Timeout: hangTimeout}
	conn, err := d.Dial("tcp", s.crowd)
	s.crowded.dialed.Add(1)
	if err != nil {
		return // turned away, before it came to know that it was connected
	}
	defer conn.Close()
	arrive(conn)
	_ = conn.SetDeadline(time.Now().Add(hangTimeout))
	if _, err := conn.Write([]byte{soakAbort}); err != nil {
		return
	}
	if n, _ := conn.Read(make([]byte, 1)); n == 0 {
		return
	}
	s.crowded.served.Add(1)
	pause(time.Duration(rnd.IntN(20))*time.Millisecond, s.stop)
}

// requireCrowd compares the lines of the crowd.
func (s *soak) requireCrowd(lines []soakLine, view poolView) {
	t := s.t
	turnedAway := 0
	for _, l := range lines {
		if l.Reason == reasonMaxConnectionsPerClient.String() {
			turnedAway++
			require.Empty(t, l.Backend)
			require.Zero(t, l.Attempts)
		}
	}
	requireSum(t, lines, view.total())
	requireReasons(t, crowdPool, lines)
	require.Zero(t, view.clients.entries())
	t.Logf("of the crowd's %d connections %d were served and %d turned away", s.crowded.dialed.Load(), s.crowded.served.Load(), turnedAway)
}

// requireConnectedLines wants one such line for each connection that had a backend,
// and of the same.
func requireConnectedLines(t testing.TB, connected, ended []soakLine) {
	t.Helper()
	type key struct{ lb, client, backend string }
	balance := make(map[key]int)
	for _, l := range ended {
		if l.Backend != "" {
			balance[key{l.LB, l.Client, l.Backend}]++
		}
	}
	for _, l := range connected {
		balance[key{l.LB, l.Client, l.Backend}]--
	}
	for k, n := range balance {
		require.Zero(t, n, "%+v", k)
	}
}
