package tcplb

import (
	"sync"

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
	// sparePipes is how many empty pipes are kept.
	sparePipes = 32
)

// pipe is a kernel buffer between two sockets.
type pipe struct{ r, w int }

// pipePool keeps a few empty pipes and counts all of them in the file budget.
type pipePool struct {
	mu    sync.Mutex
	spare []*pipe
}

var pipes pipePool

// get returns an empty pipe, or nil if the process can't afford one.
func (pp *pipePool) get() *pipe {
	pp.mu.Lock()
	if n := len(pp.spare); n > 0 {
		p := pp.spare[n-1]
		pp.spare = pp.spare[:n-1]
		pp.mu.Unlock()
		return p
	}
	pp.mu.Unlock()
	if !files.acquire(filesPerPipe) {
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		files.release(filesPerPipe)
		return nil
	}
	for _, size := range []int{pipeSize, smallPipeSize} {
		if _, err := unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, size); err == nil {
			break // else any size serves
		}
	}
	return &pipe{r: fds[0], w: fds[1]}
}

// put gives an empty pipe back.
func (pp *pipePool) put(p *pipe) {
	pp.mu.Lock()
	if len(pp.spare) < sparePipes {
		pp.spare = append(pp.spare, p)
		p = nil
	}
	pp.mu.Unlock()
	if p != nil {
		pp.discard(p)
	}
}

// discard closes a pipe.
func (pp *pipePool) discard(p *pipe) {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
	files.release(filesPerPipe)
}

// freePipes closes the spare pipes, for connections that need their files; it
// reports whether there were any.
func freePipes() bool {
	pipes.mu.Lock()
	spare := pipes.spare
	pipes.spare = nil
	pipes.mu.Unlock()
	for _, p := range spare {
		pipes.discard(p)
	}
	return len(spare) > 0
}

// spareFiles is how many files of the budget spare pipes have.
func spareFiles() int64 {
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	return int64(filesPerPipe * len(pipes.spare))
}
