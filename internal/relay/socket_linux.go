package relay

import (
	"errors"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The words of SO_MEMINFO that are of use here, in bytes; see sock(7) and
// linux/sock_diag.h.
const (
	memWriteAlloc  = 2
	memSendBuffer  = 3
	memWriteQueued = 5
	memWords       = 9
)

// sendRoom returns how many bytes a socket can take now, and whether that is as
// much as the kernel wants to be free before it calls the socket writable again
// once it was full. Where it can't be told there is room for any.
func sendRoom(fd int) (room int, enough bool) {
	var words [memWords]uint32
	size := uint32(unsafe.Sizeof(words))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&words)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return spliceMax, true
	}
	// TCP bounds what is queued, Unix sockets what the receiver has not read.
	used := int(max(words[memWriteQueued], words[memWriteAlloc]))
	room = max(0, int(words[memSendBuffer])-used)
	return room, room > used/2
}

// poll returns which of the events hold now, and POLLERR and POLLHUP. A socket
// that is found to be full wakes its poller when it has room.
func poll(fd int, events int16) int16 {
	list := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(list, 0)
		switch {
		case err == nil:
			return list[0].Revents
		case err != unix.EINTR:
			return unix.POLLERR
		}
	}
}

// wasReset reports whether a TCP connection whose reads say end of file, while
// its writing side is open, is in fact closed altogether, as by a reset, and not
// just by the peer's FIN. A state of TCP's own would not do: with MPTCP it
// is that of the first subflow, of which there may be others.
func wasReset(conn net.Conn) bool {
	var events int16
	err := control(conn, func(fd int) error {
		events = poll(fd, 0)
		return nil
	})
	return err == nil && events&unix.POLLHUP != 0
}

// hasFailed reports whether a connection has an error that nobody has taken from
// it: it was reset, or is lost. An end in order is none.
func hasFailed(conn net.Conn) bool {
	var socket syscall.Conn
	switch c := conn.(type) { // a wrapper's descriptor may be none of ours, or long in coming
	case *net.TCPConn:
		socket = c
	case *net.UnixConn:
		socket = c
	default:
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	failed := false
	_ = raw.Control(func(fd uintptr) { failed = poll(int(fd), 0)&unix.POLLERR != 0 })
	return failed
}

// unsent returns how many bytes written to conn its peer has not acknowledged;
// 0 if that can't be told.
func unsent(conn net.Conn) int {
	var n int
	err := control(conn, func(fd int) (err error) {
		n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		return err
	})
	if err != nil {
		return 0
	}
	return n
}

var errNotTCP = errors.New("no TCP connection")

// control calls f with the descriptor of a TCP connection.
func control(conn net.Conn, f func(fd int) error) error {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return errNotTCP
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(err, cerr)
}
