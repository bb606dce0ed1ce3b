package loop

import (
	"math"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sleeper has a loop's goroutine wait for events in Go's poller, as any other: a
// thread that is asleep in epoll_wait keeps its processor from goroutines until
// the scheduler notices.
//
// It is woken by a deadline that has passed, which takes no system call. Who wakes
// it first says what for, and then looks at asleep; who sleeps does it the other
// way around, with its own deadline set before both.
type sleeper struct {
	epoll  int
	file   *os.File        // epoll's, in Go's poller
	raw    syscall.RawConn // likewise
	asleep atomic.Bool
	wakes  int64 // when the deadline that is set ends a sleep; notSet, forGood
}

const (
	notSet  = 0 // or somebody else has set it
	forGood = math.MaxInt64
)

// open makes the files. It fails where there are none to spare, and where Go's
// poller can't have them.
func (s *sleeper) open() (err error) {
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	_ = unix.SetNonblock(s.epoll, true) // or os.NewFile would not have it polled
	s.file = os.NewFile(uintptr(s.epoll), "epoll")
	s.wakes = forGood
	if s.raw, err = s.file.SyscallConn(); err == nil {
		err = s.file.SetReadDeadline(time.Time{}) // fails if it is not polled
	}
	if err != nil {
		_ = s.file.Close()
	}
	return err
}

func (s *sleeper) close() { _ = s.file.Close() }

// lieDown comes before the last looks at whether there is anything to do. The
// sleep is to end by then, or before; both times count from the clock's.
func (s *sleeper) lieDown(clock time.Time, now, until int64) {
	if s.wakes <= now || s.wakes > until { // an early end is cheaper than another deadline each time
		var deadline time.Time
		if until != forGood {
			deadline = clock.Add(time.Duration(until))
		}
		_ = s.file.SetReadDeadline(deadline)
		s.wakes = until
	}
	s.asleep.Store(true)
}

// sleep returns once ready returns true, at the deadline, or when it was woken.
func (s *sleeper) sleep(ready func(uintptr) bool) {
	if s.raw.Read(ready) != nil {
		s.wakes = notSet
	}
}

// getUp follows lieDown, with or without a sleep.
func (s *sleeper) getUp() {
	if !s.asleep.Swap(false) {
		s.wakes = notSet
	}
}

// wake may be called by anybody, between open and close. What a slow call does
// may come to the next sleep, which ends early then.
func (s *sleeper) wake() {
	if s.asleep.Load() && s.asleep.CompareAndSwap(true, false) {
		_ = s.file.SetReadDeadline(longAgo)
	}
}

var longAgo = time.Unix(1, 0)
