package tcplb

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
	"github.com/stretchr/testify/require"
)

// policyFunc is a policy whose pickers are one function.
type policyFunc func(r *Request, available []Candidate) *Backend

func (f policyFunc) NewPicker(available []Candidate, _ Picker) Picker {
	return pickerFunc(func(r *Request) *Backend { return f(r, available) })
}

type pickerFunc func(*Request) *Backend

func (f pickerFunc) Pick(r *Request) *Backend { return f(r) }

// What was taken counts, and nothing else does, whatever a policy returns.
func TestBooksHoldForAnyPolicy(t *testing.T) {
	var kept *Request
	for _, c := range []struct {
		name   string
		policy policyFunc
		want   string // what the connection has; empty = none
	}{
		{"takes and returns", func(r *Request, l []Candidate) *Backend { r.Take(l[0].Backend); return l[0].Backend }, one},
		{"returns and has not taken", func(_ *Request, l []Candidate) *Backend { return l[1].Backend }, two},
		{"takes one and returns another", func(r *Request, l []Candidate) *Backend { r.Take(l[0].Backend); return l[1].Backend }, one},
		{"takes and returns none", func(r *Request, l []Candidate) *Backend { r.Take(l[0].Backend); return nil }, ""},
		{"takes two", func(r *Request, l []Candidate) *Backend {
			r.Take(l[0].Backend)
			if r.Take(l[1].Backend) {
				return nil
			}
			return l[0].Backend
		}, one},
		{"returns one that is not available", func(*Request, []Candidate) *Backend { return new(Backend) }, ""},
		{"takes none", func(r *Request, _ []Candidate) *Backend { r.Take(nil); return nil }, ""},
		{"keeps the request", func(r *Request, _ []Candidate) *Backend { kept = r; return nil }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one, two); checksOff(h) })
			g.policy = c.policy
			g.start()
			defer g.stop()
			l, err := connect(g)
			if kept != nil {
				require.False(t, kept.Take(g.members()[0].Backend), "too late")
				kept = nil
			}
			if c.want == "" {
				require.ErrorIs(t, err, errNoBackend)
			} else {
				require.NoError(t, err)
				require.Equal(t, c.want, l.backend.address)
				require.EqualValues(t, 1, l.backend.Load())
				l.release()
			}
			for _, m := range g.members() {
				require.Zero(t, m.Backend.Load(), m.Backend.address)
			}
		})
	}
}

// Nor does a policy that takes and panics keep what it took.
func TestPanicAfterATakeGivesItBack(t *testing.T) {
	g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
	g.policy = policyFunc(func(r *Request, l []Candidate) *Backend {
		r.Take(l[0].Backend)
		panic("out of luck")
	})
	g.start()
	defer g.stop()
	require.Panics(t, func() { _, _ = connect(g) })
	require.Zero(t, g.members()[0].Backend.Load())
}

// leastLoaded is the policy that herds unless a pick and its count are one step.
var leastLoaded policyFunc = func(r *Request, l []Candidate) *Backend {
	for {
		best := l[0].Backend
		for _, c := range l[1:] {
			if c.Backend.Load() < best.Load() {
				best = c.Backend
			}
		}
		if r.Take(best) {
			return best
		}
	}
}

// Each pick sees those before it.
func TestPicksDoNotHerd(t *testing.T) {
	c := testCandidates(1, 1, 1, 1)
	var mu sync.Mutex
	p := leastLoaded.NewPicker(c, nil)
	inOrder := pickerFunc(func(r *Request) *Backend {
		mu.Lock()
		defer mu.Unlock()
		return p.Pick(r)
	})
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() { pickOf(inOrder) })
	}
	wg.Wait()
	for _, c := range c {
		require.EqualValues(t, 25, c.Backend.Load())
	}
}

// observing is a policy whose picker counts what it is told.
type observing struct{ told *atomic.Int64 }

func (o observing) NewPicker(available []Candidate, prev Picker) Picker {
	return loadWatcher{RoundRobin{}.NewPicker(available, nil), o.told}
}

type loadWatcher struct {
	Picker
	told *atomic.Int64
}

func (o loadWatcher) LoadChanged(b *Backend) {
	if o.told.Add(b.Load() + 1); o.told.Load() > 100 {
		panic("too much")
	}
}

// A picker is told when a connection has ended, and when one of an older config
// has begun, but not of what it took itself.
func TestPickerIsToldOfLoad(t *testing.T) {
	noPoolsYet(t)
	run := func(told *atomic.Int64) (*generation, func() int) {
		g, logs := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
		g.policy = observing{told}
		return g, func() int { return logs.FilterMessageSnippet("panic in the selection policy").Len() }
	}
	var first, second atomic.Int64
	old, _ := run(&first)
	old.start()
	require.EqualValues(t, 1, first.Load(), "once at the start")
	a, err := connect(old)
	require.NoError(t, err)
	require.EqualValues(t, 1, first.Load())
	next, panics := run(&second)
	next.start()
	require.EqualValues(t, 2, second.Load(), "once at the start, when there is one")
	second.Store(0)
	b, err := connect(old)
	require.NoError(t, err)
	require.EqualValues(t, 3, second.Load(), "one more, of two")
	a.release()
	require.EqualValues(t, 5, second.Load(), "one is left")
	second.Store(100)
	b.release()
	require.Equal(t, 1, panics(), "and a panic is contained")
	require.EqualValues(t, 1, first.Load())
	old.stop()
	next.stop()
	require.Empty(t, registry.snapshot())
}

func TestRequestOfAClient(t *testing.T) {
	address := func(s string) net.Addr {
		a, err := net.ResolveTCPAddr("tcp", s)
		require.NoError(t, err)
		return a
	}
	for _, c := range []struct {
		client net.Addr
		want   string
	}{
		{address("10.0.0.9:1234"), "10.0.0.9:1234"},
		{address("[::ffff:10.0.0.9]:1234"), "10.0.0.9:1234"},
		{address("[fe80::1%lo]:1234"), "[fe80::1%lo]:1234"},
		{textAddress("10.0.0.9:1234"), "10.0.0.9:1234"},
		{&net.UnixAddr{Name: "@"}, ""},
		{nil, ""},
	} {
		got := (&Request{client: c.client}).Client()
		if c.want == "" {
			require.False(t, got.IsValid())
			continue
		}
		require.Equal(t, netip.MustParseAddrPort(c.want), got)
	}
	far, near := net.Pipe()
	defer far.Close()
	defer near.Close()
	cx := layer4Connection(near)
	cx.SetVar("tenant", "blue")
	r := Request{cx: cx}
	require.Equal(t, "blue", r.Var("tenant"))
	require.Nil(t, r.Var("other"))
	require.Nil(t, new(Request).Var("tenant"))
}

type textAddress string

func (textAddress) Network() string  { return "tcp" }
func (a textAddress) String() string { return string(a) }

// A pick needs no lock of the registry's, with which pickers are made: a policy's
// own lock, held in both, would be taken in two orders.
func TestTakeNeedsNoRegistry(t *testing.T) {
	gone := testCandidates(1)[0].Backend
	gone.load.Store(retired)
	r := testRequest("")
	picked := make(chan *Backend)
	registry.mu.Lock()
	go func() {
		picked <- r.pickBy(pickerFunc(func(r *Request) *Backend {
			r.Take(gone)
			return nil
		}))
	}()
	select {
	case b := <-picked:
		registry.mu.Unlock()
		require.Nil(t, b)
		require.Same(t, gone, r.gone)
	case <-time.After(hangTimeout):
		registry.mu.Unlock()
		require.FailNow(t, "it waits for the registry")
	}
}

// A backend that left between a picker's making and a pick is looked for again; in
// vain, where it was to leave, and then it is not brought back for good.
func TestNobodyIsBroughtBackInVain(t *testing.T) {
	noPoolsYet(t)
	g, _ := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
	source := newToldSource()
	has(g, source)
	g.start()
	update := <-source.update
	update([]discovery.Found{{Address: two}})
	left := g.members()[1].Backend
	update(nil)
	require.True(t, left.load.Load() < 0, "it is retired")
	g.policy = policyFunc(func(r *Request, _ []Candidate) *Backend {
		r.gone = left // was available a moment ago
		return nil
	})
	g.rebuild()
	var r Request
	require.Nil(t, g.pick(&r))
	require.Len(t, registry.snapshot()[0].backends, 1)
	g.stop()
	require.Empty(t, registry.snapshot())
}
