package tcplb

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hangup sees a client leave while nothing reads from it, and without reading.
type hangup struct {
	socket interface {
		net.Conn
		syscall.Conn
	}
	raw syscall.RawConn
	// silent: the client has not sent a byte that the socket does not have any
	// more, so that an end of file from it is all that there is.
	silent bool
}

// watchHangup returns nil where there is no socket to look at.
func watchHangup(client net.Conn, silent bool) *hangup {
	if client == nil {
		return nil
	}
	h := &hangup{silent: silent}
	var ok bool
	if h.socket, ok = innermost(client).(interface {
		net.Conn
		syscall.Conn
	}); !ok {
		return nil
	}
	var err error
	if h.raw, err = h.socket.SyscallConn(); err != nil {
		return nil
	}
	return h
}

func (h *hangup) setDeadline(t time.Time) { _ = h.socket.SetReadDeadline(t) }

// wait returns when the client has left, or at the deadline.
func (h *hangup) wait() {
	_ = h.raw.Read(func(fd uintptr) bool { return h.lookAt(fd) != reasonNone })
}

// look returns how the client has left; reasonNone if it has not.
func (h *hangup) look() (left reason) {
	if err := h.raw.Control(func(fd uintptr) { left = h.lookAt(fd) }); err != nil {
		return reasonClientReset // closed, by whoever
	}
	return left
}

// lookAt asks the kernel. A reset is one. An end of file may be a half-close
// behind a request, whose sender waits for the answer: it counts only where
// there is no request.
func (h *hangup) lookAt(fd uintptr) reason {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	if n, err := unix.Poll(p, 0); err != nil || n == 0 {
		return reasonNone
	}
	switch got := p[0].Revents; {
	case got&unix.POLLERR != 0:
		return reasonClientReset
	case got&(unix.POLLRDHUP|unix.POLLHUP) != 0 && h.silent: // a Unix socket that is closed has POLLHUP
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ); err == nil && n == 0 {
			return reasonClientClosed
		}
	}
	return reasonNone
}
