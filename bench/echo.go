//go:build linux

package main

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// echoes sends back what comes to the listeners, from one thread and with as few
// system calls as there can be: what a backend costs should not hide what a
// balancer does. It ends the process if it can't go on.
func echoes(listeners ...*net.TCPListener) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	check(err)
	accepts := make(map[int]bool)
	for _, ln := range listeners {
		f, err := ln.File()
		check(err)
		fd := int(f.Fd())
		check(unix.SetNonblock(fd, true))
		accepts[fd] = true
		check(watch(epoll, fd))
		defer f.Close() // it is not to be collected before
	}
	var events [256]unix.EpollEvent
	buf := make([]byte, 4<<10)
	for {
		n, err := unix.EpollWait(epoll, events[:], -1)
		if err != unix.EINTR {
			check(err)
		}
		for _, e := range events[:max(0, n)] {
			fd := int(e.Fd)
			if !accepts[fd] {
				echo(fd, buf)
				continue
			}
			for conn := accept(fd); conn >= 0; conn = accept(fd) {
				check(watch(epoll, conn))
			}
		}
	}
}

func watch(epoll, fd int) error {
	return unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

// accept returns the next connection, or -1 if none waits.
func accept(fd int) int {
	conn, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch err {
	case nil:
		return conn
	case unix.EAGAIN, unix.ECONNABORTED, unix.EINTR: // if one does, its listener is ready again
		return -1
	}
	check(err)
	return -1
}

// echo sends back what a connection has. One that does not take it is closed:
// the messages are so small that there is always room.
func echo(fd int, buf []byte) {
	n, err := unix.Read(fd, buf)
	if err == unix.EAGAIN {
		return
	}
	if n > 0 {
		var sent int
		if sent, err = unix.Write(fd, buf[:n]); err == nil && sent == n {
			return
		}
	}
	_ = unix.Close(fd)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: the backends:", err)
		os.Exit(1)
	}
}
