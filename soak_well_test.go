package tcplb

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// wellPool is the pool of those who are asked whether they are well, by HTTP or a
// dialogue, as each config has it.
const wellPool = "well"

// timeOut is how long a backend stays out that fails clients.
const timeOut = 1500 * time.Millisecond

// wellness is the part of the soak that is about checks' options: one backend after
// the other says that it is ill, fails clients though it says that it is well, or
// leaves and comes back ill. The first is always well.
//
// No connection goes to one that is known to be ill, or taken out, or that has come
// back ill; none stays there; and no other connection ends early.
type wellness struct {
	*soak
	address  string
	backends []*wellBackend
	broken   trouble // of all connections: they are cut by hand

	// The driver's own:
	current *wellBackend
	stories int                // that were begun
	stage   func() (over bool) // of the story; nil = all are well
	doing   string
	since   time.Time // when the stage began
	loads   int       // configs that were loaded
	gone    bool      // the pool, from the config

	out atomic.Pointer[timedOut]
}

// timedOut is a backend that takes no connections from the one time to the other.
type timedOut struct {
	*wellBackend
	from, until time.Time
}

// wellBackend is a server and, at a port of its own, what says how it is.
type wellBackend struct {
	*server
	health *server
	id     byte
	ill    atomic.Bool
	slow   atomic.Bool // to say so
	rude   atomic.Bool // closes before it has said anything
	here   bool        // in the config; the driver's
	closed phase       // no new connection may go to it
	broken trouble     // that its connections are in
	guests atomic.Int64
	stays  atomic.Int64 // who stay until they are cut, one at most
}

func (s *soak) startWellness() {
	w := &wellness{soak: s, address: freeAddress(s.t)}
	for i := range 3 {
		b := &wellBackend{id: byte(i), here: true}
		b.server = startServer(s.t, b.serve)
		b.health = startServer(s.t, b.tell)
		w.backends = append(w.backends, b)
	}
	s.well = w
}

// serve sends back what comes, after its number.
func (b *wellBackend) serve(c *net.TCPConn) {
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil || b.rude.Load() {
		return
	}
	b.guests.Add(1)
	defer b.guests.Add(-1)
	if _, err := c.Write([]byte{b.id}); err == nil {
		echo(c)
	}
}

// tell answers a check of either kind.
func (b *wellBackend) tell(c *net.TCPConn) {
	var question []byte
	for buf := make([]byte, 512); !bytes.HasSuffix(question, []byte("\r\n\r\n")) && string(question) != "PING\r\n"; {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		question = append(question, buf[:n]...)
	}
	ill := b.ill.Load()
	if b.slow.Load() {
		pause(50*time.Millisecond, nil)
	}
	answer := "+PONG\r\n"
	switch byHTTP := len(question) > 6; {
	case byHTTP && ill:
		answer = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
	case byHTTP:
		answer = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
	case ill:
		answer = "-LOADING\r\n"
	}
	_, _ = io.WriteString(c, answer)
}

// config is the pool's server.
func (w *wellness) config() string {
	if w.gone {
		return ""
	}
	var list []string
	for _, b := range w.backends {
		if b.here {
			_, port, _ := net.SplitHostPort(b.health.address)
			list = append(list, fmt.Sprintf(`{"address":%q,"health_port":%s}`, b.address, port))
		}
	}
	ask := []string{`"uri":"/healthz"`, `"dialogue":[{"send":"PING\\r\\n"},{"expect":"+PONG"}]`}[w.rnd.IntN(2)]
	return fmt.Sprintf(`,%q:{"listen":["tcp_lb/%s"],"routes":[{"handle":[{"handler":"tcp_lb","name":%q,"drain_timeout":%q,"access_log":true,
		"load_balancing":{"try_duration":"30s","try_interval":"10ms"},"close_if_unhealthy":"0s",
		"health_checks":{"active":{"interval":"50ms","fast_interval":"10ms","timeout":"10s","initially_unhealthy":true,%s},"passive":{"fail_duration":%q,"max_fails":2}},
		"backends":[%s]}]}]}`, w.address, w.address, wellPool, shortDrain, ask, timeOut, strings.Join(list, ","))
}

// state returns what the balancer has of the backend; nil = it does not know it.
func (b *wellBackend) state() *Backend {
	for _, m := range registry.newest(wellPool).members() {
		if m.Backend.address == b.address {
			return m.Backend
		}
	}
	return nil
}

// step takes the story on as far as it goes. It never waits.
func (w *wellness) step() {
	if w.stage == nil {
		w.current = w.backends[1+w.rnd.IntN(len(w.backends)-1)]
		[]func(*wellBackend){w.fallIll, w.turnRude, w.leave}[w.stories%numStories](w.current)
		w.stories++
	}
	for before := ""; before != w.doing; {
		before = w.doing
		if w.stage() {
			w.count("well: " + w.doing)
			w.stage = nil
			return
		}
	}
	if time.Since(w.since) > hangTimeout {
		w.add("backend %d of pool %s was not %s", w.current.id, wellPool, w.doing)
		w.since = time.Now()
	}
}

const numStories = 3

// finish comes to the end of the story, and of each at least once.
func (w *wellness) finish() {
	for (w.stage != nil || w.stories < numStories) && w.none() {
		w.reload()
		w.step()
		pause(10*time.Millisecond, nil)
	}
}

// next begins a stage, which ends when over says so.
func (w *wellness) next(doing string, over func() bool) (no bool) {
	w.doing, w.stage, w.since = doing, over, time.Now()
	return false
}

// fallIll has the backend found down, its connections cut, and others kept away.
func (w *wellness) fallIll(b *wellBackend) {
	w.next("visited", func() bool {
		if b.stays.Load() == 0 {
			return false
		}
		b.broken.begin()
		b.ill.Store(true)
		return w.next("found ill", func() bool {
			if b.state().healthy.Load() {
				return false
			}
			b.closed.set(true)
			return w.next("left as it is ill", func() bool { return b.guests.Load() == 0 && w.getWell(b) })
		})
	})
}

// getWell has it found up again, after a while in which it was to have nobody.
func (w *wellness) getWell(b *wellBackend) (no bool) {
	began := w.loads
	return w.next("still ill for the next config", func() bool {
		if w.loads == began { // over a load, which is no reason to believe it
			return false
		}
		b.closed.set(false)
		b.slow.Store(false)
		b.ill.Store(false)
		return w.next("found well", func() bool {
			if !b.state().Available() {
				return false
			}
			b.broken.end()
			return true
		})
	})
}

// turnRude has the backend taken out since it fails clients, for a time in which it
// gets none.
func (w *wellness) turnRude(b *wellBackend) {
	b.broken.begin()
	b.rude.Store(true)
	w.next("taken out", func() bool {
		until := b.state().ejected.Load()
		if until == 0 {
			return false
		}
		w.out.Store(&timedOut{b, time.Now(), time.Unix(0, until)})
		b.rude.Store(false)
		return w.next("taken back", func() bool {
			if b.state().ejected.Load() != 0 {
				return false
			}
			b.broken.end()
			return true
		})
	})
}

// leave takes the backend out of the next config, and has it come back ill with
// another one.
func (w *wellness) leave(b *wellBackend) {
	began := w.loads
	b.broken.begin()
	b.here = false
	w.next("out of the config", func() bool {
		if w.loads == began || b.guests.Load() > 0 {
			return false
		}
		b.closed.set(true)
		b.ill.Store(true)
		b.slow.Store(true) // nothing is known of it for so long
		b.here = true
		began = w.loads
		return w.next("back in the config", func() bool {
			if w.loads == began {
				return false
			}
			return b.state().isChecked() && w.getWell(b)
		})
	})
}

// connect makes one connection and judges how it went.
func (w *wellness) connect(rnd *rand.Rand, stay bool) {
	began, hands := time.Now(), w.broken.mark()
	closed, broken := make([]uint64, len(w.backends)), make([]troubleMark, len(w.backends))
	for i, b := range w.backends {
		closed[i], broken[i] = b.closed.n.Load(), b.broken.mark()
	}
	id := -1
	err := w.converse(rnd, stay, func(n int) {
		id = n
		b := w.backends[n]
		if b.closed.heldSince(closed[n]) {
			w.add("backend %d of pool %s got a connection though it is known to be ill", n, wellPool)
		}
		if out := w.out.Load(); out != nil && out.wellBackend == b && began.After(out.from) && time.Now().Before(out.until) {
			w.add("backend %d of pool %s got a connection though it is taken out", n, wellPool)
		}
	})
	excused := w.broken.since(hands)
	for i, b := range w.backends {
		if id < 0 || i == id {
			excused = excused || b.broken.since(broken[i])
		}
	}
	if err != nil && !excused {
		w.add("a connection to backend %d of pool %s: %v", id, wellPool, err)
	}
	w.recordsMu.Lock()
	defer w.recordsMu.Unlock()
	w.conversations++
}

// converse talks to a backend, for a moment; or until it is cut, which the first is
// not and the others bear from one each. It tells met who that is.
func (w *wellness) converse(rnd *rand.Rand, stay bool, met func(id int)) error {
	conn, err := net.DialTimeout("tcp", w.address, hangTimeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * hangTimeout))
	b := []byte{'x'}
	say := func() error {
		if _, err := conn.Write(b); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, b)
		return err
	}
	if err := say(); err != nil {
		return fmt.Errorf("before it said who it is: %w", err)
	}
	met(int(b[0]))
	stays := &w.backends[b[0]].stays
	stay = stay && b[0] > 0 && stays.CompareAndSwap(0, 1)
	if stay {
		defer stays.Store(0)
	}
	for range rnd.IntN(5) {
		if err := say(); err != nil {
			return err
		}
	}
	for stay && !isClosed(w.stop) {
		time.Sleep(5 * time.Millisecond)
		if err := say(); err != nil {
			return err
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil && !relay.IsReset(err) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	_, err = io.Copy(io.Discard, conn)
	return err
}
