package loop

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Available says whether this system has loops.
const Available = true

// Await returns nil once one of the events, in poll's bits, has come at a
// descriptor, or an error has; os.ErrDeadlineExceeded at the deadline, unless that
// is zero; context.Canceled once cancel is closed. The descriptor must not block,
// and stays the caller's. What has come already costs one system call.
func Await(fd int, events int16, deadline time.Time, cancel <-chan struct{}) error {
	if pollNow(fd, events) {
		return nil
	}
	l, err := Acquire() // finish leaves
	if err != nil {
		return err
	}
	a := &await{loop: l, fd: fd, events: uint32(events), deadline: deadline, done: make(chan error, 1)}
	l.Post(a, awaitBegin)
	select {
	case err = <-a.done:
	case <-cancel:
		l.Post(a, awaitCancel)
		err = <-a.done
	}
	return err
}

func pollNow(fd int, events int16) bool {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
	n, err := unix.Poll(p[:], 0)
	return err == nil && n > 0
}

// await is a handler that waits once.
type await struct {
	loop     *Loop
	ref      Ref
	fd       int
	events   uint32 // epoll's bits of what is awaited are those of poll
	deadline time.Time
	over     bool
	done     chan error // capacity 1
}

const (
	awaitBegin = iota
	awaitCancel
)

// Posted is a part of Handler.
func (a *await) Posted(what uint32) {
	if what == awaitCancel {
		a.finish(context.Canceled)
		return
	}
	a.ref = a.loop.Register(a)
	if !a.deadline.IsZero() {
		a.loop.SetTimer(a.ref, a.loop.Now()+int64(time.Until(a.deadline)))
	}
	if err := a.loop.Add(a.fd, a.ref, 0); err != nil {
		a.finish(os.NewSyscallError("epoll_ctl", err))
	}
}

// Ready is a part of Handler.
func (a *await) Ready(_, events uint32) {
	if events&(a.events|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		a.finish(nil)
	}
}

// Expired is a part of Handler.
func (a *await) Expired() { a.finish(os.ErrDeadlineExceeded) }

// Turn is a part of Handler. Nobody asks for one.
func (a *await) Turn() {}

// Panicked is a part of Handler.
func (a *await) Panicked(value any, _ []byte) { panic(value) }

// finish tells of the end. The descriptor is the caller's alone from then on.
func (a *await) finish(err error) {
	if a.over {
		return
	}
	a.over = true
	a.loop.Remove(a.fd)
	a.loop.Release(a.ref)
	a.loop.Leave()
	a.done <- err
}
