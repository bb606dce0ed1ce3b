package relay

import (
	"errors"
	"io"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
)

// Pair relays in two goroutines, one each way. It takes any two connections, and
// leaves them for the caller to close.
type Pair struct {
	verdict
	client, backend side
	up, down        direction // client to backend, and back
	onPanic         func(value any, stack []byte)
	err             atomic.Pointer[error] // nil: the verdict says it all

	running atomic.Int32 // directions that have not ended, and others that joined
	ended   func()       // called by the last one
	severed atomic.Bool  // both sides are to be reset
	awaits  *delivery    // guarded by deliveries

	// One timer looks now and then whether bytes have moved, so that moving them
	// costs no look at the clock.
	idleTimeout time.Duration // 0 = never
	endsAt      time.Time     // at the latest; zero = never
	timerMu     sync.Mutex
	timer       *time.Timer // guarded by timerMu, as idle
	idle        idleTime
	keepsAlive  bool // for the timer's function only
}

var _ Relay = (*Pair)(nil)

// direction is one of the two ways.
type direction struct {
	relay    *Pair
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

// New prepares a relay between two connections. Idle time and lifetime begin here.
func New(client, backend net.Conn, o Options) *Pair {
	now := time.Now()
	r := &Pair{onPanic: o.OnPanic, idleTimeout: o.IdleTimeout, idle: idleTime{since: now}}
	if o.Lifetime > 0 {
		r.endsAt = now.Add(o.Lifetime)
	}
	r.running.Store(2)
	r.client.init(client, ClientClosed, ClientReset, ClientError)
	r.backend.init(backend, BackendClosed, BackendReset, Error)
	r.up = direction{relay: r, src: &r.client, dst: &r.backend, first: o.First, total: o.Up}
	r.down = direction{relay: r, src: &r.backend, dst: &r.client, total: o.Down}
	return r
}

// Start relays in two goroutines. The last of them calls ended, which may close
// the connections.
func (r *Pair) Start(ended func()) {
	r.begin(ended)
	go r.up.run()   // ends with the connections
	go r.down.run() // likewise
}

// Run relays until both ways have ended and returns why.
func (r *Pair) Run() Reason {
	done := make(chan struct{})
	r.begin(func() { close(done) })
	go r.down.run()
	r.up.run()
	<-done
	return r.Reason()
}

func (r *Pair) begin(ended func()) {
	r.ended = ended
	r.timerMu.Lock()
	r.timer = time.AfterFunc(r.untilLook(), r.onTimer)
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
func (r *Pair) join() bool {
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
func (r *Pair) leave() {
	if r.running.Add(-1) == 0 {
		go r.end() // ends with what ended does
	}
}

// end is the last act, when nothing uses the connections any more.
func (r *Pair) end() {
	r.timerMu.Lock()
	r.timer.Stop()
	r.timerMu.Unlock()
	if r.severed.Load() {
		r.client.close()
		r.backend.close()
	}
	r.ended()
}

// runDirection moves one way's bytes and passes its end on. A panic ends the
// connection, not the process.
func (r *Pair) runDirection(d *direction) {
	defer func() {
		if v := recover(); v != nil {
			r.onPanic(v, debug.Stack())
			r.Cut(Error)
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
	if p := d.src.patient; p != nil && p.Complete() {
		return false
	}
	return !d.dst.finished.Load() && wasReset(d.src.base) && !d.dst.finished.Load()
}

// sourceLost passes a reset of the source on, once the destination has all that
// was sent before.
func (d *direction) sourceLost(err error) {
	d.src.lost.Store(true)
	if err != nil && !IsReset(err) && !secure.IsAlert(err) {
		d.relay.fail(d.src.failed, bare(err))
	} else {
		d.relay.conclude(d.src.reset)
	}
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
	if errors.Is(err, net.ErrClosed) { // by whoever has it, too
		d.relay.fail(d.dst.failed, bare(err))
	} else {
		d.relay.conclude(d.dst.reset)
	}
	deliveries.add(d.relay, d.src, false)
}

// severDelivered resets both sides as soon as s has acknowledged all that was
// written to it.
func (r *Pair) severDelivered(s *side) {
	if s.lost.Load() || unsent(s.base) == 0 {
		r.sever()
		return
	}
	deliveries.add(r, s, true)
}

// IsReset reports whether err is the peer's reset of an open connection, or its loss.
func IsReset(err error) bool {
	for _, e := range resetErrnos {
		if errors.Is(err, e) {
			return true
		}
	}
	return errors.Is(err, io.ErrUnexpectedEOF) // TLS that ends within a record
}

// Cut ends the connection at once, whatever either side does or doesn't, and
// never waits for that. Both sides see a reset: the stream was not complete.
func (r *Pair) Cut(why Reason) {
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
func (r *Pair) sever() {
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

func (r *Pair) closeBoth() {
	defer r.leave()
	r.backend.close() // no code of others, so it goes first
	r.client.expire()
	r.client.close()
}

// untilLook is when the timer has to look again.
func (r *Pair) untilLook() time.Duration {
	d := period(r.idleTimeout)
	if !r.endsAt.IsZero() {
		d = min(d, max(0, time.Until(r.endsAt)))
	}
	return d
}

// onTimer ends the connection if it was idle for too long, or is too old.
func (r *Pair) onTimer() {
	if idle := r.Idle(); r.idleTimeout > 0 && idle >= r.idleTimeout {
		r.Cut(IdleTimeout)
		return
	}
	if !r.endsAt.IsZero() && !time.Now().Before(r.endsAt) {
		r.Cut(LifetimeOver)
		return
	}
	if c, ok := r.backend.base.(*net.TCPConn); ok && !r.keepsAlive {
		_ = c.SetKeepAliveConfig(KeepAlive) // fails if it is closed by now
	}
	r.keepsAlive = true
	for _, s := range []*side{&r.client, &r.backend} {
		if s.patient != nil {
			s.patient.Shed()
		}
	}
	r.findReset(&r.client, &r.backend)
	r.findReset(&r.backend, &r.client)
	r.timerMu.Lock()
	defer r.timerMu.Unlock()
	if r.running.Load() > 0 {
		r.timer.Reset(r.untilLook())
	}
}

// Err is a part of Relay.
func (r *Pair) Err() error {
	if err := r.err.Load(); err != nil {
		return *err
	}
	return nil
}

// fail concludes for the reason, which err explains.
func (r *Pair) fail(why Reason, err error) {
	if r.conclude(why) {
		r.err.Store(&err)
	}
}

// Moved returns how many bytes were delivered so far.
func (r *Pair) Moved() (up, down uint64) { return r.up.moved.Load(), r.down.moved.Load() }

// Idle returns how long no byte has moved: at least, and at most by the time
// between two looks more than that, which is an eighth of the idle timeout, up to
// 15 s. A call is a look, too.
func (r *Pair) Idle() time.Duration {
	r.timerMu.Lock()
	defer r.timerMu.Unlock()
	return r.idle.look(r.up.moved.Load()+r.down.moved.Load(), time.Now())
}

// findReset looks for a reset of s that nobody else would find: the direction
// that reads from it waits for room at the other side, and the one that writes
// to it has nothing to write.
func (r *Pair) findReset(s, other *side) {
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

// moveOnce reads once and writes what came. It waits with a buffer in hand, unless
// the source can do better.
func (d *direction) moveOnce() error {
	read := d.src.conn.Read
	if p := d.src.patient; p != nil {
		if err := p.Await(); err != nil {
			return sourceError(err)
		}
		read = p.ReadReady
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	n, err := read(buf[:])
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

// bare returns the error without its side.
func bare(err error) error {
	if e, ok := err.(*sidedError); ok {
		return e.err
	}
	return err
}

func sourceError(err error) error      { return &sidedError{errSource, err} }
func destinationError(err error) error { return &sidedError{errDestination, err} }
