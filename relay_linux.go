package tcplb

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"syscall"

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

	// What the last read brought: n bytes in buf or in pipe, or an error.
	buf  *[bufferSize]byte
	pipe *pipe
	n    int
	err  error
}

// run relays until the source ends; see direction.move for its errors.
func (p *pump) run(d *direction) error {
	p.d = d
	dst := d.dst.raw
	p.noSplice = dst == nil        // a wrapper must see the bytes
	read, drain := p.read, p.drain // bound once: each use would allocate
	for {
		if err := d.src.raw.Read(read); err != nil {
			return sourceError(err)
		}
		var err error
		switch {
		case p.err != nil:
			return sourceError(p.err)
		case p.pipe != nil:
			d.relay.touch()
			if werr := dst.Write(drain); werr != nil {
				p.err = werr
			}
			p.dropPipe()
			if p.err != nil {
				err = destinationError(p.err)
			}
		case p.buf != nil:
			err = d.write(p.buf[:p.n])
			p.dropBuffer()
		default:
			return nil // end of file
		}
		if err != nil {
			return err
		}
	}
}

// read is called with the source's descriptor whenever it may be readable, and
// returns false to wait for that.
func (p *pump) read(fd uintptr) bool {
	p.n, p.err = 0, nil
	if p.bulk && !p.noSplice {
		if p.pipe = pipes.get(); p.pipe != nil {
			return p.splice(int(fd))
		}
	}
	p.buf = buffers.Get().(*[bufferSize]byte)
	n, err := retry(func() (int, error) { return unix.Read(int(fd), p.buf[:]) })
	if n > 0 {
		p.n = n
		p.full++
		if n < bufferSize {
			p.full = 0
		}
		p.bulk = p.full >= bulkAfter
		return true
	}
	p.dropBuffer()
	if err == unix.EAGAIN {
		return false
	}
	p.err = err
	return true
}

// splice moves bytes from the source into the pipe, which is empty.
func (p *pump) splice(fd int) bool {
	n, err := spliceOnce(fd, p.pipe.w, spliceMax)
	if n > 0 {
		p.n = n
		if n >= smallSplice {
			p.small = 0
		} else if p.small++; p.small >= smallAfter {
			p.bulk, p.full, p.small = false, 0, 0
		}
		return true
	}
	p.dropPipe()
	switch {
	case err == unix.EAGAIN:
		return false
	case err == unix.EINVAL:
		p.noSplice = true
		return p.read(uintptr(fd))
	}
	p.err = err
	return true
}

// drain is called with the destination's descriptor whenever it may be
// writable, until the pipe is empty or the destination fails.
func (p *pump) drain(fd uintptr) bool {
	for p.n > 0 {
		n, err := spliceOnce(p.pipe.r, int(fd), p.n)
		if err == unix.EAGAIN {
			return false
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			p.err = err
			return true
		}
		p.n -= n
		p.d.count(n)
	}
	return true
}

func (p *pump) dropBuffer() {
	buffers.Put(p.buf)
	p.buf = nil
}

// dropPipe gives the pipe back, or closes it when bytes are stuck in it.
func (p *pump) dropPipe() {
	if p.n > 0 {
		pipes.discard(p.pipe)
	} else {
		pipes.put(p.pipe)
	}
	p.pipe = nil
}

func spliceOnce(from, to, limit int) (int, error) {
	return retry(func() (int, error) {
		n, err := unix.Splice(from, nil, to, nil, limit, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		return int(n), err
	})
}

// retry repeats a system call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
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
