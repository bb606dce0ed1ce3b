package tcplb

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// canPump says that a bare socket is read by pump.
const canPump = true

const (
	// bulkAfter is how many buffers in a row must be filled before a direction
	// is taken for a bulk transfer. A pipe costs two files and saves nothing on
	// small messages.
	bulkAfter = 4
	// A splice that moves less than smallSplice is a small message, and after
	// smallAfter of those in a row the bulk transfer is over.
	smallSplice = 16 << 10
	smallAfter  = 4
	// spliceMax bounds one splice call; the pipe's size usually does before.
	spliceMax = 1 << 20
)

// pump moves one direction's bytes out of a bare socket. It takes a buffer, or
// in a bulk transfer a pipe, only once the socket is readable, and gives it back
// before it waits again: an idle connection holds neither.
type pump struct {
	d        *direction
	bulk     bool // splice, if there is a pipe to be had
	noSplice bool // the kernel can't, between these two
	full     int  // buffers filled in a row
	small    int  // small splices in a row

	err error // how the direction ended; nil = end of file

	// What is on its way to a bare destination.
	rest  []byte // in the buffer
	stuck int    // bytes in the pipe
	pipe  *pipe
	werr  error
	// Bound once, as each use would allocate.
	drainBuffer, drainPipe func(uintptr) bool
}

// run relays until the source ends; see direction.move for its errors.
func (p *pump) run(d *direction) error {
	p.d = d
	p.noSplice = d.dst.raw == nil // a wrapper must see the bytes
	p.drainBuffer, p.drainPipe = p.writeRest, p.spliceStuck
	if err := d.src.raw.Read(p.relayReadable); err != nil {
		return sourceError(err)
	}
	return p.err
}

// step says how to go on.
type step int

const (
	stepOn   step = iota // perhaps by other means
	stepWait             // until the source is readable
	stepEnd              // with the pump's err
)

// relayReadable is called with the source's descriptor whenever that may be
// readable, and relays all there is. It returns false to wait for more.
//
// It is one call of RawConn.Read for all of a direction, as each would clear
// the poller's memory of what has become readable.
func (p *pump) relayReadable(fd uintptr) (done bool) {
	next := stepOn
	for next == stepOn {
		if pp := p.bulkPipe(); pp != nil {
			next = p.splice(int(fd), pp)
		} else {
			next = p.copy(int(fd))
		}
	}
	return next == stepEnd
}

// bulkPipe returns a pipe where one is of use and to be had.
func (p *pump) bulkPipe() *pipe {
	if !p.bulk {
		return nil
	}
	return pipes.get()
}

// copy relays through a buffer.
func (p *pump) copy(fd int) step {
	buf := buffers.Get().(*[bufferSize]byte)
	next := p.copyOnce(fd, buf[:])
	for next == stepOn && !p.bulk {
		next = p.copyOnce(fd, buf[:])
	}
	buffers.Put(buf)
	return next
}

func (p *pump) copyOnce(fd int, buf []byte) step {
	n, err := readNow(fd, buf)
	switch {
	case n > 0:
		if n < len(buf) {
			p.full = 0
		} else {
			p.full++
		}
		p.bulk = p.full >= bulkAfter && !p.noSplice
		if p.err = p.deliver(buf[:n]); p.err != nil {
			return stepEnd
		}
		return stepOn
	case err == unix.EAGAIN:
		return stepWait
	case err != nil:
		p.err = sourceError(err)
	}
	return stepEnd // end of file, if there is no err
}

// splice relays through the pipe, which is empty.
func (p *pump) splice(fd int, pp *pipe) step {
	for {
		n, err := spliceOnce(fd, pp.w, spliceMax)
		switch {
		case n > 0:
			if p.err = p.emptyPipe(pp, n); p.err != nil {
				pipes.discard(pp) // bytes are stuck in it
				return stepEnd
			}
			if n >= smallSplice {
				p.small = 0
			} else if p.small++; p.small >= smallAfter {
				p.bulk, p.full, p.small = false, 0, 0
				pipes.put(pp)
				return stepOn
			}
			continue
		case err == unix.EINVAL:
			p.noSplice, p.bulk = true, false
			pipes.put(pp)
			return stepOn
		case err == unix.EAGAIN:
			pipes.put(pp)
			return stepWait
		case err != nil:
			p.err = sourceError(err)
		}
		pipes.put(pp)
		return stepEnd
	}
}

// deliver writes the bytes to the destination.
func (p *pump) deliver(b []byte) error {
	if p.d.dst.raw == nil { // a wrapper
		return p.d.write(b)
	}
	p.rest = b
	return p.delivered(p.d.dst.raw.Write(p.drainBuffer))
}

// delivered returns what went wrong while writing to a bare destination. An
// idle goroutine keeps the stack that it once needed, 2 KB as things are: the
// functions on the way to a write are kept small.
func (p *pump) delivered(err error) error {
	if err == nil {
		err = p.werr
	}
	p.rest, p.pipe, p.stuck, p.werr = nil, nil, 0, nil
	if err == nil {
		return nil
	}
	return destinationError(err)
}

// writeRest is called with the destination's descriptor whenever that may be
// writable, until all of the buffer is written or the destination fails.
func (p *pump) writeRest(fd uintptr) (done bool) {
	for len(p.rest) > 0 {
		n, err := writeNow(int(fd), p.rest)
		switch {
		case err == unix.EAGAIN:
			return false
		case err != nil:
			p.werr = err
			return true
		}
		p.rest = p.rest[n:]
		p.d.count(n)
	}
	return true
}

// emptyPipe delivers the n bytes in the pipe.
func (p *pump) emptyPipe(pp *pipe, n int) error {
	p.pipe, p.stuck = pp, n
	return p.delivered(p.d.dst.raw.Write(p.drainPipe))
}

// spliceStuck is to the pipe what writeRest is to the buffer.
func (p *pump) spliceStuck(fd uintptr) (done bool) {
	for p.stuck > 0 {
		n, err := spliceOnce(p.pipe.r, int(fd), p.stuck)
		switch {
		case err == unix.EAGAIN:
			return false
		case err == nil && n == 0:
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			p.werr = err
			return true
		}
		p.stuck -= n
		p.d.count(n)
	}
	return true
}

// readNow and writeNow are read(2) and write(2) on a descriptor that does not
// block. They don't tell Go's scheduler of the call, which it would take for
// one that may last: on a busy machine it then gives the processor away and back.
func readNow(fd int, b []byte) (int, error)  { return callNow(unix.SYS_READ, fd, b) }
func writeNow(fd int, b []byte) (int, error) { return callNow(unix.SYS_WRITE, fd, b) }

func callNow(trap uintptr, fd int, b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(trap, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

func spliceOnce(from, to, limit int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, limit, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return int(n), err
		}
	}
}

// wasReset reports whether a socket whose reads say end of file is in fact
// closed altogether, as by a reset, and not just by the peer's FIN.
func wasReset(raw syscall.RawConn) bool {
	closed := false
	err := raw.Control(func(fd uintptr) {
		// The first byte of struct tcp_info is the state.
		v, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return // a Unix socket
		}
		var info [4]byte
		binary.NativeEndian.PutUint32(info[:], uint32(v))
		closed = info[0] == unix.BPF_TCP_CLOSE
	})
	return err == nil && closed
}

// unsent returns how many bytes written to conn its peer has not acknowledged;
// 0 if that can't be told.
func unsent(conn net.Conn) int {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return 0
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return 0
	}
	var n int
	cerr := raw.Control(func(fd uintptr) {
		n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	})
	if errors.Join(err, cerr) != nil {
		return 0
	}
	return n
}
