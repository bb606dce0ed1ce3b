//go:build go1.28

package loop

import "golang.org/x/sys/unix"

// epollRest is epoll_wait(2).
func epollRest(epoll int, events *[batchSize]unix.EpollEvent, ms int) int {
	n, err := unix.EpollWait(epoll, events[:], ms)
	if err != nil { // interrupted
		return 0
	}
	return n
}
