package secure

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// canWait says that await does.
const canWait = true

// await reads once, as soon as there is something.
func (g *gate) await() error {
	if len(g.rest) > 0 || g.err != nil {
		return nil
	}
	return g.raw.Read(g.fill)
}

// fillFrom is called with the descriptor whenever that may be readable. It holds
// a buffer only where it is.
func (g *gate) fillFrom(fd uintptr) (done bool) {
	buf := buffers.Get().(*[bufferSize]byte)
	n, err := unix.Read(int(fd), buf[:])
	for err == unix.EINTR {
		n, err = unix.Read(int(fd), buf[:])
	}
	switch {
	case n > 0:
		g.buf, g.rest = buf, buf[:n]
		return true
	case err == unix.EAGAIN:
	case err != nil:
		g.err = os.NewSyscallError("read", err)
	default:
		g.err = io.EOF
	}
	buffers.Put(buf)
	return g.err != nil
}
