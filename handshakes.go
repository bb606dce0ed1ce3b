package tcplb

import (
	"runtime"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
)

// Of thousands of TLS handshakes that are made at once all would be late. So they
// wait, in the order of their clients' arrival: before the connect until the backend
// has few to answer, and whenever they have to compute for this machine's processors,
// which all pools share. Neither counts as the backend's time.
//
// The checks' handshakes don't wait. Few compute beside them, so they get their share.
var processors = secure.NewLine(func() int { return computing * runtime.GOMAXPROCS(0) })

const (
	computing = 2  // handshakes at once, for each processor
	begun     = 32 // those of one backend, unless they are slow

	// slowHandshake is after what time one does not count among those begun any more:
	// another may begin in its place, so that distance makes no backend slow.
	slowHandshake = 100 * time.Millisecond
)

func newBegun() *secure.Line { return secure.NewLine(func() int { return begun }) }

// handshakes are a client's turns to make them. That for the processors it keeps, as
// it goes from backend to backend.
type handshakes struct {
	compute *secure.Turn // nil: it has had no need of it
	begin   *secure.Turn // nil: it is not to make one
	slow    *time.Timer
	before  time.Duration // what it has waited to begin in all
}

// await returns when the client's handshake with b, which was taken for it, may begin,
// if there is to be one. end ends that.
func (s *search) await(b *Backend) (waited bool, err error) {
	a := b.approach.Load()
	if a == nil || a.security == nil {
		return false, nil
	}
	t := &s.handshakes
	if t.compute == nil {
		t.compute = processors.Join()
	}
	before := t.waited()
	t.begin = b.begun.Join()
	p := newPatience(s, time.Now())
	if err = t.begin.Take(p); err == nil {
		t.slow = time.AfterFunc(slowHandshake, t.begin.Give)
		err = t.compute.Take(p)
		t.compute.Give()
	}
	p.end()
	if err != nil || s.left != reasonNone {
		err = p.cause()
	}
	if err != nil {
		t.end()
	}
	return t.waited() > before, err
}

// end ends what await has returned for.
func (t *handshakes) end() {
	if t.begin == nil {
		return
	}
	if t.slow != nil {
		t.slow.Stop()
	}
	t.begin.Give()
	t.before += t.begin.Waited()
	t.begin, t.slow = nil, nil
}

// waited returns for how long the client has waited for its turns.
func (t *handshakes) waited() time.Duration {
	return t.before + t.begin.Waited() + t.compute.Waited()
}
