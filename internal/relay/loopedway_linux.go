package relay

import (
	"io"
	"sync/atomic"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/raw"
	"golang.org/x/sys/unix"
)

// turnBytes is about how much a connection moves each way before others have
// their turn.
const turnBytes = 256 << 10

// spliceShared bounds a splice while others on the loop have but messages to move:
// a message waits for a splice each way. It is a quarter of spliceMax, which costs bulk
// a third more processor time.
const spliceShared = 256 << 10

// loopedWay is one of a Looped's two ways.
type loopedWay struct {
	src   loopedSide
	most  int32 // bytes to splice at once
	full  uint8 // buffers filled in a row
	small uint8 // small splices in a row
	flags
	dst   *loopedSide    // the other way's src
	left  *leftover      // nil: the destination has always taken all
	total *atomic.Uint64 // live count of whoever keeps the books
	moved atomic.Uint64
}

// leftover was read and is not written yet, a buffer at most, but for what was
// read before the relay began.
type leftover struct {
	bytes []byte
	buf   *[bufferSize]byte // holds them; nil: it is not of the pool
}

type flags struct {
	readable bool // as far as is known
	done     bool // nothing is moved any more
	bulk     bool // splice
	noSplice bool // the kernel can't, between these two
	large    bool // the last buffer was no small message
	urgent   bool // there is, or was, an urgent mark
}

// foundUrgent is for TCP's urgent data (telnet's and FTP's interrupts): a read ends
// at the mark, though more is there, and a splice never gets over it.
func (w *loopedWay) foundUrgent() {
	w.urgent, w.readable = true, true
	w.noSplice, w.bulk = true, false
}

// end ends the way, whatever it still had.
func (w *loopedWay) end() {
	w.done = true
	w.drop()
}

// leave has room for n bytes that were read, to be written once the destination
// takes them.
func (w *loopedWay) leave(n int) []byte {
	if w.left == nil {
		w.left = new(leftover)
	}
	if n > bufferSize {
		w.left.bytes = make([]byte, n)
	} else {
		w.left.buf = buffers.Get().(*[bufferSize]byte)
		w.left.bytes = w.left.buf[:n]
	}
	return w.left.bytes
}

// drop gives the buffer back.
func (w *loopedWay) drop() {
	if w.left == nil {
		return
	}
	if w.left.buf != nil {
		buffers.Put(w.left.buf)
	}
	*w.left = leftover{}
}

// pump moves one way's bytes until there are none, the destination is full or
// the turn is over; then it returns true.
func (r *Looped) pump(w *loopedWay) (more bool) {
	for left := turnBytes; !w.done && w.dst.writable; {
		switch {
		case w.left != nil && len(w.left.bytes) > 0:
			left -= r.writeLeft(w)
		case !w.readable:
			return false
		case left <= 0:
			return true
		case w.bulk:
			left -= r.splice(w)
		default:
			left -= r.copy(w)
		}
	}
	return false
}

// count keeps the books for n bytes that were delivered.
func (r *Looped) count(w *loopedWay, n int) {
	if n > 0 {
		w.moved.Add(uint64(n))
		w.total.Add(uint64(n))
		r.lastMoved.Store(r.loop.Now())
	}
}

// write writes until all is written or the destination takes no more, and
// returns how much it took. If it has failed, the way is done.
func (r *Looped) write(w *loopedWay, b []byte) (n int) {
	for n < len(b) {
		m, err := raw.Write(int(w.dst.fd), b[n:])
		switch {
		case err == unix.EAGAIN:
			w.dst.writable = false
			return n
		case err != nil:
			r.destinationLost(w)
			return n
		}
		n += m
		r.count(w, m)
	}
	return n
}

func (r *Looped) writeLeft(w *loopedWay) int {
	n := r.write(w, w.left.bytes)
	if n < len(w.left.bytes) {
		w.left.bytes = w.left.bytes[n:]
	} else {
		w.drop()
	}
	return n
}

// copy relays what one read gets. After one that was large it makes sure that the
// destination takes it: a receiver that is stuck is not to hold a buffer.
func (r *Looped) copy(w *loopedWay) int {
	if w.large && !hasRoom(uintptr(w.dst.fd)) {
		w.dst.writable = false
		return 0
	}
	buf := r.loop.Buffer()
	n, err := raw.Read(int(w.src.fd), buf)
	switch {
	case n > 0:
		w.learn(n, len(buf))
		// A short read has taken all there was, and more of it would be told; but an
		// end may have been told before.
		w.readable = n == len(buf) || w.src.ending || w.urgent
		if m := r.write(w, buf[:n]); m < n && !w.done {
			copy(w.leave(n-m), buf[m:n])
		}
	case err == unix.EAGAIN:
		w.readable = false
	case err != nil:
		r.sourceLost(w, err)
	default:
		r.sourceEnded(w)
	}
	return n
}

// learn finds out whether this is a bulk transfer.
func (w *loopedWay) learn(n, size int) {
	w.large = n >= smallSplice
	if n < size {
		w.full = 0
	} else {
		w.full = min(w.full+1, bulkAfter)
	}
	w.bulk = w.full >= bulkAfter && !w.noSplice
}

// splice relays what the destination has room for, without copying it. In the
// pipe there are bytes only within this call: a receiver that is slow or stuck
// leaves them in the source's receive queue, which the kernel bounds anyway.
func (r *Looped) splice(w *loopedWay) int {
	to := int(w.dst.fd)
	room, enough := sendRoom(to)
	if !enough {
		if poll(to, unix.POLLOUT) == 0 {
			w.dst.writable = false
			return 0
		}
		room, _ = sendRoom(to)
	}
	if w.most == 0 {
		w.most = spliceFirst
	}
	var pp *pipe
	if room = r.atOnce(w, room); room >= smallSplice {
		pp = pipes.get()
	}
	if pp == nil {
		return r.copy(w)
	}
	n, err := spliceOnce(int(w.src.fd), pp.w, room)
	if n > 0 {
		r.emptyPipe(w, pp, n)
		return n
	}
	pipes.put(pp)
	switch err {
	case nil:
		r.sourceEnded(w)
	case unix.EAGAIN:
		w.readable = false
	case unix.EINVAL:
		w.noSplice, w.bulk = true, false
	default:
		r.sourceLost(w, err)
	}
	return 0
}

// atOnce returns how much of a destination's room one splice may fill.
func (r *Looped) atOnce(w *loopedWay, room int) int {
	room = min(room, int(w.most))
	if r.loop.Shared() {
		room = min(room, spliceShared)
	}
	return room
}

// emptyPipe delivers the n bytes in the pipe. What the destination doesn't take
// at once is left over.
func (r *Looped) emptyPipe(w *loopedWay, pp *pipe, n int) {
	left := n
	for left > 0 {
		m, err := spliceOnce(pp.r, int(w.dst.fd), left)
		if err == unix.EAGAIN {
			w.dst.writable = false
			break
		}
		if err != nil || m == 0 {
			pipes.discard(pp) // bytes are stuck in it
			r.destinationLost(w)
			return
		}
		left -= m
		r.count(w, m)
	}
	if left > 0 && w.takeOut(pp, left) != nil {
		pipes.discard(pp)
		r.destinationLost(w)
		return
	}
	pipes.put(pp)
	w.adapt(n, left)
}

// takeOut moves what is left in the pipe to memory.
func (w *loopedWay) takeOut(pp *pipe, left int) error {
	b := w.leave(left)
	for got := 0; got < left; {
		n, err := raw.Read(pp.r, b[got:])
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		got += n
	}
	return nil
}

// adapt learns from a splice of n bytes of which so many were left; see
// pump.adapt.
func (w *loopedWay) adapt(n, left int) {
	if left > 0 {
		w.most = max(smallSplice, int32(n-left))
	} else {
		w.most = min(spliceMax, w.most+w.most/8)
	}
	if n >= smallSplice {
		w.small = 0
	} else if w.small++; w.small >= smallAfter {
		w.bulk, w.full, w.small = false, 0, 0
	}
}
