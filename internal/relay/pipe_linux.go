package relay

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize in bytes holds a whole receive queue, so that a wake-up moves
	// all there is: a quarter of it costs about a fifth more processor time where
	// congestion control paces. Pipes take memory for what they hold only.
	pipeSize = 1 << 20
	// smallPipeSize is for users whose pipes exceed a sum; the kernel's default
	// of 64 KB may be but 23 KB, as each segment from a network card takes a page.
	smallPipeSize = 256 << 10
	// leastPipeSize is the least that is of use. Past a number of pipes, an
	// unprivileged user's hold 8 KB, less than a relay's buffer.
	leastPipeSize = 64 << 10
	// mostPipes is how many there are at most. None is held by a relay that
	// waits, so that more of them could not all be at work. Their files are of the
	// reserve: they take none from connections.
	mostPipes = 16
	// pipePause is how long relays do without when a pipe could not be made.
	pipePause = 10 * time.Second
)

// pipe is a kernel buffer between two sockets.
type pipe struct{ r, w int }

// pipePool keeps the pipes that no relay uses at the time, all of them empty.
type pipePool struct {
	mu          sync.Mutex
	most        int // pipes
	spare       []*pipe
	made        int       // spare or in use
	barrenUntil time.Time // none can be made before
}

var pipes = pipePool{most: mostPipes}

// LimitPipes sets how many pipes there may be, each of two files: one at least,
// and no more than are of use. Those that are open stay.
func LimitPipes(most int) {
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	pipes.most = max(1, min(most, mostPipes))
}

// Pipes returns how many pipes are open, in use or not.
func Pipes() int {
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	return pipes.made
}

// get returns an empty pipe, or nil if there is none to be had now.
func (pp *pipePool) get() *pipe {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	if n := len(pp.spare); n > 0 {
		p := pp.spare[n-1]
		pp.spare = pp.spare[:n-1]
		return p
	}
	if pp.made >= pp.most || !pp.barrenUntil.IsZero() && time.Now().Before(pp.barrenUntil) {
		return nil
	}
	p := newPipe()
	if p == nil {
		pp.barrenUntil = time.Now().Add(pipePause)
		return nil
	}
	pp.barrenUntil = time.Time{}
	pp.made++
	return p
}

// newPipe returns nil if none can be made, or none that is of use.
func newPipe() *pipe {
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		return nil
	}
	p := &pipe{r: fds[0], w: fds[1]}
	for _, size := range []int{pipeSize, smallPipeSize} {
		if _, err := unix.FcntlInt(uintptr(p.r), unix.F_SETPIPE_SZ, size); err == nil {
			return p
		}
	}
	if size, err := unix.FcntlInt(uintptr(p.r), unix.F_GETPIPE_SZ, 0); err != nil || size < leastPipeSize {
		p.close()
		return nil
	}
	return p
}

// put gives an empty pipe back.
func (pp *pipePool) put(p *pipe) {
	pp.mu.Lock()
	defer pp.mu.Unlock()
	pp.spare = append(pp.spare, p)
}

// discard closes a pipe that is not empty.
func (pp *pipePool) discard(p *pipe) {
	p.close()
	pp.mu.Lock()
	defer pp.mu.Unlock()
	pp.made--
}

func (p *pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}
