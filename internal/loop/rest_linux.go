//go:build !go1.28

package loop

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// epollRest is epoll_wait(2) that gives the processor to other goroutines before it
// waits. By EpollWait Go's scheduler keeps it for the loop until a thread that looks
// after such calls has taken it away, 20 µs later or more: to be woken and to look
// costs more than a message does, and where there is one processor only, nobody is
// accepted meanwhile.
//
// The two calls around it are the runtime's own. They are kept for others as they are
// (go.dev/issue/67401); with versions of Go that this was not tried with, EpollWait
// serves.
//
//go:nosplit
//go:norace
func epollRest(epoll int, events *[batchSize]unix.EpollEvent, ms int) int {
	entersyscallblock()
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(events)), batchSize, uintptr(ms), 0, 0)
	exitsyscall()
	if errno != 0 { // interrupted
		return 0
	}
	return int(n)
}

//go:linkname entersyscallblock runtime.entersyscallblock
func entersyscallblock()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()
