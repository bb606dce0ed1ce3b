package loop

import (
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// linger is how long a loop without users goes on, so that one connection
	// after another does not begin and end it each time.
	linger = 100 * time.Millisecond
	// batchSize is how many events are taken at once.
	batchSize = 256
	// yieldAfter is how many rounds in a row a loop that is never idle goes on
	// before it lets goroutines run that wait for its processor.
	yieldAfter = 16
	// atOnce is how many posts, and how many timers, have their turn in a round: those
	// of thousands that are cut, or whose time has come, must not hold up the others.
	atOnce = 64
	// A loop that had no more than quietRounds in quietFor or longer gives its processor
	// up before it sleeps. A busy one is woken before anybody could use that.
	quietFor    = 10 * time.Millisecond
	quietRounds = 40
	// mostLoops is how many there are at most, whose files are of a reserve: each
	// relays what a processor can.
	mostLoops = 8
	// sharedFor is how long a loop is shared after a handler was brief: bulk beside
	// fewer than some hundred messages a second is moved as if there were none.
	sharedFor = 2 * time.Millisecond
	// BufferSize is the size of a loop's buffer.
	BufferSize = 32 << 10
	// wakeKey marks the events of a loop's own descriptor.
	wakeKey = -1
)

// Loop calls its handlers in one goroutine. Methods are for the handlers, while
// they are called, unless they say otherwise.
type Loop struct {
	load atomic.Int64 // users, for those who choose a loop

	mu      sync.Mutex
	running bool     // guarded by mu, as the next two
	users   int      // from Acquire to Leave
	posts   []posted // not taken yet
	// Who posts wakes a loop that is asleep: posting stores waits, then looks at
	// asleep; the loop does it the other way around.
	waits, asleep atomic.Bool
	epoll, wake   int // descriptors

	clock   time.Time // what Now counts from
	now     int64
	table   table
	wheel   wheel
	late    bool  // there are timers whose time has come
	rounds  int   // since looked
	looked  int64 // a time of now
	quiet   bool  // it had few rounds before that
	alone   bool  // there is one processor for all goroutines
	brief   int64 // see Brief
	turns   []Ref // in order
	after   []func()
	current Handler // is being called
	buffer  [BufferSize]byte

	// The round that is going on, kept here so that a panic doesn't end it.
	events  [batchSize]unix.EpollEvent
	n, at   int
	batch   []posted
	batchAt int
	toTurn  int
}

type posted struct {
	handler Handler
	what    uint32
}

var loops struct {
	once sync.Once
	most atomic.Int64 // 0 = as many as are of use
	all  []*Loop
}

// Limit sets how many loops there may be, each of two files: one at least. It is
// called before the first Acquire.
func Limit(most int) { loops.most.Store(int64(max(1, most))) }

// Acquire returns the loop with the fewest users, which runs and goes on until
// Leave is called. It may be called by anybody. It fails where the process has no files to spare.
func Acquire() (*Loop, error) {
	loops.once.Do(func() {
		n := min(max(1, runtime.GOMAXPROCS(0)/2), mostLoops)
		if most := int(loops.most.Load()); most > 0 {
			n = min(n, most)
		}
		for range n {
			loops.all = append(loops.all, new(Loop))
		}
	})
	l := fewest(loops.all)
	return l, l.acquire()
}

// fewest returns the loop with the fewest users. Taking turns would not do: a
// connection may use a loop once to connect, and again to be relayed.
func fewest(all []*Loop) *Loop {
	least := all[0]
	for _, l := range all[1:] {
		if l.load.Load() < least.load.Load() {
			least = l
		}
	}
	return least
}

func (l *Loop) acquire() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.running {
		if err := l.open(); err != nil {
			return err
		}
		l.running = true
		go l.run() // ends when it has no users
	}
	l.users++
	l.load.Add(1)
	return nil
}

// Leave takes one user away. It may be called by anybody.
func (l *Loop) Leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.load.Add(-1)
	if l.users--; l.users == 0 {
		l.wakeLocked()
	}
}

// Post has h.Posted called. It may be called by anybody, at any time, and never
// waits. A loop without users drops it.
func (l *Loop) Post(h Handler, what uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.running {
		return
	}
	l.posts = append(l.posts, posted{h, what})
	l.waits.Store(true)
	l.wakeLocked()
}

func (l *Loop) wakeLocked() {
	if l.asleep.Load() && l.asleep.CompareAndSwap(true, false) {
		one := uint64(1)
		_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(l.wake), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
	}
}

// open makes what a run of the loop needs.
func (l *Loop) open() (err error) {
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		// Each write is an edge, so that nobody has to read.
		err = unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, l.wake, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: wakeKey})
		if err != nil {
			_ = unix.Close(l.wake)
		}
	}
	if err != nil {
		_ = unix.Close(l.epoll)
		return err
	}
	if l.clock.IsZero() {
		l.clock = time.Now()
	}
	return nil
}

// run is the loop.
func (l *Loop) run() {
	l.alone = runtime.GOMAXPROCS(0) == 1
	for busy := 0; ; {
		n, slept := l.wait()
		if n < 0 {
			return
		}
		l.now = int64(time.Since(l.clock))
		l.n, l.at, l.toTurn = n, 0, len(l.turns)
		for !l.round() {
		}
		l.handOver()
		l.rounds++
		if busy++; slept {
			busy = 0
		} else if busy%yieldAfter == 0 {
			runtime.Gosched()
		}
	}
}

// wait returns how many events there are, at once if there is anything to do,
// and whether it may have been asleep. After the last user has left it ends the
// loop, and returns -1.
func (l *Loop) wait() (n int, slept bool) {
	if n = l.poll(); n > 0 || len(l.turns) > 0 || l.waits.Load() || l.batchAt < len(l.batch) || l.late {
		return n, false
	}
	timeout := l.wheel.next(l.now)
	l.asleep.Store(true) // before the looks: who changes anything looks the other way around
	idle := l.idle()
	if idle {
		timeout = linger
	}
	if !l.waits.Load() {
		n = l.sleep(timeout)
	}
	l.asleep.Store(false)
	if n == 0 && idle && l.end() {
		return -1, true
	}
	return n, true
}

// poll takes what events there are. It doesn't tell Go's scheduler of the call,
// which would take it for one that may last.
func (l *Loop) poll() int {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), uintptr(unsafe.Pointer(&l.events)), batchSize, 0, 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// sleep waits for events; a negative timeout is none.
func (l *Loop) sleep(timeout time.Duration) int {
	ms := -1
	if timeout >= 0 {
		ms = int((timeout + time.Millisecond - 1) / time.Millisecond)
	}
	if l.alone || l.isQuiet() {
		return epollRest(l.epoll, &l.events, ms)
	}
	return epollWait(l.epoll, &l.events, ms)
}

func epollWait(epoll int, events *[batchSize]unix.EpollEvent, ms int) int {
	n, err := unix.EpollWait(epoll, events[:], ms)
	if err != nil { // interrupted
		return 0
	}
	return n
}

// isQuiet is asked before each sleep.
func (l *Loop) isQuiet() bool {
	if l.now-l.looked > int64(quietFor) {
		l.quiet = l.rounds <= quietRounds
		l.rounds, l.looked = 0, l.now
	}
	return l.quiet
}

func (l *Loop) idle() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.users == 0
}

// end ends the loop unless somebody has begun to use it.
func (l *Loop) end() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users > 0 || int64(time.Since(l.clock))-l.now < int64(linger) { // the sleep may have been interrupted
		return false
	}
	l.running = false
	l.posts = nil
	l.waits.Store(false)
	l.table, l.batch, l.batchAt, l.turns, l.after = table{}, nil, 0, nil, nil
	_ = unix.Close(l.wake)
	_ = unix.Close(l.epoll)
	return true
}

// round calls the handlers of all there is to do. It returns false after a
// panic, to be called again for the rest.
func (l *Loop) round() (done bool) {
	defer l.contain()
	for l.at < l.n {
		e := &l.events[l.at]
		l.at++
		if e.Fd == wakeKey {
			continue
		}
		if h := l.table.find(Ref{index: uint32(e.Fd) >> 1, generation: uint32(e.Pad)}); h != nil {
			l.current = h
			h.Ready(uint32(e.Fd)&1, e.Events)
		}
	}
	l.takePosts()
	l.takeTimers()
	l.takeTurns()
	l.current = nil
	return true
}

func (l *Loop) takePosts() {
	if l.batchAt == len(l.batch) {
		if !l.waits.Load() {
			return
		}
		clear(l.batch)
		l.mu.Lock()
		l.batch, l.posts = l.posts, l.batch[:0]
		l.waits.Store(false)
		l.mu.Unlock()
		l.batchAt = 0
	}
	for n := 0; n < atOnce && l.batchAt < len(l.batch); n++ {
		p := l.batch[l.batchAt]
		l.batchAt++
		l.current = p.handler
		p.handler.Posted(p.what)
	}
}

func (l *Loop) takeTimers() {
	l.late = true
	for range atOnce {
		h := l.wheel.expire(&l.table, l.now)
		if l.late = h != nil; !l.late {
			return
		}
		l.current = h
		h.Expired()
	}
}

// takeTurns gives a turn to one that waited for it when the round began: between
// two turns there is a look at what else has happened.
func (l *Loop) takeTurns() {
	for l.toTurn > 0 {
		l.toTurn--
		ref := l.turns[0]
		l.turns = l.turns[:copy(l.turns, l.turns[1:])]
		if h := l.table.find(ref); h != nil {
			l.toTurn = 0
			l.current = h
			h.Turn()
		}
	}
}

// contain lets who panicked clear up.
func (l *Loop) contain() {
	if v := recover(); v != nil {
		h := l.current
		if h == nil { // no handler: the loop itself is wrong
			panic(v)
		}
		l.current = nil
		h.Panicked(v, debug.Stack())
	}
}

// handOver has a goroutine do what may take longer.
func (l *Loop) handOver() {
	if len(l.after) == 0 {
		return
	}
	go callAll(l.after) // ends with what it calls
	l.after = nil
}

func callAll(list []func()) {
	for _, f := range list {
		f()
	}
}

// After has f called in another goroutine, behind what After was called with
// before in the same round. It must not wait for a loop.
func (l *Loop) After(f func()) { l.after = append(l.after, f) }

// Again asks for a turn, once the others that ask for one have had it.
func (l *Loop) Again(ref Ref) { l.turns = append(l.turns, ref) }

// Now is a clock, read once a round. It never goes back.
func (l *Loop) Now() int64 { return l.now }

// Brief is for a handler that has little to do now, and wants that soon again.
func (l *Loop) Brief() { l.brief = l.now }

// Shared reports whether there are such handlers just now: who has much to do does
// less at once.
func (l *Loop) Shared() bool { return l.brief > 0 && l.now-l.brief < int64(sharedFor) }

// Clock is the same clock, read now. It may be called by anybody, after Acquire.
func (l *Loop) Clock() int64 { return int64(time.Since(l.clock)) }

// Buffer is for the call that asks for it only.
func (l *Loop) Buffer() []byte { return l.buffer[:] }

// Register enters a handler.
func (l *Loop) Register(h Handler) Ref { return l.table.add(h) }

// Release takes a handler out, with its timer, its turns and what is yet to be
// told of its sockets. Closing them is the handler's business.
func (l *Loop) Release(ref Ref) {
	if l.table.find(ref) != nil {
		l.wheel.stop(&l.table, ref.index)
		l.table.remove(ref)
	}
}

// Add has the handler told of all that changes at the socket, until it is closed.
// What holds already is told, too. The tag is 0 or 1.
func (l *Loop) Add(fd int, ref Ref, tag uint32) error {
	return unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET,
		Fd:     int32(ref.index<<1 | tag),
		Pad:    int32(ref.generation),
	})
}

// Remove takes a socket out that stays open.
func (l *Loop) Remove(fd int) { _ = unix.EpollCtl(l.epoll, unix.EPOLL_CTL_DEL, fd, nil) }

// SetTimer sets the handler's timer to a time of Now's, in place of the one
// before. It comes up to a tick late.
func (l *Loop) SetTimer(ref Ref, at int64) {
	if l.table.find(ref) != nil {
		l.wheel.stop(&l.table, ref.index)
		l.wheel.set(&l.table, ref.index, at, l.now)
	}
}

// StopTimer stops it.
func (l *Loop) StopTimer(ref Ref) {
	if l.table.find(ref) != nil {
		l.wheel.stop(&l.table, ref.index)
	}
}
