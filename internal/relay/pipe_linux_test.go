package relay

import (
	"bytes"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// openFiles counts the sockets and pipes of this process, but for the pool's.
func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	n := -2 * Pipes()
	for _, entry := range list {
		what, _ := os.Readlink("/proc/self/fd/" + entry.Name())
		if strings.HasPrefix(what, "socket:") || strings.HasPrefix(what, "pipe:") {
			n++
		}
	}
	return n
}

// poolOf is a pool of a test's own.
func poolOf(t testing.TB, most int) *pipePool {
	t.Helper()
	pp := &pipePool{most: most}
	t.Cleanup(func() {
		for _, p := range pp.spare {
			pp.discard(p)
		}
	})
	return pp
}

func TestPipesAreBounded(t *testing.T) {
	before := openFiles(t)
	pp := poolOf(t, 3)
	var held []*pipe
	for range 3 {
		held = append(held, pp.get())
		require.NotNil(t, held[len(held)-1])
	}
	require.Nil(t, pp.get())
	pp.put(held[0])
	require.Same(t, held[0], pp.get())
	pp.discard(held[1])
	require.NotNil(t, pp.get(), "another in its place")
	require.Nil(t, pp.get())
	for _, p := range []*pipe{held[0], held[2]} {
		pp.put(p)
	}
	require.Equal(t, before+2*3, openFiles(t))
}

// withoutPrivileges runs f in a thread whose user has no right to large pipes.
func withoutPrivileges(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if os.Geteuid() == 0 {
			const nobody = 65534
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
				panic(errno)
			}
		}
		f()
	}()
	<-done
}

// Pipes of 8 KB, which a user gets who has too many, are of no use.
func TestTinyPipesAreNotUsed(t *testing.T) {
	pp := poolOf(t, 3)
	var used []*pipe
	tiny := false
	withoutPrivileges(func() {
		for len(used) < 3000 && !tiny {
			var fds [2]int
			if unix.Pipe2(fds[:], unix.O_CLOEXEC) != nil {
				return
			}
			used = append(used, &pipe{r: fds[0], w: fds[1]})
			size, err := unix.FcntlInt(uintptr(fds[0]), unix.F_GETPIPE_SZ, 0)
			tiny = err == nil && size < leastPipeSize
		}
		if tiny && pp.get() != nil {
			panic("a tiny pipe is used")
		}
	})
	for _, p := range used {
		p.close()
	}
	if !tiny {
		t.Skip("this kernel, or a limit of files, gives an unprivileged user no tiny pipes")
	}
	require.Zero(t, pp.made, "it was not kept")
	require.Nil(t, pp.get(), "and no other is tried for a while")
	pp.barrenUntil = time.Now()
	require.NotNil(t, pp.get(), "then it is")
}

// A relay that has no pipe copies.
func TestRelayWithoutPipes(t *testing.T) {
	for _, k := range []kind{{name: "bare"}, onLoop} {
		t.Run(k.name, func(t *testing.T) {
			var held []*pipe
			for p := pipes.get(); p != nil; p = pipes.get() {
				held = append(held, p)
			}
			defer func() {
				for _, p := range held {
					pipes.put(p)
				}
			}()
			r := k.start(t, 0)
			const size = 8 << 20
			go func() { _, _ = r.client.Write(make([]byte, size)); _ = r.client.CloseWrite() }()
			n, err := readAllCount(r.backend)
			require.NoError(t, err)
			require.EqualValues(t, size, n)
		})
	}
}

// A receiver that takes nothing holds no pipe.
func TestStuckReceiversHoldNoPipe(t *testing.T) {
	for _, k := range []kind{{name: "bare"}, onLoop} {
		t.Run(k.name, func(t *testing.T) {
			var relays []*relayed
			for range 2 * mostPipes {
				relays = append(relays, k.start(t, 0))
			}
			var filling sync.WaitGroup
			for _, r := range relays {
				filling.Go(func() { flood(t, r.backend) })
			}
			filling.Wait()
			spare := func() int {
				pipes.mu.Lock()
				defer pipes.mu.Unlock()
				return len(pipes.spare)
			}
			require.Positive(t, Pipes(), "it was a bulk transfer")
			eventually(t, func() bool { return spare() == Pipes() }, "all pipes are free")
		})
	}
}

// Where the destination takes less than the kernel says it has room for, what is
// left in the pipe is delivered all the same.
func TestSpliceLeftovers(t *testing.T) {
	for name, lowest := range map[string]int{"small": 16 << 10, "large": 200 << 10} {
		t.Run(name, func(t *testing.T) {
			r := startRelay(t, 0, nil)
			require.NoError(t, control(r.pair.backend.base, func(fd int) error {
				return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, lowest)
			}))
			require.NoError(t, r.backend.SetReadBuffer(64<<10))
			data := make([]byte, 20<<20)
			fill(data)
			go func() {
				_, _ = r.client.Write(data)
				_ = r.client.CloseWrite()
			}()
			got, err := io.ReadAll(r.backend)
			require.NoError(t, err)
			require.True(t, bytes.Equal(data, got))
			require.NoError(t, r.backend.Close())
			require.Equal(t, ClientClosed, r.reason(t))
			require.Less(t, r.pair.up.pump.most, spliceMax, "it came to that")
		})
	}
}
