//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"os"
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
	var n checkCounts
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
	served served
	recent []time.Time // when those of the last tenth of a second came
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
				n.closed()
				continue
			}
			for conn := accept(listener); conn >= 0; conn = accept(listener) {
				n.accepted(time.Now())
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

func (n *checkCounts) closed() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.served.Served++
}

func (n *checkCounts) accepted(now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.recent = append(n.recent, now)
	for now.Sub(n.recent[0]) > 100*time.Millisecond {
		n.recent = n.recent[1:]
	}
	n.served.Most = max(n.served.Most, len(n.recent))
}

// tell says what was seen since it said so before, for each line.
func (n *checkCounts) tell() {
	out := json.NewEncoder(os.Stdout)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		n.mu.Lock()
		now := n.served
		n.served = served{}
		n.mu.Unlock()
		check(out.Encode(now))
	}
}
