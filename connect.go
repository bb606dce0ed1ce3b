package tcplb

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

var (
	errNoBackend  = errors.New("no backend available")
	errFull       = errors.New("every available backend has its max_connections")
	errClientLeft = errors.New("the client left before it had a backend")
	errAbandoned  = errors.New("the drain timeout is over")
	errMoved      = errors.New("the backend left the config meanwhile")
)

// link is a connection to a backend, and what it took.
type link struct {
	backend  *Backend // to be released after conn is closed
	conn     net.Conn
	attempts int
	took     time.Duration // of the successful connect alone
	failed   failedConnects
}

func (l *link) release() { l.backend.release() }

// search is one client's way to a backend. Each step is in the client's own
// goroutine, but for a look at the client while a connect takes long.
type search struct {
	pool    *pool
	request Request
	began   time.Time
	link

	waiter     waiter
	inLine     bool        // unless it had its turn meanwhile, see waiter.turn
	by         *generation // has taken request.taken for it
	waited     time.Duration
	left       reason // how the client left; reasonNone = it is there
	handshakes handshakes
}

// find connects the client to a backend of g, or of a newer config once there is
// one. A failed connect moves on at once to a backend that was not tried, up to
// the number of retries. When none is left, and within tryDuration, it starts
// over: as soon as it can have a backend or another config runs, and every
// tryInterval unless all that it waits for is a place.
//
// It returns the generation that served in the end. The error joins those of the
// last round and matches errNoBackend, errFull, errClientLeft or errAbandoned. The
// caller is counted in the pool's active.
func (s *search) find(g *generation) (*generation, error) {
	s.waiter.request, s.waiter.began = &s.request, s.began
	defer s.end()
	for {
		changes := s.pool.changes.Load()
		var err error
		g, err = s.round(g)
		if errors.Is(err, errMoved) {
			if newest := registry.newest(g.name); newest != nil {
				g = newest
			}
			continue
		}
		if err == nil || !errors.Is(err, errNoBackend) {
			return g, err
		}
		available, room := g.room()
		full := available && !room && len(s.request.tried) == 0
		now, until := time.Now(), s.began.Add(g.tryDuration)
		switch {
		case now.Before(until):
		case full:
			return g, errFull
		default:
			g.wantProbes()
			return g, err
		}
		if !full {
			g.wantProbes()
			until = earlier(until, now.Add(g.tryInterval))
		}
		if !isClosed(g.stopped) {
			s.wait(g, changes, until)
		}
		if s.left != reasonNone {
			return g, errClientLeft
		}
		if newest := registry.newest(g.name); newest != nil {
			g = newest
		} else if isClosed(g.stopped) {
			if full {
				err = errFull
			}
			return g, err
		}
	}
}

// end gives back what the search has and does not need any more.
func (s *search) end() {
	s.pool.waiters.leave(&s.waiter)
	s.request.giveBack()
	s.handshakes.end()
	s.pool.noteWait(s.waited + s.handshakes.waited())
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// wait has the client stand in line. It returns when a backend was taken for it,
// at the time, when it has left, or when the pool has changed since the count was
// taken.
func (s *search) wait(g *generation, changes uint64, until time.Time) {
	s.pool.waiters.enter(&s.waiter)
	if s.stand(g, false) || s.pool.changes.Load() != changes {
		return // its turn may have come before it could be woken
	}
	began := time.Now()
	s.left = s.waiter.wait(until)
	s.waited += time.Since(began)
}

// stand puts the client in line, and reports whether it has had its turn.
func (s *search) stand(g *generation, again bool) bool {
	t := s.pool.stand(&s.waiter, g, again)
	if t.problem != nil {
		panic(t.problem)
	}
	s.by, s.inLine = t.by, t.by == nil
	return s.by != nil
}

// next takes a backend: by the client's turn in line, or at once where nobody
// waits. It may be one that was tried if this is a new round.
func (s *search) next(g *generation, again bool) (*generation, *Backend) {
	r := &s.request
	if s.by == nil && (s.inLine || s.pool.waiters.waiting.Load() > 0) && !s.stand(g, again) {
		return g, nil
	}
	if s.by == nil {
		if again {
			r.tried = r.room[:0]
		}
		g.pick(r)
	} else {
		g, s.by = s.by, nil
	}
	b := r.taken
	r.taken = nil
	return g, b
}

// round tries each backend at most once. It returns the generation whose turn it
// was in the end.
func (s *search) round(g *generation) (*generation, error) {
	var (
		errs []error
		r    = &s.request
	)
	for try := 0; try <= g.retries; try++ {
		if s.pool.abandoned() {
			return g, errAbandoned
		}
		var b *Backend
		if g, b = s.next(g, try == 0); b == nil {
			break
		}
		if waited, err := s.await(b); err != nil || waited && !(b.Available() && b.serves()) {
			s.handshakes.end()
			b.release()
			return g, cmp.Or(err, errMoved)
		}
		if n := len(r.tried); n > 0 {
			r.tried[n-1].stats.retries.Add(1)
		}
		r.tried = append(r.tried, b)
		s.attempts++
		conn, took, err := s.dial(g, b)
		s.handshakes.end()
		if err == nil && b.serves() {
			s.backend, s.conn, s.took = b, conn, took
			b.stats.dialTime.observe(took)
			return g, nil
		}
		if err == nil {
			_ = conn.Close()
			b.release()
			s.attempts-- // it did not fail
			if registry.newest(g.name) != nil {
				return g, errMoved
			}
			continue
		}
		b.release()
		if errors.Is(err, errClientLeft) || errors.Is(err, errAbandoned) {
			return g, err
		}
		if newest := registry.newest(g.name); newest != nil && newest != g && errors.Is(err, errNoCertificates) {
			return g, errMoved
		}
		s.noteFailure(g, b, err)
		errs = append(errs, fmt.Errorf("dialing backend %q: %w", b.address, err))
	}
	return g, errors.Join(append([]error{errNoBackend}, errs...)...)
}

// dial connects to the backend. A client that leaves meanwhile, or a drain
// timeout that ends, ends it.
func (s *search) dial(g *generation, b *Backend) (net.Conn, time.Duration, error) {
	p := newPatience(s, time.Now())
	began := p.began.Add(-s.handshakes.waited()) // of the time that is the backend's
	returns := false
	defer func() {
		if !returns { // a panic, which nobody else gives b back after
			p.end()
			b.release()
		}
	}()
	a := b.approach.Load()
	conn, err := s.approach(p, g, b, a, began)
	if refusal := refusedSession(err); refusal != nil && p.Err() == nil {
		if conn, err = s.approach(p, g, b, a.afresh(), began); err == nil {
			b.channelBy(a.security).refused(refusal)
		}
	}
	took := time.Since(began) - s.handshakes.waited()
	p.end()
	returns = true
	if s.left != reasonNone || err != nil && p.Err() != nil {
		if conn != nil {
			_ = conn.Close()
		}
		return nil, took, p.cause()
	}
	if err != nil {
		b.noteFailure(time.Now(), err)
	} else {
		b.setConnect(time.Now(), nil)
	}
	return conn, took, err
}

// approach connects to b as a says, within the dial timeout from the time it began,
// but for what it has waited for its turns.
func (s *search) approach(p *patience, g *generation, b *Backend, a *approach, began time.Time) (net.Conn, error) {
	deadline := began.Add(g.dialTimeout + s.handshakes.waited())
	conn, err := g.dial(p, a.to(b.target), time.Until(deadline))
	if a == nil || err != nil {
		return conn, err
	}
	returns := false
	defer func() {
		if !returns {
			_ = conn.Close()
		}
	}()
	opened, err := a.open(p, b, conn, deadline, s.request.parties(), s.handshakes.compute)
	returns = true
	return opened, err
}

// parties returns who the connection is between.
func (r *Request) parties() parties {
	who := parties{client: r.client}
	if r.cx != nil {
		who.local = r.cx.LocalAddr()
	}
	return who
}

// noteFailure counts a connect that failed. Unless the fault was on this side it is
// noted, and the backend is checked.
func (b *Backend) noteFailure(at time.Time, err error) {
	b.stats.errors[classify(err)].Add(1)
	b.setError(err)
	if !isScarcity(err) {
		b.setConnect(at, err)
		b.checkSoon()
		b.failed(oneLine(err))
	}
}

// noteFailure keeps a failed connect for the access log.
func (s *search) noteFailure(g *generation, b *Backend, err error) {
	if c := g.logger.Check(zap.DebugLevel, "connect failed"); c != nil {
		c.Write(zap.String("lb", g.name), zap.Stringer("client", s.request.client), zap.String("backend", b.address),
			zap.Int("attempt", s.attempts), errorField(err))
	}
	if len(s.failed) == maxFailedConnects {
		s.failed = append(s.failed[:0], s.failed[1:]...)
	}
	s.failed = append(s.failed, failedConnect{b.address, err})
}

// maxFailedConnects is how many failed connects of one client are kept, the
// last ones; attempts counts them all.
const maxFailedConnects = 16

type failedConnect struct {
	backend string
	err     error
}

// failedConnects is a field of the access log.
type failedConnects []failedConnect

// MarshalLogArray implements zapcore.ArrayMarshaler.
func (l failedConnects) MarshalLogArray(enc zapcore.ArrayEncoder) error {
	for _, f := range l {
		if err := enc.AppendObject(f); err != nil {
			return err
		}
	}
	return nil
}

// MarshalLogObject implements zapcore.ObjectMarshaler.
func (f failedConnect) MarshalLogObject(enc zapcore.ObjectEncoder) error {
	enc.AddString("backend", f.backend)
	enc.AddString("error", oneLine(f.err))
	return nil
}

// oneLine is the error's text, of joined errors too, for a line of the log.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

func errorField(err error) zap.Field { return zap.String("error", oneLine(err)) }
