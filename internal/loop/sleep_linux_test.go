package loop

import (
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Somebody posts just as the loop falls asleep, again and again, and waits for
// what comes of it: one wake-up that is lost is never made up for.
func TestNoWakeUpIsLost(t *testing.T) {
	l := acquire(t)
	done := make(chan struct{}, 1)
	p := &probe{posted: func(uint32) { done <- struct{}{} }}
	for i := range 20_000 {
		for range i % 300 * 10 { // some are for a loop that falls asleep, others for one that is
			runtime.KeepAlive(i)
		}
		l.Post(p, 0)
		receive(t, done)
	}
}

// A post ends a loop's sleep by the deadline that was the next timer's.
func TestTimersComeDespitePosts(t *testing.T) {
	l := acquire(t)
	var ref Ref
	expired := make(chan struct{})
	on(t, l, func() {
		ref = l.Register(&probe{expired: func() { close(expired) }})
		l.SetTimer(ref, l.Now()+int64(100*time.Millisecond))
	})
	for range 20 {
		on(t, l, func() {})
	}
	receive(t, expired)
	on(t, l, func() { l.Release(ref) })
}

// A loop that is asleep waits in Go's poller: its thread serves others.
func TestLoopSleepsAsAGoroutineDoes(t *testing.T) {
	l := acquire(t)
	on(t, l, func() {})
	asleep := func() bool {
		stacks := make([]byte, 1<<20)
		for stack := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			if strings.Contains(stack, "(*Loop).run") && strings.Contains(strings.SplitN(stack, "\n", 2)[0], "[IO wait") {
				return true
			}
		}
		return false
	}
	for deadline := time.Now().Add(hangTimeout); !asleep(); time.Sleep(time.Millisecond) {
		require.True(t, time.Now().Before(deadline), "it never is")
	}
}

func testSleeper(t *testing.T) *sleeper {
	t.Helper()
	s := new(sleeper)
	require.NoError(t, s.open())
	t.Cleanup(s.close)
	return s
}

// Who wakes a sleeper may be so slow that it comes to the next sleep. That ends
// early, and the one behind it does not.
func TestLateWakeUp(t *testing.T) {
	s := testSleeper(t)
	clock := time.Now()
	a, far := pair(t)
	defer closeAll(a, far)
	require.NoError(t, unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, a, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}))
	var looks atomic.Int32
	ready := func(uintptr) bool {
		looks.Add(1)
		var events [1]unix.EpollEvent
		n, _ := unix.EpollWait(s.epoll, events[:], 0)
		return n > 0
	}
	s.lieDown(clock, 1, forGood)
	s.getUp()
	_ = s.file.SetReadDeadline(longAgo) // by one that looked while it lay
	s.lieDown(clock, 2, forGood)
	s.sleep(ready)
	s.getUp()
	require.Zero(t, looks.Load(), "it ends early")
	slept := make(chan struct{})
	go func() { // ends with the event
		s.lieDown(clock, 3, forGood)
		s.sleep(ready)
		s.getUp()
		close(slept)
	}()
	for deadline := time.Now().Add(hangTimeout); looks.Load() == 0; time.Sleep(time.Millisecond) {
		require.True(t, time.Now().Before(deadline))
	}
	require.Empty(t, slept)
	_, err := unix.Write(far, []byte("x"))
	require.NoError(t, err)
	receive(t, slept)
}

// The deadline stays as it is where it ends a sleep early at most.
func TestSleeperKeepsItsDeadline(t *testing.T) {
	s := testSleeper(t)
	clock := time.Now()
	now := func() int64 { return int64(time.Since(clock)) }
	lie := func(until int64) int64 {
		s.lieDown(clock, now(), until)
		s.getUp()
		return s.wakes
	}
	hour := int64(time.Hour)
	require.Equal(t, hour, lie(hour))
	require.Equal(t, hour, lie(2*hour), "an early end does no harm")
	require.Equal(t, hour, lie(forGood))
	require.Equal(t, hour/2, lie(hour/2), "a late one would")
	s.lieDown(clock, now(), hour)
	s.wake()
	s.getUp()
	require.Equal(t, hour, lie(hour), "it was woken, by another deadline")
	until := now() + int64(10*time.Millisecond)
	s.lieDown(clock, now(), until)
	s.sleep(func(uintptr) bool { return false })
	s.getUp()
	require.GreaterOrEqual(t, now(), until)
	require.EqualValues(t, notSet, s.wakes)
}

// A loop is shared for a moment after a handler was brief.
func TestSharedLoop(t *testing.T) {
	l := acquire(t)
	on(t, l, func() {
		l.brief = 0
		assert.False(t, l.Shared())
		l.Brief()
		assert.True(t, l.Shared())
		l.now += int64(sharedFor) - 1
		assert.True(t, l.Shared())
		l.now++
		assert.False(t, l.Shared())
	})
}
