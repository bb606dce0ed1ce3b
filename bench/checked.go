//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// runChecked is the backends of 127.0.0.0/8 at the port, until it is killed: one
// socket has them all. They answer what is asked by HTTP, and close then, or once
// the other side has if the kind is keep. For each line of its input it says what
// they have seen.
func runChecked(kind, port string) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		cerr := raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "lo") }) // nobody else's addresses
		if err == nil {
			err = cerr
		}
		return err
	}}
	ln, err := config.Listen(context.Background(), "tcp4", "0.0.0.0:"+port)
	check(err)
	n := checkCounts{began: time.Now()}
	go n.tell()
	n.serve(ln.(*net.TCPListener), kind == "keep")
}

const (
	answerClosed = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
	answerKept   = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
)

// checkCounts counts connections.
type checkCounts struct {
	mu     sync.Mutex
	began  time.Time // what is counted
	closed int
	tenths []int // how many were accepted, by tenths of a second
}

// serve serves from one thread, as echoes does.
func (n *checkCounts) serve(ln *net.TCPListener, keep bool) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	check(err)
	f, err := ln.File()
	check(err)
	listener := int(f.Fd())
	check(unix.SetNonblock(listener, true))
	check(watch(epoll, listener))
	defer f.Close() // it is not to be collected before
	answer := []byte(answerClosed)
	if keep {
		answer = []byte(answerKept)
	}
	var events [256]unix.EpollEvent
	buf := make([]byte, 4<<10)
	for {
		ready, err := unix.EpollWait(epoll, events[:], -1)
		if err != unix.EINTR {
			check(err)
		}
		for _, e := range events[:max(0, ready)] {
			if fd := int(e.Fd); fd != listener {
				if replied(fd, buf, answer) && keep {
					continue
				}
				_ = unix.Close(fd)
				n.countClosed()
				continue
			}
			for conn := accept(listener); conn >= 0; conn = accept(listener) {
				n.countAccepted(time.Now())
				check(watch(epoll, conn))
			}
		}
	}
}

// replied answers what was asked. It reports false at the end of the connection.
func replied(fd int, buf, answer []byte) bool {
	got, err := unix.Read(fd, buf)
	if err != nil || got == 0 {
		return false
	}
	_, err = unix.Write(fd, answer)
	return err == nil
}

func (n *checkCounts) countClosed() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed++
}

func (n *checkCounts) countAccepted(now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(n.tenths) <= int(now.Sub(n.began)/(100*time.Millisecond)) {
		n.tenths = append(n.tenths, 0)
	}
	n.tenths[len(n.tenths)-1]++
}

// take returns what was counted since it did so before.
func (n *checkCounts) take() (s served) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s.Served = n.closed
	if len(n.tenths) > 0 {
		slices.Sort(n.tenths)
		s.Most = n.tenths[(len(n.tenths)-1)*99/100]
	}
	n.began, n.closed, n.tenths = time.Now(), 0, nil
	return s
}

// tell says what was seen since it said so before, for each line.
func (n *checkCounts) tell() {
	out := json.NewEncoder(os.Stdout)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		check(out.Encode(n.take()))
	}
}
