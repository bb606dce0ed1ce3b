package tcplb

import (
	"errors"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// relay moves bytes both ways between two connections until both ways have
// ended. It knows nothing of backends and configs.
//
// An end of file on one side becomes a half-close on the other, and the other
// way goes on. A reset becomes a reset, after what was read before it has been
// delivered, so that nobody takes a cut stream for a complete one.
type relay struct {
	client, backend side
	up, down        direction // client to backend, and back
	onPanic         func(value any, stack []byte)

	why     atomic.Uint32 // reason; see conclude
	running atomic.Int32  // directions that have not ended, and others that joined
	ended   func()        // called by the last one
	severed atomic.Bool   // both sides are to be reset
	awaits  *delivery     // guarded by deliveries

	// One timer looks now and then whether bytes have moved, so that moving them
	// costs no look at the clock.
	idleTimeout time.Duration // 0 = never
	timerMu     sync.Mutex
	timer       *time.Timer // guarded by timerMu
	idle        idleTime    // for the timer's function only, as keepsAlive
	keepsAlive  bool
}

// direction is one of the two ways.
type direction struct {
	relay    *relay
	src, dst *side
	first    []byte // was read before the relay began, and goes first

	total *atomic.Uint64 // live count of whoever keeps the books
	moved atomic.Uint64  // this direction's own
	pump  pump           // how bytes are moved from bare socket to bare socket
}

// The errors of a direction say on which side it ended.
var (
	errSource      = errors.New("source")
	errDestination = errors.New("destination")
)

// newRelay prepares a relay. Idle time begins here.
func newRelay(client, backend net.Conn, idleTimeout time.Duration) *relay {
	r := &relay{idleTimeout: idleTimeout, idle: idleTime{since: time.Now()}}
	r.running.Store(2)
	r.client.init(client, reasonClientClosed, reasonClientReset)
	r.backend.init(backend, reasonBackendClosed, reasonBackendReset)
	r.up = direction{relay: r, src: &r.client, dst: &r.backend}
	r.down = direction{relay: r, src: &r.backend, dst: &r.client}
	return r
}

// start relays in two goroutines. The last of them calls ended, which may close
// the connections.
func (r *relay) start(ended func()) {
	r.begin(ended)
	go r.up.run()   // ends with the connections
	go r.down.run() // likewise
}

// run relays until both ways have ended and returns why. The connections are
// left for the caller to close.
func (r *relay) run() reason {
	done := make(chan struct{})
	r.begin(func() { close(done) })
	go r.down.run()
	r.up.run()
	<-done
	return r.reason()
}

func (r *relay) begin(ended func()) {
	r.ended = ended
	r.timerMu.Lock()
	r.timer = time.AfterFunc(r.period(), r.onTimer)
	r.timerMu.Unlock()
}

// run is one way's part in the relay.
func (d *direction) run() {
	d.relay.runDirection(d)
	if d.relay.running.Add(-1) == 0 {
		d.relay.end()
	}
}

// join keeps the relay from ending until the caller leaves it. It reports false
// where it has ended.
func (r *relay) join() bool {
	for {
		n := r.running.Load()
		if n == 0 {
			return false
		}
		if r.running.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// leave is for those who joined. They may not be able to wait for the end.
func (r *relay) leave() {
	if r.running.Add(-1) == 0 {
		go r.end() // ends with what ended does
	}
}

// end is the last act, when nothing uses the connections any more.
func (r *relay) end() {
	r.timerMu.Lock()
	r.timer.Stop()
	r.timerMu.Unlock()
	if r.severed.Load() {
		r.client.close()
		r.backend.close()
	}
	r.ended()
}

// reason returns why the relay ended.
func (r *relay) reason() reason { return reason(r.why.Load()) }

// runDirection moves one way's bytes and passes its end on. A panic ends the
// connection, not the process.
func (r *relay) runDirection(d *direction) {
	defer func() {
		if v := recover(); v != nil {
			r.onPanic(v, debug.Stack())
			r.cut(reasonError)
		}
	}()
	err := d.move()
	at := d.src
	if errors.Is(err, errDestination) {
		at = d.dst
	}
	switch {
	case err == nil && !d.src.lost.Load() && !d.srcLost():
		d.src.finished.Store(true)
		r.conclude(d.src.closed)
		// Where the other way has ended before, both are closed right away.
		if !d.dst.finished.Load() {
			d.dst.closeWrite()
		}
	case at.over.Load():
		// Ended from here: cut, or by the other direction.
	case at == d.dst:
		d.destinationLost(err)
	default:
		d.sourceLost(err)
	}
}

// srcLost asks the kernel whether an end of file was really a reset: a failed
// write of the other direction takes the error away from the reader. Once the
// other direction has passed an end of file on to the source, that closes for
// good in order, and there is no telling: so it is asked before and after.
func (d *direction) srcLost() bool {
	return !d.dst.finished.Load() && wasReset(d.src.base) && !d.dst.finished.Load()
}

// sourceLost passes a reset of the source on, once the destination has all that
// was sent before.
func (d *direction) sourceLost(err error) {
	why := d.src.reset
	if err != nil && !isReset(err) {
		why = reasonError
	}
	d.src.lost.Store(true)
	d.relay.conclude(why)
	d.src.sever() // unblocks the other direction if it writes there
	d.relay.severDelivered(d.dst)
}

// destinationLost ends the source, too: what it sends can't be delivered. Where
// the destination still had something to say, that comes first: the direction
// that reads it finds the reset and passes it on, unless the source takes none of it.
func (d *direction) destinationLost(err error) {
	d.dst.lost.Store(true)
	if d.dst.finished.Load() {
		d.relay.severDelivered(d.src)
		return
	}
	why := d.dst.reset
	if errors.Is(err, net.ErrClosed) { // by whoever has it, too
		why = reasonError
	}
	d.relay.conclude(why)
	deliveries.add(d.relay, d.src, false)
}

// severDelivered resets both sides as soon as s has acknowledged all that was
// written to it.
func (r *relay) severDelivered(s *side) {
	if s.lost.Load() || unsent(s.base) == 0 {
		r.sever()
		return
	}
	deliveries.add(r, s, true)
}

// isReset reports whether err is the peer's reset, or its loss.
func isReset(err error) bool {
	return isAny(err, resetErrnos) || errors.Is(err, io.ErrUnexpectedEOF) // TLS that ends within a record
}

// conclude records why the connection ends. The first reason stays, except
// that an orderly close gives way to anything else.
func (r *relay) conclude(why reason) {
	for {
		old := reason(r.why.Load())
		if old != reasonNone && (!old.orderly() || why.orderly()) {
			return
		}
		if r.why.CompareAndSwap(uint32(old), uint32(why)) {
			return
		}
	}
}

// cut ends the connection at once, whatever either side does or doesn't, and
// never waits for that. Both sides see a reset: the stream was not complete.
func (r *relay) cut(why reason) {
	if !r.join() {
		return
	}
	defer r.leave()
	r.conclude(why)
	r.sever()
}

// sever ends both directions, and has both sides reset when they have ended.
// Closing is left to the end: it would wait for a direction that has one side's
// lock while it waits for the other side.
func (r *relay) sever() {
	r.severed.Store(true)
	r.client.sever()
	r.backend.sever()
	deliveries.drop(r)
	// What wraps a socket may be asleep for long, without a lock of ours. The
	// peers must not wait for it.
	if (r.client.raw == nil || r.backend.raw == nil) && r.join() {
		go r.closeBoth() // ends with the calls that the sockets' owners are in
	}
}

func (r *relay) closeBoth() {
	defer r.leave()
	r.backend.close() // no code of others, so it goes first
	r.client.expire()
	r.client.close()
}

// keepAliveAfter is the age at which a connection to a backend begins to be
// probed when it is silent. It takes four system calls, and the kernel would
// not have sent the first probe before.
const keepAliveAfter = 15 * time.Second

// keepAlive is what Go does by default.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: keepAliveAfter, Interval: 15 * time.Second, Count: 9}

// idleTime finds out how long nothing has moved, from looks at a count.
type idleTime struct {
	since time.Time // of the first look that found this count
	count uint64
}

// look returns how long the count has been the same, at least.
func (i *idleTime) look(count uint64, now time.Time) time.Duration {
	if count != i.count {
		*i = idleTime{since: now, count: count}
	}
	return now.Sub(i.since)
}

// period is the time between two looks. An idle connection ends no earlier than
// its timeout after the last byte, and no later than a period after that.
func (r *relay) period() time.Duration {
	if r.idleTimeout == 0 {
		return keepAliveAfter
	}
	return min(keepAliveAfter, max(r.idleTimeout/8, time.Millisecond))
}

// onTimer ends the connection if it was idle for too long.
func (r *relay) onTimer() {
	idle := r.idle.look(r.up.moved.Load()+r.down.moved.Load(), time.Now())
	if r.idleTimeout > 0 && idle >= r.idleTimeout {
		r.cut(reasonIdleTimeout)
		return
	}
	if c, ok := r.backend.base.(*net.TCPConn); ok && !r.keepsAlive {
		_ = c.SetKeepAliveConfig(keepAlive) // fails if it is closed by now
	}
	r.keepsAlive = true
	r.findReset(&r.client, &r.backend)
	r.findReset(&r.backend, &r.client)
	r.timerMu.Lock()
	defer r.timerMu.Unlock()
	if r.running.Load() > 0 {
		r.timer.Reset(r.period())
	}
}

// findReset looks for a reset of s that nobody else would find: the direction
// that reads from it waits for room at the other side, and the one that writes
// to it has nothing to write.
func (r *relay) findReset(s, other *side) {
	if s.finished.Load() || s.lost.Load() || s.over.Load() || !hasFailed(s.base) {
		return
	}
	r.conclude(s.reset)
	deliveries.add(r, other, false)
}

// count keeps the books for n bytes that were delivered.
func (d *direction) count(n int) {
	if n > 0 {
		d.moved.Add(uint64(n))
		d.total.Add(uint64(n))
	}
}

// bufferSize is large enough that system calls don't dominate and small enough
// for a connection whose reader is slow, which holds one.
const bufferSize = 32 << 10

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// move relays until the source ends: nil for an end of file, else an error
// that matches errSource or errDestination.
func (d *direction) move() error {
	if len(d.first) > 0 {
		if err := d.write(d.first); err != nil {
			return err
		}
		d.first = nil
	}
	if d.src.raw != nil && canPump {
		return d.pump.run(d)
	}
	for {
		if err := d.moveOnce(); err != nil {
			if errors.Is(err, io.EOF) && !errors.Is(err, errDestination) {
				return nil
			}
			return err
		}
	}
}

// moveOnce reads once, waiting with a buffer in hand, and writes what came.
func (d *direction) moveOnce() error {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	n, err := d.src.conn.Read(buf[:])
	if n > 0 {
		if werr := d.write(buf[:n]); werr != nil {
			return werr
		}
	}
	if err == io.EOF {
		return io.EOF
	}
	if err != nil {
		return sourceError(err)
	}
	return nil
}

func (d *direction) write(p []byte) error {
	n, err := d.dst.conn.Write(p)
	d.count(n)
	if err != nil {
		return destinationError(err)
	}
	return nil
}

// sidedError is an error of one of the two connections.
type sidedError struct{ side, err error }

func (e *sidedError) Error() string   { return e.side.Error() + ": " + e.err.Error() }
func (e *sidedError) Unwrap() []error { return []error{e.side, e.err} }

func sourceError(err error) error      { return &sidedError{errSource, err} }
func destinationError(err error) error { return &sidedError{errDestination, err} }
