// Package notice is for what is worth a line of the log, but not one each: the
// first has one, and after that there is one a minute for those since. What is
// noticed is counted in some line, sooner or later, and in one only.
package notice

import (
	"sync/atomic"
	"time"
)

// Notice is one such line. Its zero value is ready.
type Notice struct {
	unsaid atomic.Uint64
	open   atomic.Bool // a timer will write the next line
}

// Add has write called with the number of those that no line has told of: now,
// or when a minute has passed since the last.
func (n *Notice) Add(write func(count uint64)) {
	n.unsaid.Add(1)
	if n.open.CompareAndSwap(false, true) {
		n.writeOut(write)
	}
}

func (n *Notice) writeOut(write func(count uint64)) {
	if count := n.unsaid.Swap(0); count > 0 {
		write(count)
		time.AfterFunc(time.Minute, func() { n.writeOut(write) })
		return
	}
	n.open.Store(false)
	if n.unsaid.Load() > 0 && n.open.CompareAndSwap(false, true) { // it came just now
		n.writeOut(write)
	}
}
