//go:build go1.28

package loop

import "golang.org/x/sys/unix"

func epollRest(epoll int, events *[batchSize]unix.EpollEvent, ms int) int {
	return epollWait(epoll, events, ms)
}
