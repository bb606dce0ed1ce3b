package loop

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const hangTimeout = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// probe is a handler made of functions.
type probe struct {
	ready    func(tag, events uint32)
	turn     func()
	expired  func()
	posted   func(what uint32)
	panicked func(v any)
}

func (p *probe) Ready(tag, events uint32) { p.ready(tag, events) }
func (p *probe) Turn()                    { p.turn() }
func (p *probe) Expired()                 { p.expired() }
func (p *probe) Posted(what uint32)       { p.posted(what) }
func (p *probe) Panicked(v any, _ []byte) { p.panicked(v) }

// on calls f on the loop, and returns when it has returned.
func on(t testing.TB, l *Loop, f func()) {
	t.Helper()
	done := make(chan struct{})
	l.Post(&probe{posted: func(uint32) { f(); close(done) }}, 0)
	receive(t, done)
}

func receive[T any](t testing.TB, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(hangTimeout):
		require.FailNow(t, "never happened")
	}
	return v
}

func acquire(t testing.TB) *Loop {
	t.Helper()
	l, err := Acquire()
	require.NoError(t, err)
	t.Cleanup(l.Leave)
	return l
}

// pair returns two connected sockets that don't block.
func pair(t testing.TB) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	return fds[0], fds[1]
}

func closeAll(fds ...int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// Two sockets have events in the same batch. The handler of the first closes the
// second, and a new connection gets its number and its place at once: what the
// kernel had to say of the old one must not reach the new.
func TestStaleEvents(t *testing.T) {
	l := acquire(t)
	a, farA := pair(t)
	b, farB := pair(t)
	defer closeAll(farA, farB)
	var news []uint32
	fresh := &probe{ready: func(_, events uint32) { news = append(news, events) }}
	var refs [2]Ref
	var nearFresh, farFresh int
	replaced := make(chan struct{})
	old := func(i int) *probe {
		return &probe{ready: func(_, events uint32) {
			if events&unix.EPOLLIN == 0 || nearFresh != 0 {
				return
			}
			// Whichever comes first replaces the other, of which there is news, too.
			other := []int{b, a}[i]
			l.Release(refs[1-i])
			_ = unix.Close(other)
			nearFresh, farFresh = pair(t)
			assert.Equal(t, other, nearFresh, "the kernel gives the lowest number")
			ref := l.Register(fresh)
			assert.Equal(t, refs[1-i].index, ref.index)
			assert.NoError(t, l.Add(nearFresh, ref, 0))
			close(replaced)
		}}
	}
	on(t, l, func() {
		for i, fd := range []int{a, b} {
			refs[i] = l.Register(old(i))
			assert.NoError(t, l.Add(fd, refs[i], 0))
		}
	})
	on(t, l, func() { // while the loop is here, both become readable
		for _, far := range []int{farA, farB} {
			_, err := unix.Write(far, []byte("x"))
			assert.NoError(t, err)
		}
	})
	receive(t, replaced)
	for range 3 {
		on(t, l, func() {})
	}
	on(t, l, func() {
		for _, events := range news {
			assert.Zero(t, events&^unix.EPOLLOUT, "nobody has sent anything to the new one")
		}
		assert.NotEmpty(t, news, "it is told of its own")
		closeAll(a, b, nearFresh, farFresh)
	})
}

// A place is used again, in another generation.
func TestTable(t *testing.T) {
	var tb table
	var refs []Ref
	h := &probe{}
	for range 3 {
		refs = append(refs, tb.add(h))
	}
	tb.remove(refs[1])
	require.Nil(t, tb.find(refs[1]))
	again := tb.add(h)
	require.Equal(t, refs[1].index, again.index)
	require.NotEqual(t, refs[1], again)
	require.Nil(t, tb.find(refs[1]))
	require.NotNil(t, tb.find(again))
	require.Nil(t, tb.find(Ref{index: 99}))
	require.Len(t, tb.entries, 3)
}

// The wheel against a list that is searched: timers that are set, set again and
// stopped at random, over all of its levels.
func TestWheel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 5 {
		var tb table
		var w wheel
		now := rnd.Int64N(1 << 40)
		const many = 50
		want := map[uint32]int64{}
		byHandler := map[Handler]uint32{}
		for range many {
			h := &probe{}
			byHandler[h] = tb.add(h).index
		}
		for range 1000 {
			i := uint32(rnd.IntN(many))
			switch rnd.IntN(3) {
			case 0, 1:
				at := now + rnd.Int64N(1<<(20+rnd.IntN(35))) - 1<<20
				w.stop(&tb, i)
				w.set(&tb, i, at, now)
				want[i] = at
			case 2:
				w.stop(&tb, i)
				delete(want, i)
			}
			next := w.next(now)
			require.Equal(t, len(want) == 0, next < 0)
			if next > 0 && rnd.IntN(2) == 0 {
				now += int64(next)
			} else {
				now += rnd.Int64N(1 << (10 + rnd.IntN(28)))
			}
			for h := w.expire(&tb, now); h != nil; h = w.expire(&tb, now) {
				i := byHandler[h]
				require.Contains(t, want, i)
				require.LessOrEqual(t, want[i], now, "not too early")
				delete(want, i)
			}
			for _, at := range want {
				require.Greater(t, at+2*int64(tick), now, "nor too late")
			}
			require.Equal(t, len(want), w.count)
		}
	}
}

// A loop sleeps until its next timer, however far that is.
func TestWheelSleeps(t *testing.T) {
	for _, d := range []time.Duration{5 * time.Millisecond, time.Second, time.Minute, time.Hour} {
		var tb table
		var w wheel
		now := int64(12345678)
		h := &probe{}
		i := tb.add(h).index
		w.set(&tb, i, now+int64(d), now)
		end := now + int64(d)
		wakes := 0
		for w.expire(&tb, now) == nil {
			now += max(1, int64(w.next(now)))
			wakes++
		}
		require.GreaterOrEqual(t, now, end)
		require.LessOrEqual(t, now, end+2*int64(tick))
		require.LessOrEqual(t, wakes, 3+int(d/(levelSize*tick)))
	}
}

// Users spread over all loops, whatever they are and in whichever order they leave.
func TestLoopsAreSharedEvenly(t *testing.T) {
	all := []*Loop{new(Loop), new(Loop), new(Loop), new(Loop)}
	acquire := func() *Loop {
		l := fewest(all)
		l.load.Add(1)
		return l
	}
	for range 100 {
		acquire().load.Add(-1) // a connect that takes a while
		acquire()              // its relay
	}
	for _, l := range all {
		require.EqualValues(t, 25, l.load.Load())
	}
	all[2].load.Add(-20)
	for range 20 {
		require.Same(t, all[2], acquire())
	}
}

func TestLoopCallsInTurn(t *testing.T) {
	l := acquire(t)
	var order []int
	var refs [3]Ref
	left := 9
	done := make(chan struct{})
	on(t, l, func() {
		for i := range refs {
			refs[i] = l.Register(&probe{turn: func() {
				order = append(order, i)
				switch left--; {
				case left > 2: // as many as there are
					l.Again(refs[i])
				case left == 0:
					close(done)
				}
			}})
		}
		for _, ref := range refs {
			l.Again(ref)
		}
	})
	receive(t, done)
	on(t, l, func() {
		assert.Equal(t, []int{0, 1, 2, 0, 1, 2, 0, 1, 2}, order)
		for _, ref := range refs {
			l.Release(ref)
		}
	})
}

// A panic is told to who caused it, and what else there was in the round goes on.
func TestLoopContainsPanics(t *testing.T) {
	l := acquire(t)
	caught := make(chan any, 10)
	bad := &probe{panicked: func(v any) { caught <- v }}
	bad.posted = func(uint32) { panic("posted") }
	bad.expired = func() { panic("expired") }
	bad.turn = func() { panic("turn") }
	bad.ready = func(uint32, uint32) { panic("ready") }
	a, far := pair(t)
	defer closeAll(a, far)
	good := make(chan struct{})
	on(t, l, func() {
		ref := l.Register(bad)
		l.Post(bad, 0)
		l.Post(&probe{posted: func(uint32) { close(good) }}, 0)
		l.SetTimer(ref, l.Now())
		l.Again(ref)
		assert.NoError(t, l.Add(a, ref, 0))
	})
	receive(t, good)
	seen := map[any]bool{}
	for range 4 {
		seen[receive(t, caught)] = true
	}
	require.Len(t, seen, 4)
	on(t, l, func() { l.Remove(a) })
}

func TestLoopHandsOver(t *testing.T) {
	l := acquire(t)
	free, done := make(chan struct{}), make(chan struct{})
	on(t, l, func() {
		l.After(func() { <-free })
		l.After(func() { close(done) })
	})
	for range 3 {
		on(t, l, func() {}) // it doesn't wait
	}
	require.Empty(t, done)
	close(free)
	receive(t, done)
}

// Many goroutines post; each post is passed on once, whether the loop was asleep
// or not.
func TestPostsFromEverywhere(t *testing.T) {
	l := acquire(t)
	const many, each = 20, 500
	var sum atomic.Uint64
	p := &probe{posted: func(what uint32) { sum.Add(uint64(what)) }}
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			for i := range each {
				l.Post(p, uint32(i))
				if i%50 == 0 {
					time.Sleep(time.Millisecond) // so that it sleeps, too
				}
			}
		})
	}
	wg.Wait()
	on(t, l, func() {})
	require.EqualValues(t, many*each*(each-1)/2, sum.Load())
}

// Thousands that are cut, or whose time comes, at one moment have their turns
// between others' events.
func TestThousandsAtOnceHoldUpNobody(t *testing.T) {
	const many = 5000
	for name, begin := range map[string]func(l *Loop, each func()) (clean func()){
		"posts": func(l *Loop, each func()) func() {
			h := &probe{posted: func(uint32) { each() }}
			for range many {
				l.Post(h, 0)
			}
			return func() {}
		},
		"timers": func(l *Loop, each func()) func() {
			var refs []Ref
			for range many {
				ref := l.Register(&probe{expired: each})
				l.SetTimer(ref, l.Now())
				refs = append(refs, ref)
			}
			return func() {
				for _, ref := range refs {
					l.Release(ref)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := acquire(t)
			a, b := pair(t)
			defer closeAll(a, b)
			var (
				n, between int
				ref        Ref
				clean      func()
			)
			done := make(chan struct{})
			on(t, l, func() {
				ref = l.Register(&probe{ready: func(_, events uint32) {
					if events&unix.EPOLLIN != 0 {
						between = n
					}
				}})
				assert.NoError(t, l.Add(a, ref, 0))
				clean = begin(l, func() {
					if n++; n == 1 {
						_, err := unix.Write(b, []byte{1})
						assert.NoError(t, err)
					}
					if n == many {
						close(done)
					}
				})
			})
			receive(t, done)
			on(t, l, func() {
				assert.NotZero(t, between)
				assert.LessOrEqual(t, between, 2*atOnce)
				l.Release(ref)
				clean()
			})
		})
	}
}

// A loop that seldom has anything to do gives its processor up as it sleeps.
func TestQuietLoop(t *testing.T) {
	l := &Loop{rounds: quietRounds + 1, now: 1, looked: 0}
	require.False(t, l.isQuiet(), "it is too soon to say")
	l.now = int64(quietFor) + 1
	require.False(t, l.isQuiet())
	require.Zero(t, l.rounds)
	l.rounds = quietRounds
	l.now += int64(quietFor)
	require.False(t, l.isQuiet(), "it is too soon to say")
	l.now++
	require.True(t, l.isQuiet())
	l.rounds = quietRounds + 1
	l.now++
	require.True(t, l.isQuiet(), "it is too soon to say")
}

// A loop without users ends, with its files, and begins again with the next.
func TestLoopEnds(t *testing.T) {
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(list)
	}
	ended := func(l *Loop) {
		for deadline := time.Now().Add(hangTimeout); ; time.Sleep(time.Millisecond) {
			l.mu.Lock()
			running := l.running
			l.mu.Unlock()
			if !running {
				return
			}
			require.True(t, time.Now().Before(deadline), "it does not end")
		}
	}
	for _, l := range loops.all {
		ended(l)
	}
	before := files()
	for range 3 {
		l, err := Acquire()
		require.NoError(t, err)
		on(t, l, func() {})
		l.Leave()
		ended(l)
		require.Equal(t, before, files())
		l.Post(&probe{}, 0) // is dropped
	}
}

func TestAwait(t *testing.T) {
	a, far := pair(t)
	defer closeAll(a, far)
	t.Run("there already", func(t *testing.T) {
		require.NoError(t, Await(a, unix.POLLOUT, time.Time{}, nil))
	})
	t.Run("the deadline", func(t *testing.T) {
		deadline := time.Now().Add(20 * time.Millisecond)
		require.ErrorIs(t, Await(a, unix.POLLIN, deadline, nil), os.ErrDeadlineExceeded)
		require.False(t, time.Now().Before(deadline))
	})
	t.Run("one that has passed", func(t *testing.T) {
		require.ErrorIs(t, Await(a, unix.POLLIN, time.Now().Add(-time.Hour), nil), os.ErrDeadlineExceeded)
	})
	t.Run("cancelled", func(t *testing.T) {
		cancel := make(chan struct{})
		time.AfterFunc(10*time.Millisecond, func() { close(cancel) })
		require.ErrorIs(t, Await(a, unix.POLLIN, time.Time{}, cancel), context.Canceled)
	})
	t.Run("comes, and again", func(t *testing.T) {
		for range 3 {
			got := make(chan error)
			go func() { got <- Await(a, unix.POLLIN, time.Time{}, nil) }()
			_, err := unix.Write(far, []byte("x"))
			require.NoError(t, err)
			require.NoError(t, receive(t, got))
			_, err = unix.Read(a, make([]byte, 1))
			require.NoError(t, err)
		}
	})
	t.Run("an end", func(t *testing.T) {
		b, farB := pair(t)
		defer closeAll(b)
		got := make(chan error)
		go func() { got <- Await(b, unix.POLLIN, time.Time{}, nil) }()
		closeAll(farB)
		require.NoError(t, receive(t, got))
	})
	t.Run("many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		var wrong atomic.Int32
		cancel := make(chan struct{})
		for i := range 500 {
			c, farC := pair(t)
			wg.Go(func() {
				err := Await(c, unix.POLLIN, time.Now().Add(time.Duration(i)*time.Millisecond/10), cancel)
				if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.Canceled) {
					wrong.Add(1)
				}
				closeAll(c, farC)
			})
		}
		time.AfterFunc(25*time.Millisecond, func() { close(cancel) })
		wg.Wait()
		require.Zero(t, wrong.Load())
	})
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
