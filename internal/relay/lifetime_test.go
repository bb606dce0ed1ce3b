package relay

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A connection ends at its age, whatever moves on it, or doesn't.
func TestRelayLifetime(t *testing.T) {
	const lifetime = 200 * time.Millisecond
	eachKind(t, func(t *testing.T, k kind) {
		k.lifetime = lifetime
		for _, idle := range []time.Duration{0, time.Hour} {
			began := time.Now()
			r := k.start(t, idle)
			var streams sync.WaitGroup
			streams.Go(func() { _, _ = readAllCount(r.backend) })
			streams.Go(func() {
				for err := error(nil); err == nil; {
					_, err = r.client.Write(make([]byte, 100))
				}
			})
			require.Equal(t, LifetimeOver, r.reason(t))
			require.GreaterOrEqual(t, time.Since(began), lifetime)
			streams.Wait()
		}
	})
}

func TestRelayLifetimeOfOneThatIsStill(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		k.lifetime = 50 * time.Millisecond
		r := k.start(t, 0)
		expectReset(t, r.client)
		expectReset(t, r.backend)
		require.Equal(t, LifetimeOver, r.reason(t))
	})
}

// One whose receivers take nothing ends as well, and so does one that is half
// closed, of which the reason is not who closed first.
func TestRelayLifetimeOfOneThatIsStalled(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		k.lifetime = 200 * time.Millisecond
		r := k.start(t, 0)
		for err := error(nil); err == nil; {
			_, err = r.client.Write(make([]byte, 1<<20))
		}
		require.Equal(t, LifetimeOver, r.reason(t))

		k.lifetime = time.Second // the end has to come through within it
		r = k.start(t, 0)
		require.NoError(t, r.client.CloseWrite())
		expectEOF(t, r.backend)
		expectReset(t, r.client)
		require.Equal(t, LifetimeOver, r.reason(t))
	})
}

// The age counts from the relay's making, not from the last byte.
func TestRelayLifetimeIsAnAge(t *testing.T) {
	k := kind{lifetime: time.Hour}
	r := k.start(t, time.Hour)
	passes := func(d time.Duration) { // as if so much time had passed
		r.pair.endsAt = r.pair.endsAt.Add(-d)
		r.pair.onTimer()
	}
	passes(59 * time.Minute)
	require.LessOrEqual(t, r.pair.untilLook(), time.Minute)
	write(t, r.client, "x")
	expect(t, r.backend, "x")
	require.Equal(t, None, r.relay.Reason())
	passes(time.Minute)
	require.Equal(t, LifetimeOver, r.reason(t))
}
