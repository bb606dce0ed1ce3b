package tcplb

import (
	"container/heap"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(LeastConn{})
}

// LeastConn picks the backend with the fewest open or connecting connections
// per unit of weight. Those that are level are taken in turn, each as often as
// its weight says.
type LeastConn struct{}

// CaddyModule returns the Caddy module information.
func (LeastConn) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.least_conn",
		New: func() caddy.Module { return new(LeastConn) },
	}
}

// UnmarshalCaddyfile reads the policy's name; it has no options.
func (LeastConn) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return onlyName(d) }

// NewPicker implements SelectionPolicy. The turns of level backends go on.
func (LeastConn) NewPicker(available []Candidate, prev Picker) Picker {
	l := &byLoad{
		entries: make([]entry, len(available)),
		heap:    make([]ranked, len(available)),
		index:   make(map[*Backend]uint32, len(available)),
	}
	ahead := make(map[*Backend]float64) // of its turn, in picks: a turn's unit is the weight's
	if old, ok := prev.(*byLoad); ok {
		old.mu.Lock()
		l.now = old.now
		for _, k := range old.heap {
			e := &old.entries[k.entry]
			ahead[e.backend] = max(0, k.turn-old.now) * e.weight
		}
		old.mu.Unlock()
	}
	for i, c := range available {
		load := c.Backend.Load()
		l.entries[i] = entry{backend: c.Backend, weight: float64(c.Weight), load: load, at: uint32(i)}
		l.heap[i] = ranked{load: float64(load) / float64(c.Weight), turn: l.now + ahead[c.Backend]/float64(c.Weight), entry: uint32(i)}
		l.index[c.Backend] = uint32(i)
	}
	for i := len(l.heap) / arity; i >= 0; i-- {
		l.siftDown(i)
	}
	return l
}

// byLoad has its candidates in a heap, the next to be picked at the top.
type byLoad struct {
	index map[*Backend]uint32 // entry of; never changes

	mu      sync.Mutex
	entries []entry // in the config's order
	heap    []ranked
	now     float64 // turn of the last pick
}

type entry struct {
	backend *Backend
	weight  float64
	load    int64  // that its place in the heap is for
	at      uint32 // that place
}

// ranked is a candidate's place among all: by load for each unit of weight, then
// by turn. A pick takes a weight's part of a turn, and who was not level for a
// while does not catch up (start-time fair queueing: Goyal, Vin and Cheng,
// SIGCOMM 1996).
type ranked struct {
	load, turn float64
	entry      uint32
}

func (a *ranked) before(b *ranked) bool {
	if a.load != b.load {
		return a.load < b.load
	}
	if a.turn != b.turn {
		return a.turn < b.turn
	}
	return a.entry < b.entry
}

// Pick implements Picker in O(log n), of short steps.
func (l *byLoad) Pick(r *Request) *Backend {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.heap) == 0 {
		return nil
	}
	for range l.heap { // until the first is what it seems
		e := &l.entries[l.heap[0].entry]
		if e.backend.Load() <= e.load {
			break
		}
		l.settle(e) // another picker took it
	}
	if e := &l.entries[l.heap[0].entry]; r.Take(e.backend) {
		l.taken(e)
		return e.backend
	}
	return l.pickFurther(r)
}

// pickFurther looks at the others, best first: at the children of those that it
// has looked at, which are a heap, too.
func (l *byLoad) pickFurther(r *Request) *Backend {
	f := frontier{of: l, at: children(0, len(l.heap), nil)}
	heap.Init(&f)
	for len(f.at) > 0 {
		at := heap.Pop(&f).(int)
		e := &l.entries[l.heap[at].entry]
		if r.Take(e.backend) {
			l.taken(e)
			return e.backend
		}
		for c := arity*at + 1; c <= arity*at+arity && c < len(l.heap); c++ {
			heap.Push(&f, c)
		}
	}
	return nil
}

type frontier struct {
	of *byLoad
	at []int // places in its heap
}

func (f *frontier) Len() int           { return len(f.at) }
func (f *frontier) Less(i, j int) bool { return f.of.heap[f.at[i]].before(&f.of.heap[f.at[j]]) }
func (f *frontier) Swap(i, j int)      { f.at[i], f.at[j] = f.at[j], f.at[i] }
func (f *frontier) Push(x any)         { f.at = append(f.at, x.(int)) }
func (f *frontier) Pop() any {
	last := f.at[len(f.at)-1]
	f.at = f.at[:len(f.at)-1]
	return last
}

// taken moves a backend that was just picked to its new place.
func (l *byLoad) taken(e *entry) {
	k := &l.heap[e.at]
	l.now = max(l.now, k.turn)
	k.turn = l.now + 1/e.weight
	l.settle(e)
}

// settle moves a backend to where its load belongs.
func (l *byLoad) settle(e *entry) {
	e.load = e.backend.Load()
	l.heap[e.at].load = float64(e.load) / e.weight
	l.siftDown(l.siftUp(int(e.at)))
}

// LoadChanged implements LoadObserver.
func (l *byLoad) LoadChanged(b *Backend) {
	i, ok := l.index[b]
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := &l.entries[i]; e.backend.Load() != e.load {
		l.settle(e)
	}
}

// arity is how many children a place in the heap has: more make it flatter, and
// so touch less memory.
const arity = 4

func children(at, n int, to []int) []int {
	for c := arity*at + 1; c <= arity*at+arity && c < n; c++ {
		to = append(to, c)
	}
	return to
}

func (l *byLoad) siftUp(at int) int {
	for at > 0 {
		parent := (at - 1) / arity
		if !l.heap[at].before(&l.heap[parent]) {
			break
		}
		l.swap(at, parent)
		at = parent
	}
	return at
}

func (l *byLoad) siftDown(at int) {
	for {
		best := at
		for c := arity*at + 1; c <= arity*at+arity && c < len(l.heap); c++ {
			if l.heap[c].before(&l.heap[best]) {
				best = c
			}
		}
		if best == at {
			return
		}
		l.swap(at, best)
		at = best
	}
}

func (l *byLoad) swap(i, j int) {
	l.heap[i], l.heap[j] = l.heap[j], l.heap[i]
	l.entries[l.heap[i].entry].at, l.entries[l.heap[j].entry].at = uint32(i), uint32(j)
}

// Interface guards
var (
	_ SelectionPolicy       = (*LeastConn)(nil)
	_ caddyfile.Unmarshaler = (*LeastConn)(nil)
	_ LoadObserver          = (*byLoad)(nil)
)
