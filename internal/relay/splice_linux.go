package relay

import (
	"io"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/raw"
	"golang.org/x/sys/unix"
)

// splice relays what the destination has room for, without copying it. In the
// pipe there are bytes only while nobody waits: a receiver that is slow or stuck
// leaves them in the source's receive queue, which the kernel bounds anyway.
func (p *pump) splice(fd int) step {
	if p.drainSource == nil {
		p.drainSource, p.most = p.spliceInto, spliceFirst
	}
	p.from, p.next = fd, stepOn
	err := p.delivered(p.d.dst.raw.Write(p.drainSource))
	if p.buf != nil {
		buffers.Put(p.buf)
		p.buf = nil
	}
	if err != nil {
		p.err = err
		return stepEnd
	}
	return p.next
}

// spliceInto is called with the destination's descriptor whenever that may be
// writable, until it has had some. It sets the next step.
func (p *pump) spliceInto(fd uintptr) (done bool) {
	if len(p.rest) > 0 {
		return p.writeRest(fd)
	}
	to := int(fd)
	room, enough := sendRoom(to)
	if !enough {
		if poll(to, unix.POLLOUT) == 0 {
			return false
		}
		room, _ = sendRoom(to)
	}
	var pp *pipe
	if room = min(room, p.most); room >= smallSplice {
		pp = pipes.get()
	}
	if pp == nil {
		p.next = stepCopy
		return true
	}
	n, err := spliceOnce(p.from, pp.w, room)
	if n > 0 {
		p.emptyPipe(pp, to, n)
		return len(p.rest) == 0 || p.writeRest(fd)
	}
	pipes.put(pp)
	switch err {
	case nil:
		p.next = stepEnd
	case unix.EAGAIN:
		p.next = stepWait
		if poll(p.from, unix.POLLPRI) != 0 { // at an urgent mark, over which only a read gets
			p.noSplice, p.bulk, p.next = true, false, stepCopy
		}
	case unix.EINVAL:
		p.noSplice, p.bulk = true, false
	default:
		p.err, p.next = sourceError(err), stepEnd
	}
	return true
}

// emptyPipe delivers the n bytes in the pipe. What the destination doesn't take
// at once is left in rest.
func (p *pump) emptyPipe(pp *pipe, to, n int) {
	left := n
	for left > 0 && p.werr == nil {
		m, err := spliceOnce(pp.r, to, left)
		if err == unix.EAGAIN {
			break
		}
		if m == 0 && err == nil {
			err = io.ErrUnexpectedEOF
		}
		left -= m
		p.d.count(m)
		p.werr = err
	}
	if left > 0 && p.werr == nil {
		p.takeOut(pp, left)
	}
	if p.werr != nil {
		pipes.discard(pp) // bytes are stuck in it
		return
	}
	pipes.put(pp)
	p.adapt(n, left)
}

// takeOut moves what is left in the pipe to memory.
func (p *pump) takeOut(pp *pipe, left int) {
	if left <= bufferSize {
		p.buf = buffers.Get().(*[bufferSize]byte)
		p.rest = p.buf[:left]
	} else {
		p.rest = make([]byte, left)
	}
	for got := 0; got < left && p.werr == nil; {
		n, err := raw.Read(pp.r, p.rest[got:])
		if n == 0 && err == nil {
			err = io.ErrUnexpectedEOF
		}
		got += n
		p.werr = err
	}
}

// adapt learns from a splice of n bytes of which so many were left. The room
// that the kernel tells of is nearly always right; where a limit of unsent bytes
// or a lack of memory makes it less, the next splice is smaller.
func (p *pump) adapt(n, left int) {
	if left > 0 {
		p.most = max(smallSplice, n-left)
	} else {
		p.most = min(spliceMax, p.most+p.most/8)
	}
	if n >= smallSplice {
		p.small = 0
	} else if p.small++; p.small >= smallAfter {
		p.bulk, p.full, p.small = false, 0, 0
	}
}

func spliceOnce(from, to, limit int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, limit, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return max(0, int(n)), err
		}
	}
}
