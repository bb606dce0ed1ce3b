package relay

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func init() { kinds = append(kinds, onLoop) }

// onLoop relays on a loop.
var onLoop = kind{name: "looped", looped: func(t testing.TB, client, backend net.Conn, o Options) Relay {
	r, err := NewLooped(detach(t, client), detach(t, backend), o)
	require.NoError(t, err)
	return r
}}

// detach returns the connection's socket, which is in no poller any more.
func detach(t testing.TB, c net.Conn) (fd int) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	require.NoError(t, cerr)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	return fd
}

// loopedPair is a relay between two sockets of a test, of whose end the channel
// tells.
func loopedBetween(t testing.TB, client, backend net.Conn, o Options) (r *Looped, why chan Reason) {
	t.Helper()
	var count atomic.Uint64
	if o.Up == nil {
		o.Up, o.Down = &count, &count
	}
	r = onLoop.looped(t, client, backend, o).(*Looped)
	why = make(chan Reason, 1)
	r.Start(func() { why <- r.Reason() })
	t.Cleanup(func() { r.Cut(Error) })
	return r, why
}

// on calls f on the relay's loop.
func (r *Looped) on(t testing.TB, f func()) {
	t.Helper()
	done := make(chan struct{})
	r.loop.Post(call(func() { defer close(done); f() }), 0)
	within(t, func() { <-done }, "the loop hangs")
}

// call is a handler that is posted.
type call func()

func (f call) Posted(uint32)          { f() }
func (call) Ready(uint32, uint32)     {}
func (call) Turn()                    {}
func (call) Expired()                 {}
func (call) Panicked(v any, _ []byte) { panic(v) }

func TestLoopedFirstBytes(t *testing.T) {
	for name, size := range map[string]int{"few": 5, "more than the socket takes": 32 << 20} {
		t.Run(name, func(t *testing.T) {
			client, nearClient := tcpPair(t)
			defer client.Close()
			backend, nearBackend := tcpPair(t)
			defer backend.Close()
			first := make([]byte, size)
			fill(first)
			var up, down atomic.Uint64
			_, why := loopedBetween(t, nearClient, nearBackend, Options{First: first, Up: &up, Down: &down})
			write(t, client, "behind them")
			require.NoError(t, client.CloseWrite())
			got, err := io.ReadAll(backend)
			require.NoError(t, err)
			require.True(t, bytes.Equal(append(first, "behind them"...), got))
			require.NoError(t, backend.Close())
			require.Equal(t, ClientClosed, <-why)
			require.EqualValues(t, len(got), up.Load())
		})
	}
}

func TestLoopedUnixBackend(t *testing.T) {
	client, nearClient := tcpPair(t)
	defer client.Close()
	backend, nearBackend := unixPair(t)
	r, why := loopedBetween(t, nearClient, nearBackend, Options{})
	r.on(t, func() { r.began -= 2 * int64(keepAliveAfter); r.Expired() }) // which has no keepalive
	data := make([]byte, 20<<20)
	fill(data)
	for _, way := range [][2]net.Conn{{client, backend}, {backend, client}} {
		from, to := way[0], way[1]
		go func() {
			_, _ = from.Write(data)
			_ = from.(writeCloser).CloseWrite()
		}()
		got, err := io.ReadAll(to)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
	}
	require.Equal(t, ClientClosed, <-why)
}

func TestLoopedPassesAUnixResetOn(t *testing.T) {
	client, nearClient := tcpPair(t)
	defer client.Close()
	backend, nearBackend := unixPair(t)
	r, why := loopedBetween(t, nearClient, nearBackend, Options{})
	write(t, client, "nobody reads this")
	eventually(t, func() bool { up, _ := r.Moved(); return up > 0 }, "it is there")
	require.NoError(t, backend.Close())
	expectReset(t, client)
	require.Equal(t, BackendReset, <-why)
}

func TestLoopedMultipathClient(t *testing.T) {
	for _, reset := range []bool{false, true} {
		client, nearClient := multipathPair(t)
		backend, nearBackend := tcpPair(t)
		defer backend.Close()
		_, why := loopedBetween(t, nearClient, nearBackend, Options{})
		write(t, client, "question")
		expect(t, backend, "question")
		if reset {
			require.NoError(t, client.SetLinger(0))
			require.NoError(t, client.Close())
			expectReset(t, backend)
			require.Equal(t, ClientReset, <-why)
			continue
		}
		require.NoError(t, client.CloseWrite())
		expectEOF(t, backend)
		write(t, backend, "answer")
		require.NoError(t, backend.Close())
		expect(t, client, "answer")
		expectEOF(t, client)
		require.NoError(t, client.Close())
		require.Equal(t, ClientClosed, <-why)
	}
}

// Without counters to count in, relaying panics: that ends this connection only.
func TestLoopedContainsPanics(t *testing.T) {
	client, nearClient := tcpPair(t)
	defer client.Close()
	backend, nearBackend := tcpPair(t)
	defer backend.Close()
	caught := make(chan any, 1)
	r := onLoop.looped(t, nearClient, nearBackend, Options{OnPanic: func(v any, stack []byte) {
		assert.Contains(t, string(stack), "(*Looped).count")
		caught <- v
	}})
	why := make(chan Reason, 1)
	r.Start(func() { why <- r.Reason() })
	other := onLoop.start(t, 0)
	write(t, client, "x")
	require.Equal(t, Error, <-why)
	require.NotNil(t, <-caught)
	expectReset(t, client)
	expectReset(t, backend)
	write(t, other.client, "y")
	expect(t, other.backend, "y")
}

func TestLoopedKeepsOldConnectionsAlive(t *testing.T) {
	ln := listen(t)
	defer ln.Close()
	_, nearClient := tcpPair(t)
	conn, err := (&net.Dialer{KeepAlive: -1}).Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	far, err := ln.Accept()
	require.NoError(t, err)
	defer far.Close()
	r, why := loopedBetween(t, nearClient, conn, Options{IdleTimeout: time.Hour})
	option := func(level, name int) (value int) {
		r.on(t, func() { value, _ = unix.GetsockoptInt(int(r.down.src.fd), level, name) })
		return value
	}
	require.Zero(t, option(unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	r.on(t, func() { r.began -= int64(keepAliveAfter); r.Expired() })
	require.Equal(t, 1, option(unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	require.EqualValues(t, KeepAlive.Idle/time.Second, option(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE))
	require.EqualValues(t, KeepAlive.Interval/time.Second, option(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL))
	require.Equal(t, KeepAlive.Count, option(unix.IPPROTO_TCP, unix.TCP_KEEPCNT))
	require.Empty(t, why)
}

// A connection on which something moves now and then is not idle.
func TestLoopedIdleTimeCountsFromTheLastByte(t *testing.T) {
	r := onLoop.start(t, time.Hour)
	looped := r.relay.(*Looped)
	passes := func(d time.Duration) { // as if so much time had passed
		looped.on(t, func() {
			looped.lastMoved.Add(-int64(d))
			looped.Expired()
		})
	}
	write(t, r.client, "x")
	expect(t, r.backend, "x")
	passes(50 * time.Minute)
	require.Greater(t, looped.Idle(), 49*time.Minute)
	require.Equal(t, None, looped.Reason())
	write(t, r.backend, "still open")
	expect(t, r.client, "still open")
	eventually(t, func() bool { return r.sent.Load() == 10 }, "these are counted")
	require.Less(t, looped.Idle(), time.Minute)
	passes(50 * time.Minute)
	require.Equal(t, None, looped.Reason())
	passes(11 * time.Minute)
	require.Equal(t, IdleTimeout, r.reason(t))
}

// One that is busy all the time ends at its age, and not before.
func TestLoopedLifetimeIsAnAge(t *testing.T) {
	k := onLoop
	k.lifetime = time.Hour
	r := k.start(t, time.Hour)
	looped := r.relay.(*Looped)
	passes := func(d time.Duration) {
		looped.on(t, func() {
			looped.began -= int64(d)
			looped.Expired()
		})
	}
	passes(59 * time.Minute)
	write(t, r.client, "x")
	expect(t, r.backend, "x")
	require.Equal(t, None, looped.Reason())
	passes(time.Minute)
	require.Equal(t, LifetimeOver, r.reason(t))
}

// A receiver that takes none of what was sent before a reset has its time, and no
// more than that.
func TestLoopedDeliveryIsGivenUp(t *testing.T) {
	for name, after := range map[string]time.Duration{"no progress": deliveryPatience, "in all": deliveryLimit} {
		t.Run(name, func(t *testing.T) {
			r := onLoop.start(t, 0)
			looped := r.relay.(*Looped)
			flood(t, r.backend)
			require.NoError(t, r.backend.SetLinger(0))
			require.NoError(t, r.backend.Close())
			eventually(t, func() bool { return looped.Reason() == BackendReset }, "it is found at once")
			looped.on(t, func() {
				d, now := *looped.delivery, looped.loop.Now()
				assert.Same(t, &looped.up.src, d.to)
				assert.False(t, d.done(looped, now))
				d.began, d.progressed = now-int64(after)+1, now-int64(deliveryPatience)+1
				assert.False(t, d.done(looped, now))
				d.began--
				d.progressed--
				assert.True(t, d.done(looped, now))
				d.left++
				assert.Equal(t, after == deliveryLimit, d.done(looped, now), "progress is time to go on, but not for ever")
			})
			looped.Cut(Error)
			require.Equal(t, BackendReset, r.reason(t))
			expectReset(t, r.client)
		})
	}
}

// Thousands that end at the same moment all end.
func TestLoopedManyEndAtOnce(t *testing.T) {
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	many := min(10_000, (int(limit.Cur)-200)/4)
	var ended sync.WaitGroup
	var relays []*Looped
	var count atomic.Uint64
	var fars []int
	reasons := make([]atomic.Int32, OwnReasons+1)
	for range many {
		var fds [2][2]int
		for i := range fds {
			var err error
			fds[i], err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			fars = append(fars, fds[i][1])
		}
		r, err := NewLooped(fds[0][0], fds[1][0], Options{IdleTimeout: time.Hour, Up: &count, Down: &count})
		require.NoError(t, err)
		ended.Add(1)
		r.Start(func() { reasons[r.Reason()].Add(1); ended.Done() })
		relays = append(relays, r)
	}
	relays[0].on(t, func() { // all is there by the time the loop looks again
		for i, fd := range fars {
			if i%4 < 2 {
				_ = unix.Close(fd)
			}
		}
	})
	for i, r := range relays {
		if i%2 == 1 {
			r.Cut(drained)
		}
	}
	within(t, ended.Wait, "some have not ended")
	for i, fd := range fars {
		if i%4 >= 2 {
			_ = unix.Close(fd)
		}
	}
	require.EqualValues(t, many/2, reasons[drained].Load())
	require.EqualValues(t, many-many/2, reasons[ClientClosed].Load()+reasons[BackendClosed].Load())
}

// What is closed, cut, and reset at random moments while streams go both ways
// ends once, and what has arrived is a beginning of what was sent.
func TestRelayAtRandom(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		rnd := rand.New(rand.NewPCG(5, 6))
		data := make([]byte, 4<<20)
		fill(data)
		for range 60 {
			r := k.start(t, 0)
			what, after := rnd.IntN(5), rnd.IntN(len(data))
			slow := rnd.IntN(2) == 0
			var streams sync.WaitGroup
			act := sync.OnceFunc(func() {
				switch what {
				case 0:
					r.relay.Cut(drained)
				case 1:
					_ = r.client.SetLinger(0)
					_ = r.client.Close()
				case 2:
					_ = r.backend.SetLinger(0)
					_ = r.backend.Close()
				case 3:
					_ = r.client.CloseWrite()
				}
			})
			for i, c := range []*net.TCPConn{r.client, r.backend} {
				seed := rnd.Uint64()
				streams.Go(func() {
					rnd := rand.New(rand.NewPCG(seed, 0))
					for rest := data; len(rest) > 0; {
						n := min(len(rest), 1+rnd.IntN([]int{100, 200 << 10}[rnd.IntN(2)]))
						if _, err := c.Write(rest[:n]); err != nil {
							break
						}
						rest = rest[n:]
						if i == 0 && len(data)-len(rest) > after {
							act()
						}
					}
					_ = c.CloseWrite()
				})
				streams.Go(func() {
					buf := make([]byte, 64<<10)
					for got := 0; ; {
						n, err := c.Read(buf)
						if !assert.True(t, bytes.Equal(data[got:got+n], buf[:n]), "other bytes at %d", got) {
							return
						}
						got += n
						if err == io.EOF && what == 4 {
							assert.Equal(t, len(data), got, "an end in order is one of all there was")
						}
						if err != nil {
							return
						}
						if slow {
							runtime.Gosched()
						}
					}
				})
			}
			within(t, streams.Wait, "a stream hangs")
			_ = r.client.Close()
			_ = r.backend.Close()
			switch why := r.reason(t); what {
			case 0:
				require.Contains(t, []Reason{drained, ClientClosed, BackendClosed}, why)
			case 3, 4:
				require.True(t, why.Orderly() || why == ClientReset || why == BackendReset, "%d", why)
			}
			require.Empty(t, r.why, "it ends once")
		}
	})
}

// What the kernel says goes with the reason, which is that of the side it is about.
func TestLoopedKeepsWhatWentWrong(t *testing.T) {
	var count atomic.Uint64
	run := func(client, backend int) *Looped {
		r, err := NewLooped(client, backend, Options{Up: &count, Down: &count})
		require.NoError(t, err)
		done := make(chan struct{})
		r.Start(func() { close(done) })
		within(t, func() { <-done }, "it does not end")
		return r
	}
	// A poller can be polled, and not read.
	broken := func() int {
		poller, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		require.NoError(t, err)
		ready, err := unix.Eventfd(1, unix.EFD_CLOEXEC)
		require.NoError(t, err)
		t.Cleanup(func() { _ = unix.Close(ready) })
		require.NoError(t, unix.EpollCtl(poller, unix.EPOLL_CTL_ADD, ready, &unix.EpollEvent{Events: unix.EPOLLIN}))
		return poller
	}
	other := func() int {
		far, near := tcpPair(t)
		t.Cleanup(func() { _ = far.Close() })
		return detach(t, near)
	}
	r := run(broken(), other())
	require.Equal(t, ClientError, r.Reason())
	require.Equal(t, unix.EINVAL, r.Err())
	r = run(other(), broken())
	require.Equal(t, Error, r.Reason())
	require.Equal(t, unix.EINVAL, r.Err())
	fd, err := unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	r = run(other(), fd)
	require.Equal(t, Error, r.Reason())
	require.Equal(t, unix.EPERM, r.Err(), "a directory is in no poller")
}

// What an idle connection takes: little, as there may be very many.
func TestLoopedIsSmall(t *testing.T) {
	require.LessOrEqual(t, unsafe.Sizeof(Looped{}), uintptr(224))
	onLoop.start(t, 0) // so that there are loops
	const many = 500
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var relays []*Looped
	var fars []int
	var ended sync.WaitGroup
	var count atomic.Uint64
	for range many {
		var fds [2][2]int
		for i := range fds {
			var err error
			fds[i], err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			fars = append(fars, fds[i][1])
		}
		r, err := NewLooped(fds[0][0], fds[1][0], Options{IdleTimeout: time.Hour, Up: &count, Down: &count})
		require.NoError(t, err)
		ended.Add(1)
		r.Start(ended.Done)
		relays = append(relays, r)
	}
	for _, r := range relays { // each has begun, and moved something
		_, err := unix.Write(fars[0], []byte("x"))
		require.NoError(t, err)
		r.on(t, func() {})
	}
	goroutines := runtime.NumGoroutine()
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := int(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse) / many
	t.Logf("%d bytes of struct, %d in all", unsafe.Sizeof(Looped{}), each)
	require.Less(t, each, 1<<10)
	require.Less(t, goroutines, many/2)
	for _, r := range relays {
		r.Cut(drained)
	}
	within(t, ended.Wait, "they do not end")
	for _, fd := range fars {
		_ = unix.Close(fd)
	}
}
