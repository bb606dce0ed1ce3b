package relay

import (
	"errors"
	"math"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/loop"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/raw"
	"golang.org/x/sys/unix"
)

// Looped relays between two bare sockets on an event loop. It has no goroutine,
// no timer of its own and, unless a receiver is slow, no buffer.
//
// Fields without atomics are the loop's, once it has started.
type Looped struct {
	verdict
	state    atomic.Uint32 // started, cutting, gone
	loop     *loop.Loop
	ref      loop.Ref
	up, down loopedWay // client to backend, and back

	idleTimeout time.Duration // 0 = never
	lifetime    time.Duration // likewise
	onPanic     func(value any, stack []byte)
	ended       func()
	delivery    *loopedDelivery // nil: none is awaited

	registered bool
	moving     bool // has asked for a turn
	over       bool // both sockets are closed
	keepsAlive bool
	errno      uint32       // what went wrong; 0: the verdict says it all
	began      int64        // by the loop's clock
	lastMoved  atomic.Int64 // likewise
}

// Bits of a Looped's state.
const (
	started = 1 << iota
	cutting
	gone
)

func (r *Looped) is(state uint32) bool { return r.state.Load()&state != 0 }

var _ Relay = (*Looped)(nil)

// loopedSide is one of the two sockets.
type loopedSide struct {
	fd       int32
	writable bool // as far as is known
	ending   bool // its end, or a failure, is there or behind what is to be read
	failed   bool // it has an error, or had one
	finished bool // it closed its sending way in order
	lost     bool // it reset the connection, or is unreachable
	shut     bool // an end of file was passed on to it

	closed, reset Reason // how it is called when this side does it
}

// loopedDelivery is the wait until one side has what was sent to it.
type loopedDelivery struct {
	to                *loopedSide
	last              bool // all has been written
	began, progressed int64
	pause             int64 // until the next look
	left              int
	moved             uint64
}

// What is posted.
const (
	postedStart = iota
	postedCut
)

// NewLooped prepares a relay between two sockets that don't block and are in no
// poller; the backend's may be a Unix socket. They belong to the relay from here
// on: it closes both before it has ended called, which may take its time. It has
// to be started, also if it was cut. After an error, which comes where the process
// has no files to spare for a loop, they are the caller's.
func NewLooped(client, backend int, o Options) (*Looped, error) {
	l, err := loop.Acquire()
	if err != nil {
		return nil, err
	}
	return NewLoopedOn(l, client, backend, o), nil
}

// NewLoopedOn does the same on a loop that was acquired, which the relay leaves
// at its end.
func NewLoopedOn(l *loop.Loop, client, backend int, o Options) *Looped {
	r := &Looped{
		loop:        l,
		idleTimeout: o.IdleTimeout,
		lifetime:    o.Lifetime,
		onPanic:     o.OnPanic,
		began:       l.Clock(),
	}
	r.up = loopedWay{dst: &r.down.src, total: o.Up}
	r.up.src = loopedSide{fd: int32(client), closed: ClientClosed, reset: ClientReset}
	r.down = loopedWay{dst: &r.up.src, total: o.Down}
	r.down.src = loopedSide{fd: int32(backend), closed: BackendClosed, reset: BackendReset}
	if len(o.First) > 0 {
		r.up.left = &leftover{bytes: o.First}
	}
	r.lastMoved.Store(r.began)
	return r
}

// Start relays without the caller. What ended does happens in a goroutine of its
// own.
func (r *Looped) Start(ended func()) {
	r.ended = ended
	r.state.Or(started)
	r.loop.Post(r, postedStart)
}

// Cut is a part of Relay.
func (r *Looped) Cut(why Reason) {
	if r.is(gone) {
		return
	}
	r.conclude(why)
	r.state.Or(cutting) // before the look: who starts it looks the other way around
	if r.is(started) {
		r.loop.Post(r, postedCut)
	}
}

// Moved is a part of Relay.
func (r *Looped) Moved() (up, down uint64) { return r.up.moved.Load(), r.down.moved.Load() }

// Err is a part of Relay.
func (r *Looped) Err() error {
	if !r.is(gone) || r.errno == 0 {
		return nil
	}
	return unix.Errno(r.errno)
}

// fail concludes for the reason, which err explains.
func (r *Looped) fail(why Reason, err error) {
	if errno := unix.Errno(0); r.conclude(why) && errors.As(err, &errno) {
		r.errno = uint32(errno)
	}
}

// Idle returns how long no byte has moved, exact to a round of the loop.
func (r *Looped) Idle() time.Duration {
	return max(0, time.Duration(r.loop.Clock()-r.lastMoved.Load()))
}

// Posted is a part of loop.Handler.
func (r *Looped) Posted(what uint32) {
	if what == postedStart {
		r.ref, r.registered = r.loop.Register(r), true
	}
	if r.over || !r.registered { // the start, which comes yet, finds the cut
		return
	}
	if r.is(cutting) {
		r.sever()
		return
	}
	for tag, s := range []*loopedSide{&r.up.src, &r.down.src} {
		if err := r.loop.Add(int(s.fd), r.ref, uint32(tag)); err != nil { // somebody closed it, or there is no memory
			r.fail(Error, err)
			r.sever()
			return
		}
	}
	r.setTimer()
}

// Ready is a part of loop.Handler.
func (r *Looped) Ready(tag, events uint32) {
	w := &r.up
	if tag == 1 {
		w = &r.down
	}
	s := &w.src
	const end = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	s.writable = s.writable || events&(unix.EPOLLOUT|unix.EPOLLERR) != 0
	w.readable = w.readable || events&(unix.EPOLLIN|end) != 0
	s.ending = s.ending || events&end != 0
	s.failed = s.failed || events&unix.EPOLLERR != 0
	if events&unix.EPOLLPRI != 0 {
		w.foundUrgent()
	}
	if r.up.bulk || r.down.bulk {
		r.again() // those who have little to move come first
		return
	}
	r.loop.Brief()
	r.move()
}

// Turn is a part of loop.Handler.
func (r *Looped) Turn() {
	r.moving = false
	r.move()
}

func (r *Looped) again() {
	if !r.moving {
		r.moving = true
		r.loop.Again(r.ref)
	}
}

// move moves what can be moved now, up to a bound.
func (r *Looped) move() {
	more := r.pump(&r.up)
	more = r.pump(&r.down) || more
	r.findReset(&r.up.src, &r.up, &r.down)
	r.findReset(&r.down.src, &r.down, &r.up)
	switch {
	case r.over:
	case r.up.done && r.down.done:
		if r.delivery == nil {
			r.finish()
		}
	case more:
		r.again()
	}
}

// findReset looks for a failure of s that no call has met with: nobody reads from
// it, as its receiver takes nothing or it has sent its end before, and nobody
// writes to it.
func (r *Looped) findReset(s *loopedSide, from, to *loopedWay) {
	switch {
	case !s.failed || s.lost || r.over:
	case r.delivery != nil && r.delivery.to == s && from.done:
		r.sever() // it takes nothing any more
	case s.finished:
		r.destinationLost(to)
	case !from.done && !from.dst.writable:
		r.conclude(s.reset)
		r.deliver(from.dst, false)
	}
}

// sourceEnded passes the end of file of a way's source on, unless that was a reset
// whose error a write has taken.
func (r *Looped) sourceEnded(w *loopedWay) {
	if w.src.lost || w.src.failed && !w.src.shut {
		r.sourceLost(w, nil)
		return
	}
	w.done = true
	w.src.finished = true
	r.conclude(w.src.closed)
	// Where the other way has ended before, both are closed right away.
	if !w.dst.finished && !w.dst.lost {
		w.dst.shut = true
		_ = raw.Shutdown(int(w.dst.fd), unix.SHUT_WR)
	}
}

// sourceLost passes a reset of the source on, once the destination has all that
// was sent before.
func (r *Looped) sourceLost(w *loopedWay, err error) {
	w.src.lost = true
	switch {
	case err == nil || IsReset(err):
		r.conclude(w.src.reset)
	case w == &r.up:
		r.fail(ClientError, err)
	default:
		r.fail(Error, err)
	}
	r.up.end()
	r.down.end()
	r.severDelivered(w.dst)
}

// destinationLost ends a way whose destination takes nothing any more. Where that
// still had something to say, it comes first: the other way finds the reset
// and passes it on, unless the source takes none of it.
func (r *Looped) destinationLost(w *loopedWay) {
	w.end()
	w.dst.lost = true
	if w.dst.finished {
		r.severDelivered(&w.src)
		return
	}
	r.conclude(w.dst.reset)
	back := r.back(w)
	back.readable, back.src.ending = true, true
	r.deliver(&w.src, false)
	r.again()
}

func (r *Looped) back(w *loopedWay) *loopedWay {
	if w == &r.up {
		return &r.down
	}
	return &r.up
}

// severDelivered resets both sides as soon as s has acknowledged all that was
// written to it.
func (r *Looped) severDelivered(s *loopedSide) {
	if s.lost || unsentOf(int(s.fd)) == 0 {
		r.sever()
		return
	}
	r.deliver(s, true)
}

// deliver has both sides reset when to has acknowledged everything, if it is the
// last that was written, or stops taking it.
func (r *Looped) deliver(to *loopedSide, last bool) {
	if r.over {
		return
	}
	if d := r.delivery; d != nil {
		d.to, d.last = to, d.last || last
		return
	}
	now := r.loop.Now()
	r.delivery = &loopedDelivery{to: to, last: last, began: now, progressed: now, pause: int64(deliveryTick)}
	r.setTimer()
}

// mostDeliveryPause is how far apart looks at a delivery get that takes long.
const mostDeliveryPause = int64(250 * time.Millisecond)

func (r *Looped) lookAtDelivery() {
	if r.delivery.done(r, r.loop.Now()) {
		r.sever()
		return
	}
	r.delivery.pause = min(2*r.delivery.pause, mostDeliveryPause)
	r.setTimer()
}

func (d *loopedDelivery) done(r *Looped, now int64) bool {
	last := d.last || r.up.done && r.down.done
	left, moved := unsentOf(int(d.to.fd)), r.up.moved.Load()+r.down.moved.Load()
	if left != d.left || moved != d.moved {
		d.left, d.moved, d.progressed = left, moved, now
	}
	return last && left == 0 || now-d.progressed >= int64(deliveryPatience) || now-d.began >= int64(deliveryLimit)
}

// setTimer sets it for what comes next: a look at a delivery, the keepalive, or the
// end of an idle connection, or of an old one.
func (r *Looped) setTimer() {
	if r.delivery != nil {
		r.loop.SetTimer(r.ref, r.loop.Now()+r.delivery.pause)
		return
	}
	at := int64(math.MaxInt64)
	if r.idleTimeout > 0 {
		at = r.lastMoved.Load() + int64(r.idleTimeout)
	}
	if r.lifetime > 0 {
		at = min(at, r.began+int64(r.lifetime))
	}
	if !r.keepsAlive {
		at = min(at, r.began+int64(keepAliveAfter))
	}
	if at < math.MaxInt64 {
		r.loop.SetTimer(r.ref, at)
	}
}

// Expired is a part of loop.Handler.
func (r *Looped) Expired() {
	now := r.loop.Now()
	switch {
	case r.delivery != nil:
		r.lookAtDelivery()
		return
	case r.idleTimeout > 0 && now-r.lastMoved.Load() >= int64(r.idleTimeout):
		r.conclude(IdleTimeout)
		r.sever()
		return
	case r.lifetime > 0 && now-r.began >= int64(r.lifetime):
		r.conclude(LifetimeOver)
		r.sever()
		return
	case !r.keepsAlive && now-r.began >= int64(keepAliveAfter):
		r.keepsAlive = true
		keepAliveOn(int(r.down.src.fd))
	}
	r.setTimer()
}

// keepAliveOn does what it can, which is nothing on a Unix socket.
func keepAliveOn(fd int) {
	for _, o := range [...]struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(KeepAlive.Idle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(KeepAlive.Interval / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, KeepAlive.Count},
	} {
		_ = unix.SetsockoptInt(fd, o.level, o.name, o.value)
	}
}

// Panicked is a part of loop.Handler.
func (r *Looped) Panicked(value any, stack []byte) {
	r.loop.After(func() { r.onPanic(value, stack) })
	r.conclude(Error)
	r.sever()
}

// sever resets both sides, where there is such a thing.
func (r *Looped) sever() {
	if r.over {
		return
	}
	for _, s := range []*loopedSide{&r.up.src, &r.down.src} {
		_ = unix.SetsockoptLinger(int(s.fd), unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	r.finish()
}

// finish is the end.
func (r *Looped) finish() {
	r.over = true
	r.up.end()
	r.down.end()
	r.delivery = nil
	r.loop.Release(r.ref)
	_ = raw.Close(int(r.down.src.fd))
	_ = raw.Close(int(r.up.src.fd))
	r.state.Or(gone)
	r.loop.After(r.ended)
	r.loop.Leave()
}

// unsentOf is unsent of a descriptor.
func unsentOf(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
	if err != nil {
		return 0
	}
	return n
}
