package tcplb

import (
	"net"
	"net/netip"
	"slices"

	"github.com/mholt/caddy-l4/layer4"
)

// SelectionPolicy decides which backend a connection goes to. Policies are
// guest modules in the namespace layer4.tcp_lb.selection_policies.
type SelectionPolicy interface {
	// NewPicker returns a picker over the available backends, in the order of
	// the config. previous is the picker that it takes over from, nil for the
	// first; another policy's may be passed after a reload. It may be returned
	// again, where nothing has changed for it.
	//
	// NewPicker is called whenever the availability or the weight of a backend
	// changes, never twice at once for the same config. There are two pickers at a
	// time, one of them over the backups, each with a chain of its own.
	NewPicker(available []Candidate, previous Picker) Picker
}

// Candidate is a backend that a picker chooses among. It may get more fields.
type Candidate struct {
	Backend *Backend
	Weight  int // 1–2560, its share relative to the others'
	// Settled is the Weight that it is to have when its slow start is over, 0 if it
	// is in none. Only what should stand still meanwhile goes by it.
	Settled int
}

// Picker picks backends out of a fixed set. Many goroutines pick at once.
type Picker interface {
	// Pick chooses a backend, takes it by r.Take and returns it. Where Take
	// says no it goes on to the next best; nil says that none could be taken.
	//
	// It must not block, nor keep r: for a client that waits it is called by who
	// makes room for that, with the line of those who wait locked.
	Pick(r *Request) *Backend
}

// LoadObserver is what a Picker implements that keeps its backends in an order of
// their load.
type LoadObserver interface {
	// LoadChanged says that b.Load may have become another by something else than
	// a Take of this picker's: a connection ended, or one that an older config
	// accepted was connected. b need not be among the picker's backends. It is
	// called for each of them once the picker is in use. Like Pick it is called from
	// many goroutines at once, and must not block.
	LoadChanged(b *Backend)
}

// Request is one connection that is to have a backend. It is valid only while
// Pick runs, and for its goroutine.
type Request struct {
	client net.Addr
	cx     *layer4.Connection // nil: no variables

	tried   []*Backend  // that failed
	room    [4]*Backend // for tried, as a rule
	picking bool
	taken   *Backend
	inLine  *waiters // whose lock is held while it picks; nil = none
	gone    *Backend // could have been taken, but was retired meanwhile
}

// Client returns the client's address, as a PROXY protocol handler in front has
// it. It is not valid for a client of a Unix socket.
func (r *Request) Client() netip.AddrPort {
	var ap netip.AddrPort
	switch c := r.client.(type) {
	case nil:
	case *net.TCPAddr:
		ap = c.AddrPort()
	default: // of some wrapper
		ap, _ = netip.ParseAddrPort(c.String())
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Var returns a variable of the layer4 connection, which handlers in front may
// have set; nil if there is none of that name.
func (r *Request) Var(key string) any {
	if r.cx == nil {
		return nil
	}
	return r.cx.GetVar(key)
}

// Take takes b for the connection, which b.Load then counts. To look whether that
// may be and to count are one step: however many pick at once, each sees those
// before it. Take returns false for a backend that has its max_connections, that
// is not available any more, or that was tried for this connection: choose
// another. After one was taken it returns false for all.
func (r *Request) Take(b *Backend) bool {
	if b == nil || !r.picking || r.taken != nil {
		return false
	}
	if !b.Available() || slices.Contains(r.tried, b) {
		return false
	}
	switch b.take() {
	case wasTaken:
		r.taken = b
		return true
	case wasGone:
		r.gone = b
	}
	return false
}

// adoptGone takes the backend that was retired between the picker's making and
// now: a config went. The picker has returned, whose locks others may wait for with
// the registry's mutex held.
func (r *Request) adoptGone() *Backend {
	b := r.gone
	if r.gone = nil; b == nil || r.inLine != nil {
		return nil
	}
	b = registry.adopt(b)
	r.picking, r.taken = true, nil
	defer func() { r.picking = false }()
	if r.Take(b) {
		return b
	}
	registry.retire(b) // else nobody would
	return nil
}

// pickBy has the picker choose, and returns what was taken: that counts, whatever
// a picker returns.
func (r *Request) pickBy(p Picker) *Backend {
	r.picking, r.taken = true, nil
	returned := false
	defer func() {
		r.picking = false
		if !returned { // it panics
			r.giveBack()
		}
	}()
	b := p.Pick(r)
	returned = true
	switch {
	case b == nil:
		r.giveBack()
	case r.taken == nil:
		r.Take(b)
	}
	return r.taken
}

// giveBack gives back what was taken, if anything.
func (r *Request) giveBack() {
	b := r.taken
	if b == nil {
		return
	}
	r.taken = nil
	if q := r.inLine; q != nil {
		b.countDown()
		q.emptied = append(q.emptied, b)
		return
	}
	b.release()
}
