package relay

import (
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/raw"
	"golang.org/x/sys/unix"
)

// canPump says that a bare socket is read by pump.
const canPump = true

const (
	// bulkAfter is how many buffers in a row must be filled before a direction
	// is taken for a bulk transfer. A pipe saves nothing on small messages.
	bulkAfter = 4
	// A splice that moves less than smallSplice is a small message, and after
	// smallAfter of those in a row the bulk transfer is over.
	smallSplice = 16 << 10
	smallAfter  = 4
	// spliceMax bounds one splice call, and spliceFirst the first: it grows while
	// the destination takes it all. What it leaves is in memory until it takes it.
	spliceMax   = 1 << 20
	spliceFirst = 128 << 10
)

// pump moves one direction's bytes out of a bare socket. It takes a buffer only
// once the socket is readable, and for more than that it waits until the
// destination has room: an idle connection holds nothing, and one whose receiver
// is slow neither a pipe nor, as a rule, a buffer.
type pump struct {
	d        *direction
	bulk     bool // splice
	noSplice bool // the kernel can't, between these two
	large    bool // the last buffer was no small message
	full     int  // buffers filled in a row
	small    int  // small splices in a row
	most     int  // bytes to splice at once

	err error // how the direction ended; nil = end of file

	// What is on its way to the destination, or where it comes from.
	buf  *[bufferSize]byte // holds the rest for a wrapper
	rest []byte
	from int
	next step
	werr error
	// Bound once, as each use would allocate.
	drainBuffer, drainSource func(uintptr) bool
}

// run relays until the source ends; see direction.move for its errors.
func (p *pump) run(d *direction) error {
	p.d = d
	if d.dst.raw == nil { // a wrapper must see the bytes
		return p.feed()
	}
	p.drainBuffer = p.writeRest
	if err := d.src.raw.Read(p.relayReadable); err != nil {
		return sourceError(err)
	}
	return p.err
}

// feed relays to a wrapper. That may take long to write, also where its socket
// was closed. So the source's lock is left for the write: who closes the source
// would wait for it.
func (p *pump) feed() error {
	fill := p.fill
	for {
		if err := p.d.src.raw.Read(fill); err != nil {
			return sourceError(err)
		}
		if p.buf == nil {
			return p.err
		}
		err := p.d.write(p.rest)
		buffers.Put(p.buf)
		p.buf, p.rest = nil, nil
		if err != nil {
			return err
		}
	}
}

// fill is called with the source's descriptor whenever that may be readable. It
// reads once, and leaves no buffer at the end.
func (p *pump) fill(fd uintptr) (done bool) {
	buf := buffers.Get().(*[bufferSize]byte)
	n, err := raw.Read(int(fd), buf[:])
	if n > 0 {
		p.buf, p.rest = buf, buf[:n]
		return true
	}
	buffers.Put(buf)
	if err != nil && err != unix.EAGAIN {
		p.err = sourceError(err)
	}
	return err != unix.EAGAIN
}

// step says how to go on.
type step int

const (
	stepOn   step = iota // perhaps by other means
	stepCopy             // by a buffer, this time
	stepWait             // until the source is readable
	stepEnd              // with the pump's err
)

// relayReadable is called with the source's descriptor whenever that may be
// readable, and relays all there is. It returns false to wait for more.
//
// It is one call of RawConn.Read for all of a direction, as each would clear
// the poller's memory of what has become readable. While it waits for the
// destination it has the source's lock: see relay.sever.
func (p *pump) relayReadable(fd uintptr) (done bool) {
	next := stepOn
	for next <= stepCopy {
		switch {
		case p.bulk && next == stepOn:
			next = p.splice(int(fd))
		case !p.large:
			next = p.copy(int(fd))
		default:
			next = p.copyIntoRoom(int(fd))
		}
	}
	return next == stepEnd
}

// copy relays through a buffer.
func (p *pump) copy(fd int) step {
	buf := buffers.Get().(*[bufferSize]byte)
	next := p.copyOnce(fd, buf[:])
	for next == stepOn && !p.large {
		next = p.copyOnce(fd, buf[:])
	}
	buffers.Put(buf)
	return next
}

func (p *pump) copyOnce(fd int, buf []byte) step {
	n, err := raw.Read(fd, buf)
	switch {
	case n > 0:
		p.large = n >= smallSplice
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

// copyIntoRoom is copy where the last read was large: there may well be more
// than the destination takes.
func (p *pump) copyIntoRoom(fd int) step {
	if p.err = p.delivered(p.d.dst.raw.Write(hasRoom)); p.err != nil {
		return stepEnd
	}
	return p.copy(fd)
}

// hasRoom is called with the destination's descriptor whenever that may be
// writable, until it can take a buffer, or a good deal of what it can take at all.
func hasRoom(fd uintptr) bool {
	room, enough := sendRoom(int(fd))
	return enough || room >= bufferSize || poll(int(fd), unix.POLLOUT) != 0
}

// deliver writes the bytes to the destination.
func (p *pump) deliver(b []byte) error {
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
	p.rest, p.werr = nil, nil
	if err == nil {
		return nil
	}
	return destinationError(err)
}

// writeRest is called with the destination's descriptor whenever that may be
// writable, until all of the buffer is written or the destination fails.
func (p *pump) writeRest(fd uintptr) (done bool) {
	for len(p.rest) > 0 {
		n, err := raw.Write(int(fd), p.rest)
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
