package relay

import (
	"bytes"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// undelivered makes a relay whose backend was reset while the client had yet to
// acknowledge some of what the backend had sent.
func undelivered(t testing.TB) (r *relayed, sent []byte) {
	t.Helper()
	r = startRelay(t, 0, nil)
	sent = make([]byte, 300<<10) // more than a client holds that does not read
	fill(sent)
	_, err := r.backend.Write(sent)
	require.NoError(t, err)
	eventually(t, func() bool { return r.sent.Load() == uint64(len(sent)) }, "the relay takes it all")
	require.NoError(t, r.backend.SetLinger(0))
	require.NoError(t, r.backend.Close())
	return r, sent
}

// awaited is the relay's delivery, once there is one.
func (r *relayed) awaited(t testing.TB) (d *delivery) {
	t.Helper()
	eventually(t, func() bool {
		deliveries.mu.Lock()
		defer deliveries.mu.Unlock()
		d = r.pair.awaits
		return d != nil
	}, "a delivery")
	return d
}

// requireUnsent skips the test where the kernel does not tell what is delivered.
func requireUnsent(t testing.TB) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("what a peer has acknowledged can be told on Linux only")
	}
}

// Relays that wait for a delivery share one goroutine, and are not forgotten.
func TestDeliveriesShareAGoroutine(t *testing.T) {
	requireUnsent(t)
	const many = 20
	var relays []*relayed
	var sent []byte
	for range many {
		r, data := undelivered(t)
		relays, sent = append(relays, r), data
		r.awaited(t)
	}
	for _, r := range relays { // what reads from the client is left, and the delivery
		eventually(t, func() bool { return r.pair.running.Load() == 2 }, "the way that failed has ended")
	}
	stacks := make([]byte, 64<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	require.Equal(t, 1, strings.Count(string(stacks), "(*deliveryQueue).run("))
	require.Equal(t, many, strings.Count(string(stacks), "(*direction).move("))
	for _, r := range relays {
		got, err := io.ReadAll(r.client)
		require.True(t, IsReset(err), "%v", err)
		require.True(t, bytes.Equal(sent, got), "%d of %d bytes", len(got), len(sent))
		require.Equal(t, BackendReset, r.reason(t))
	}
}

// However many there are, each has its turn, and no tick looks at all of them.
func TestDeliveriesTakeTurns(t *testing.T) {
	const many = 2*deliveryLook + 10
	q := &deliveryQueue{running: true} // not a goroutine, but this test
	var relays []*Pair
	for range many {
		r := &Pair{}
		r.running.Store(2)
		q.add(r, &r.client, true)
		relays = append(relays, r)
	}
	seen := make(map[*delivery]int)
	turn := func() int {
		list := make([]*delivery, deliveryLook)
		n := q.turn(list)
		for _, d := range list[:n] {
			seen[d]++
		}
		return n
	}
	for range 3 {
		require.Equal(t, deliveryLook, turn())
	}
	require.Len(t, seen, many)
	for i, r := range relays {
		require.EqualValues(t, 3, r.running.Load())
		q.drop(r)
		q.drop(r)
		require.EqualValues(t, 2, r.running.Load())
		require.Equal(t, min(deliveryLook, many-1-i), turn())
	}
	require.False(t, q.running)
	ended := &Pair{}
	q.add(ended, &ended.client, true)
	severed := &Pair{}
	severed.running.Store(1)
	severed.severed.Store(true)
	q.add(severed, &severed.client, true)
	require.Empty(t, q.list, "nothing is left to wait for")
}

func TestCutEndsADelivery(t *testing.T) {
	requireUnsent(t)
	r, _ := undelivered(t)
	r.awaited(t)
	r.relay.Cut(drained)
	require.Equal(t, BackendReset, r.reason(t), "which was the reason already")
	deliveries.mu.Lock()
	defer deliveries.mu.Unlock()
	require.Nil(t, r.pair.awaits)
}

func TestDeliveryIsGivenUp(t *testing.T) {
	requireUnsent(t)
	for name, after := range map[string]time.Duration{"no progress": deliveryPatience, "in all": deliveryLimit} {
		t.Run(name, func(t *testing.T) {
			r, _ := undelivered(t)
			its := r.awaited(t)
			d := delivery{relay: its.relay, to: its.to, last: its.last, began: its.began} // to look at it alone
			d.left, d.moved = unsent(d.to.base), r.pair.up.moved.Load()+r.pair.down.moved.Load()
			d.progressed = d.began
			if after == deliveryLimit {
				d.progressed = d.began.Add(deliveryLimit)
			}
			require.False(t, d.done(d.to, d.last, d.began.Add(after-1)))
			require.True(t, d.done(d.to, d.last, d.began.Add(after)))
			d.left++
			require.Equal(t, after == deliveryLimit, d.done(d.to, d.last, d.began.Add(after)), "progress is time to go on, but not for ever")
			r.relay.Cut(Error)
			r.reason(t)
		})
	}
}

// The client's upload fails as the backend was reset, and the client takes none
// of what the backend had sent before: it can't hold the connection for ever.
func TestResetIsFoundBehindAStalledReceiver(t *testing.T) {
	r := startRelay(t, 0, nil)
	flood(t, r.backend)
	require.NoError(t, r.backend.SetLinger(0))
	require.NoError(t, r.backend.Close())
	write(t, r.client, "x")
	d := r.awaited(t)
	require.False(t, d.last)
	require.Same(t, &r.pair.client, d.to)
	deliveries.look(d, time.Now().Add(deliveryPatience)) // the first look is where the patience begins
	deliveries.look(d, time.Now().Add(3*deliveryPatience))
	require.Equal(t, BackendReset, r.reason(t))
	expectReset(t, r.client)
}
