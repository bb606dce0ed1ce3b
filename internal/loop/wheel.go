package loop

import (
	"math/bits"
	"time"
)

const (
	tickShift = 22 // a tick is 2^22 ns, about 4 ms
	tick      = time.Duration(1 << tickShift)

	levelBits = 8
	levelSize = 1 << levelBits
	levels    = 4 // about 1 s, 4 min, 19 h and 208 days
)

// wheel has the timers of one loop, one a handler at most. Each level has a list
// for each of its steps, which are as long as all of the level below: there its
// timers go when their step has come.
type wheel struct {
	tick  int64 // all up to here have expired
	heads [levels * levelSize]uint32
	count int
	used  [levelSize / 64]uint64 // which lists of the lowest level have any
}

// set sets the timer of the place to come at the time, or soon if that has passed.
func (w *wheel) set(t *table, i uint32, at, now int64) {
	if w.count == 0 { // what nobody waited for need not be gone through
		w.tick = max(w.tick, now>>tickShift)
	}
	w.count++
	w.place(t, i, max(w.tick+1, at>>tickShift+1))
}

// place puts the timer into the list of its tick.
func (w *wheel) place(t *table, i uint32, due int64) {
	level, ahead := 0, due-w.tick
	for level < levels-1 && ahead >= levelSize {
		level, ahead = level+1, ahead>>levelBits
	}
	at := due
	if ahead >= levelSize {
		at = w.tick + (levelSize-1)<<((levels-1)*levelBits) // it will be placed again
	}
	step := int(at>>(level*levelBits)) & (levelSize - 1)
	list := level*levelSize + step
	e := &t.entries[i]
	e.due, e.list, e.prev, e.next = due, uint16(list+1), 0, w.heads[list]
	if e.next != 0 {
		t.entries[e.next-1].prev = i + 1
	}
	w.heads[list] = i + 1
	if level == 0 {
		w.used[step/64] |= 1 << (step % 64)
	}
}

// stop stops the timer of the place, if it is set.
func (w *wheel) stop(t *table, i uint32) {
	e := &t.entries[i]
	if e.list == 0 {
		return
	}
	w.count--
	list := int(e.list - 1)
	if e.next != 0 {
		t.entries[e.next-1].prev = e.prev
	}
	if e.prev != 0 {
		t.entries[e.prev-1].next = e.next
	} else if w.heads[list] = e.next; e.next == 0 && list < levelSize {
		w.used[list/64] &^= 1 << (list % 64)
	}
	e.list, e.next, e.prev = 0, 0, 0
}

// expire stops one of the timers whose time has come and returns its handler;
// nil if there is none left.
func (w *wheel) expire(t *table, now int64) Handler {
	for {
		if head := w.heads[w.tick&(levelSize-1)]; head != 0 {
			w.stop(t, head-1)
			return t.entries[head-1].handler
		}
		if w.tick >= now>>tickShift {
			return nil
		}
		if w.count == 0 {
			w.tick = now >> tickShift
			return nil
		}
		w.tick++
		w.cascade(t)
	}
}

// cascade moves the timers whose steps begin with this tick down.
func (w *wheel) cascade(t *table) {
	for level := levels - 1; level > 0; level-- {
		if w.tick&(1<<(level*levelBits)-1) != 0 {
			continue
		}
		list := level*levelSize + int(w.tick>>(level*levelBits))&(levelSize-1)
		for head := w.heads[list]; head != 0; head = w.heads[list] {
			due := t.entries[head-1].due
			w.stop(t, head-1)
			w.count++
			w.place(t, head-1, max(w.tick, due))
		}
	}
}

// next returns how long there is nothing to do; negative if that is for ever.
func (w *wheel) next(now int64) time.Duration {
	if w.count == 0 {
		return -1
	}
	begin := w.tick + 1
	at := (w.tick | (levelSize - 1)) + 1 // a cascade
	for i := begin; i < at; {
		step := int(i & (levelSize - 1))
		if word := w.used[step/64] >> (step % 64); word != 0 {
			at = min(at, i+int64(bits.TrailingZeros64(word)))
			break
		}
		i += int64(64 - step%64)
	}
	return max(0, time.Duration(at<<tickShift-now))
}
