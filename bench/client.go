//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	mostOpen = 5_000            // connections of a client at once
	patience = 60 * time.Second // for the last answers
)

// answers are what became of a client's connections. Connections that got no
// answer are in Failed, and in the times with all that they had waited.
type answers struct {
	Connections, Failed int
	Seconds             float64
	P50, P99            float64 // milliseconds
}

// client makes short connections from one thread and with as few system calls
// as there can be, so that what it costs is less than what any balancer does.
type client struct {
	to     unix.SockaddrInet4
	epoll  int
	conns  []clientConn // by descriptor
	open   int
	times  []time.Duration
	failed int
}

type clientConn struct {
	due  time.Time // when it was to begin
	sent bool
	got  int // bytes of the answer
}

// runClient connects to the address and says what came of it. A rate of 0 keeps
// so many open at all times; else one begins each 1/rate s, whether or not the
// ones before it were answered, and its time counts from then.
func runClient(address, rate, atOnce, duration string) error {
	runtime.LockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	perSecond, err := strconv.ParseFloat(rate, 64)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(atOnce)
	if err != nil {
		return err
	}
	length, err := time.ParseDuration(duration)
	if err != nil {
		return err
	}
	c := &client{to: unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}, times: make([]time.Duration, 0, 1<<20)}
	if c.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	began := time.Now()
	if perSecond == 0 {
		err = c.saturate(n, began.Add(length))
	} else {
		err = c.pace(perSecond, began, length)
	}
	if err != nil {
		return err
	}
	a := answers{Connections: len(c.times), Failed: c.failed, Seconds: time.Since(began).Seconds()}
	a.P50, a.P99 = percentile(c.times, 50), percentile(c.times, 99)
	return json.NewEncoder(os.Stdout).Encode(a)
}

// saturate keeps n connections open until then.
func (c *client) saturate(n int, until time.Time) error {
	for now := time.Now(); now.Before(until); now = time.Now() {
		for c.open < n {
			c.start(now)
		}
		if err := c.wait(until); err != nil {
			return err
		}
	}
	return c.finish()
}

// pace begins a connection at each moment of a timetable.
func (c *client) pace(rate float64, began time.Time, length time.Duration) error {
	next := 0
	at := func() time.Time { return began.Add(time.Duration(float64(next) / rate * float64(time.Second))) }
	for due := at(); due.Sub(began) < length; due = at() {
		if c.open < mostOpen && !due.After(time.Now()) {
			c.start(due)
			next++
			continue
		}
		until := due
		if c.open == mostOpen { // it waits for one to end, and that is counted
			until = time.Now().Add(patience)
		}
		if err := c.wait(until); err != nil {
			return err
		}
	}
	return c.finish()
}

// finish waits for the last answers.
func (c *client) finish() error {
	for until := time.Now().Add(patience); c.open > 0 && time.Now().Before(until); {
		if err := c.wait(until); err != nil {
			return err
		}
	}
	for fd := range c.conns {
		if !c.conns[fd].due.IsZero() {
			c.end(fd, false)
		}
	}
	return nil
}

var payload [messageSize]byte

// start begins a connection that was due then. The handshake of a loopback
// connection is mostly over when connect(2) returns.
func (c *client) start(due time.Time) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.failed++
		return
	}
	for fd >= len(c.conns) {
		c.conns = append(c.conns, clientConn{})
	}
	c.conns[fd] = clientConn{due: due}
	c.open++
	if err := unix.Connect(fd, &c.to); err != nil && err != unix.EINPROGRESS {
		c.end(fd, false)
		return
	}
	_, err = unix.Write(fd, payload[:])
	c.conns[fd].sent = err == nil
	wanted := uint32(unix.EPOLLIN)
	if err != nil {
		wanted |= unix.EPOLLOUT
	}
	if unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: wanted, Fd: int32(fd)}) != nil {
		c.end(fd, false)
	}
}

// wait handles what happens next, until then at most.
func (c *client) wait(until time.Time) error {
	left := max(0, time.Until(until))
	if left < 100*time.Millisecond { // epoll_wait(2) counts milliseconds
		exactly := unix.NsecToTimespec(left.Nanoseconds())
		poll := []unix.PollFd{{Fd: int32(c.epoll), Events: unix.POLLIN}}
		if _, err := unix.Ppoll(poll, &exactly, nil); err != nil && err != unix.EINTR {
			return fmt.Errorf("waiting for answers: %w", err)
		}
		left = 0
	}
	var events [256]unix.EpollEvent
	n, err := unix.EpollWait(c.epoll, events[:], int(left.Milliseconds()))
	if err != nil && err != unix.EINTR {
		return fmt.Errorf("waiting for answers: %w", err)
	}
	for _, e := range events[:max(0, n)] {
		c.handle(int(e.Fd), e.Events)
	}
	return nil
}

func (c *client) handle(fd int, events uint32) {
	conn := &c.conns[fd]
	if !conn.sent && events&unix.EPOLLOUT != 0 {
		_, err := unix.Write(fd, payload[:])
		conn.sent = err == nil
		err = unix.EpollCtl(c.epoll, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
		if !conn.sent || err != nil {
			c.end(fd, false)
			return
		}
	}
	if events&^unix.EPOLLOUT == 0 {
		return
	}
	var buf [messageSize]byte
	n, err := unix.Read(fd, buf[:])
	if err == unix.EAGAIN {
		return
	}
	conn.got += max(0, n)
	if n <= 0 || conn.got >= messageSize {
		c.end(fd, n > 0)
	}
}

func (c *client) end(fd int, answered bool) {
	c.times = append(c.times, time.Since(c.conns[fd].due))
	if !answered {
		c.failed++
	}
	c.conns[fd] = clientConn{}
	c.open--
	_ = unix.Close(fd)
}
