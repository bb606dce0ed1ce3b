package tcplb

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// limited are backends that may have so many connections each.
func limited(limit int, addresses ...string) []BackendConfig {
	list := backendList(addresses...)
	for i := range list {
		list[i].MaxConnections = limit
	}
	return list
}

func waitsFor(d time.Duration) *LoadBalancing {
	return &LoadBalancing{TryDuration: caddy.Duration(d)}
}

// queued is a client of a fake network that looks for a backend.
type queued struct {
	link
	err  error
	done chan struct{}
}

// lineUp has a client look for a backend, and returns when it waits or is done.
func lineUp(g *generation) *queued {
	q := &queued{done: make(chan struct{})}
	go func() {
		defer close(q.done)
		q.link, q.err = connect(g)
	}()
	synctest.Wait()
	return q
}

func (q *queued) isServed() bool { return isClosed(q.done) && q.err == nil }

func servedOf(clients []*queued) (numbers []int) {
	for i, q := range clients {
		if q.isServed() {
			numbers = append(numbers, i)
		}
	}
	return numbers
}

func upTo(n int) (list []int) {
	for i := range n {
		list = append(list, i)
	}
	return list
}

// A place that is freed goes to the first who waits, and wakes nobody else.
func TestPlacesGoInOrderOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
			h.Backends = limited(2, one, two)
			h.LoadBalancing = waitsFor(time.Hour)
			checksOff(h)
		})
		g.start()
		var clients []*queued
		for range 20 {
			clients = append(clients, lineUp(g))
		}
		require.Equal(t, upTo(4), servedOf(clients))
		require.EqualValues(t, 16, g.pool.waiters.waiting.Load())
		for i := range 16 {
			clients[i].release()
			synctest.Wait()
			require.Equal(t, upTo(5+i), servedOf(clients), "the next one, and only that")
		}
		for _, q := range clients[16:] {
			q.release()
		}
		require.Zero(t, g.pool.waiters.waiting.Load())
		require.EqualValues(t, 2, g.pool.waiters.arrived/8)
		g.stop()
	})
}

// Without a time to wait, or when it is over, a client is told that all are full,
// which is no outage.
func TestFullIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, d := range []time.Duration{0, 5 * time.Second} {
			g, logs := testGeneration(t, newFakeNet(), func(h *Handler) {
				h.Backends = withBackups(limited(1, one), spare)
				h.LoadBalancing = waitsFor(d)
				checksOff(h)
			})
			g.start()
			l, err := connect(g)
			require.NoError(t, err)
			began := time.Now()
			far, near := net.Pipe()
			g.serve(layer4Connection(near))
			require.Equal(t, d, time.Since(began), "and a backup is none of its business")
			expectClosed(t, far)
			require.EqualValues(t, 1, g.pool.closed[reasonMaxConnections].Load())
			require.Zero(t, g.pool.closed[reasonNoBackend].Load())
			require.Equal(t, 1, logs.FilterMessageSnippet("every available backend has its max_connections").Len())
			require.Zero(t, logs.FilterMessageSnippet("no backend is available").Len())
			_, count, sum := g.pool.times.wait.snapshot()
			require.EqualValues(t, min(1, d), count)
			require.Equal(t, d.Seconds(), sum)
			l.release()
			g.stop()
		}
	})
}

// Who waits for a place is not woken now and then, and starts no probes.
func TestWaitingForAPlaceIsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		picks := 0
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
			h.Backends = limited(1, one)
			h.LoadBalancing = waitsFor(time.Hour)
			checksOff(h)
		})
		g.policy = policyFunc(func(r *Request, l []Candidate) *Backend {
			picks++
			r.Take(l[0].Backend)
			return r.taken
		})
		g.start()
		l, err := connect(g)
		require.NoError(t, err)
		clients := []*queued{lineUp(g), lineUp(g), lineUp(g)}
		before := picks
		time.Sleep(time.Minute)
		require.Equal(t, before, picks)
		require.LessOrEqual(t, picks, 3, "one of those who came looked, the others knew")
		l.release()
		for _, q := range clients {
			<-q.done
			require.NoError(t, q.err)
			q.release()
		}
		g.stop()
	})
}

// Whoever makes room, those who wait have it before anybody who comes then: a
// raised limit, a backend that comes up, one that joins, a limit that is taken
// away. As many are served as fit.
func TestWhatMakesRoomServesTheLine(t *testing.T) {
	noPoolsYet(t)
	const waiting = 10
	for name, c := range map[string]struct {
		change func(h *Handler)
		want   int
	}{
		"a raised limit":     {func(h *Handler) { h.Backends = limited(4, one) }, 3},
		"one more backend":   {func(h *Handler) { h.Backends = append(h.Backends, limited(5, two)...) }, 5},
		"no limit":           {func(h *Handler) { h.Backends = backendList(one) }, waiting},
		"other backends":     {func(h *Handler) { h.Backends = limited(2, two, three) }, 4},
		"the same":           {func(*Handler) {}, 0},
		"a lower limit":      {func(h *Handler) { h.LoadBalancing = waitsFor(2 * time.Hour) }, 0},
		"backups alone":      {func(h *Handler) { h.Backends = withBackups(nil, two) }, waiting},
		"a backup beside it": {func(h *Handler) { h.Backends = withBackups(h.Backends, two) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				run := func(change func(*Handler)) *generation {
					g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
						h.Backends = limited(1, one)
						h.LoadBalancing = waitsFor(time.Hour)
						checksOff(h)
						change(h)
					})
					g.start()
					return g
				}
				old := run(func(*Handler) {})
				clients := []*queued{lineUp(old)}
				for range waiting {
					clients = append(clients, lineUp(old))
				}
				g := run(c.change)
				synctest.Wait()
				require.Equal(t, upTo(1+c.want), servedOf(clients))
				old.stop()
				synctest.Wait()
				require.Equal(t, upTo(1+c.want), servedOf(clients))
				for _, q := range clients {
					<-q.done
					require.NoError(t, q.err)
					q.release()
					synctest.Wait()
				}
				g.stop()
				require.Empty(t, registry.snapshot())
			})
		})
	}
}

// A backend of few places that comes up after an outage serves those who came
// first.
func TestOutageEndsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = limited(3, one)
			h.LoadBalancing = waitsFor(time.Hour)
		})
		g.start()
		synctest.Wait()
		var clients []*queued
		for range 10 {
			clients = append(clients, lineUp(g))
			time.Sleep(100 * time.Millisecond) // so that their intervals are not in step
		}
		f.fail(one, nil)
		time.Sleep(time.Minute)
		require.Equal(t, upTo(3), servedOf(clients))
		for i, q := range clients {
			<-q.done
			q.release()
			synctest.Wait()
			require.Equal(t, upTo(min(10, i+4)), servedOf(clients))
		}
		g.stop()
	})
}

// A connect that fails frees its place for the next one, and its client waits
// where it stood, for another backend or the try interval.
func TestFailedConnectFreesItsPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = limited(1, one, two)
			h.LoadBalancing = waitsFor(time.Hour)
			checksOff(h)
		})
		g.start()
		first, second := lineUp(g), lineUp(g)
		require.True(t, first.isServed() && second.isServed())
		var dead, alive *queued
		for _, q := range []*queued{first, second} {
			if q.backend.address == one {
				dead = q
			} else {
				alive = q
			}
		}
		f.fail(one, errRefused)
		third, fourth := lineUp(g), lineUp(g)
		dead.release() // to the third, which fails, and to the fourth, too
		synctest.Wait()
		require.False(t, isClosed(third.done) || isClosed(fourth.done))
		require.GreaterOrEqual(t, len(f.times(one)), 3)
		alive.release()
		synctest.Wait()
		require.True(t, third.isServed(), "it came before the fourth")
		require.Equal(t, two, third.backend.address)
		f.fail(one, nil)
		time.Sleep(defaultTryInterval)
		synctest.Wait()
		require.True(t, fourth.isServed())
		require.Equal(t, one, fourth.backend.address)
		third.release()
		fourth.release()
		g.stop()
	})
}

// A client that leaves is gone from the line, and what it was given on the way out
// goes to the next.
func TestLeaversPassTheirTurnOn(t *testing.T) {
	g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
		h.Backends = limited(1, one)
		h.LoadBalancing = waitsFor(time.Hour)
		checksOff(h)
	})
	g.start()
	l, err := connect(g)
	require.NoError(t, err)
	g.pool.active.Add(2)
	leaver, next := newSearch(g), newSearch(g)
	require.False(t, leaver.stand(g, true))
	require.False(t, next.stand(g, true))
	l.release() // the leaver has its turn, and does not know
	require.EqualValues(t, 1, g.pool.waiters.waiting.Load())
	require.Nil(t, next.waiter.turn.by)
	leaver.end()
	require.True(t, next.stand(g, false))
	require.Same(t, g, next.by)
	next.end()
	require.Zero(t, g.members()[0].Backend.Load())
	g.pool.leave()
	g.pool.leave()
	g.stop()
}

func newSearch(g *generation) *search {
	s := &search{pool: g.pool, began: time.Now()}
	s.waiter.request, s.waiter.began = &s.request, s.began
	return s
}

// A policy may leave a free place to others: they are looked at, too. One that
// gives back what it took, or panics, holds nobody up.
func TestLineWithAnyPolicy(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		var fault atomic.Value // of the odd clients
		fault.Store("declines")
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
			h.Backends = limited(1, one)
			h.LoadBalancing = waitsFor(time.Hour)
			checksOff(h)
		})
		g.policy = policyFunc(func(r *Request, l []Candidate) *Backend {
			odd := r.Client().Port()%2 == 1
			switch {
			case odd && fault.Load() == "declines":
				return nil
			case odd && fault.Load() == "panics":
				panic("out of luck")
			}
			if !r.Take(l[0].Backend) || odd {
				return nil
			}
			return l[0].Backend
		})
		g.start()
		ask := func(port int) *queued {
			q := &queued{done: make(chan struct{})}
			go func() {
				defer close(q.done)
				defer func() {
					if v := recover(); v != nil {
						q.err = fmt.Errorf("%v", v)
					}
				}()
				g.pool.active.Add(1)
				defer g.pool.leave()
				s := search{pool: g.pool, request: Request{client: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: port}}, began: time.Now()}
				_, q.err = s.find(g)
				q.link = s.link
			}()
			synctest.Wait()
			return q
		}
		for _, f := range []string{"declines", "gives back", "panics"} {
			fault.Store("")
			first, odd, even := ask(2), ask(1), ask(4)
			fault.Store(f)
			require.True(t, first.isServed())
			require.False(t, even.isServed())
			first.release()
			synctest.Wait()
			require.True(t, even.isServed(), f)
			even.release()
			if f == "panics" {
				<-odd.done
				require.ErrorContains(t, odd.err, "out of luck")
				require.ErrorContains(t, odd.err, "line_test.go", "and says where")
				continue
			}
			require.False(t, isClosed(odd.done))
			fault.Store("panics") // a way to end it
			time.Sleep(time.Second)
			<-odd.done
		}
		require.Zero(t, g.members()[0].Backend.Load())
		g.stop()
		require.Empty(t, registry.snapshot())
	})
}

// The line ends with its pool: nobody waits for what no config has.
func TestLineEndsWithItsPool(t *testing.T) {
	noPoolsYet(t)
	synctest.Test(t, func(t *testing.T) {
		g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
			h.Backends = limited(1, one)
			h.LoadBalancing = waitsFor(time.Hour)
			checksOff(h)
		})
		g.start()
		l, err := connect(g)
		require.NoError(t, err)
		clients := []*queued{lineUp(g), lineUp(g)}
		g.stop()
		for _, q := range clients {
			<-q.done
			require.Error(t, q.err)
		}
		l.release()
		require.Empty(t, registry.snapshot())
	})
}

// gauge counts connections, and the most that there were at once.
type gauge struct{ now, most, all atomic.Int64 }

func (g *gauge) enter() {
	g.all.Add(1)
	n := g.now.Add(1)
	for m := g.most.Load(); n > m && !g.most.CompareAndSwap(m, n); m = g.most.Load() {
	}
}

// countingServer says hello, and keeps its clients until they end.
func countingServer(t testing.TB, g *gauge) *server {
	return startServer(t, func(c *net.TCPConn) {
		g.enter()
		defer g.now.Add(-1)
		_, _ = io.WriteString(c, "!")
		_, _ = io.Copy(io.Discard, c)
	})
}

// Five places and five hundred clients, some of whom leave: each is served once, in
// the order of arrival, and the backend never sees more than five, also over
// reloads.
func TestFivePlacesForFiveHundred(t *testing.T) {
	for _, network := range []string{"", "tcp_lb/"} {
		t.Run(network, func(t *testing.T) { testFivePlaces(t, network) })
	}
}

func testFivePlaces(t *testing.T, network string) {
	watchLeftovers(t)
	const places, clients = 5, 500
	var seen gauge
	s, lb := countingServer(t, &seen), freeAddress(t)
	config := func(i int) string {
		return lbConfig(network+lb, fmt.Sprintf(`"dial_timeout":"%ds",%s,"load_balancing":{"try_duration":"1h"},"backends":[{"address":%q,"max_connections":%d}]}`,
			10+i, checksDisabled, s.address, places))
	}
	runCaddy(t, config(0))
	var (
		list      []*net.TCPConn
		connected []int
		order     = make(chan int, clients)
		wg        sync.WaitGroup
	)
	serve := func(i int, c *net.TCPConn) {
		defer wg.Done()
		if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
			order <- i
		}
	}
	for i := range clients {
		list = append(list, dialClient(t, lb))
		wg.Add(1)
		go serve(i, list[i])
		if i < places { // one after the other, so that the order of arrival is known
			require.Equal(t, i, <-order)
			connected = append(connected, i)
		} else {
			eventuallyWaiting(t, i+1-places)
		}
	}
	left := make(map[int]bool)
	for len(left) < 50 {
		i := places + rand.IntN(clients-places)
		if !left[i] {
			left[i] = true
			require.NoError(t, list[i].SetLinger(0))
			require.NoError(t, list[i].Close())
		}
	}
	if canSeeClientsLeave {
		eventuallyWaiting(t, clients-places-len(left))
	}
	for i := places; i < clients; i++ {
		if left[i] {
			continue
		}
		require.NoError(t, list[connected[0]].Close()) // one place
		next := <-order
		require.Equal(t, i, next, "who is served")
		connected = append(connected[1:], next)
		if i%100 == 0 {
			reload(t, config(i))
		}
	}
	for _, i := range connected {
		require.NoError(t, list[i].Close())
	}
	wg.Wait()
	require.Empty(t, order, "each once")
	require.LessOrEqual(t, seen.most.Load(), int64(places))
	requireBooksBalance(t, int(seen.all.Load()))
	require.Zero(t, metric(t, "waiting_connections", nil))
	require.EqualValues(t, places, metric(t, "backend_max_connections", nil))
	if canSeeClientsLeave {
		require.EqualValues(t, clients-len(left), seen.all.Load(), "no leaver reached the backend")
	}
	require.EqualValues(t, clients-places, metric(t, "wait_duration_seconds", nil))
}

// canSeeClientsLeave: a client that is reset while it waits is found at once.
const canSeeClientsLeave = runtime.GOOS == "linux"

// Clients, leavers, failing connects, verdicts, reloads that change limits and
// tiers, and an end in the middle of it: no backend is ever over its limit, nobody
// is held up for good, and nothing is left over.
func TestLineUnderEverythingAtOnce(t *testing.T) {
	noPoolsYet(t)
	var (
		f      = newFakeNet()
		counts = map[string]*gauge{one: new(gauge), two: new(gauge), three: new(gauge)}
		flaky  atomic.Bool
	)
	dial := func(_ context.Context, tg target, _ time.Duration) (net.Conn, error) {
		g := counts[tg.String()]
		g.enter()
		if flaky.Load() && rand.IntN(4) == 0 {
			g.now.Add(-1)
			return nil, errors.New("flaky")
		}
		c, far := net.Pipe()
		_ = far.Close()
		return &countedConn{Conn: c, g: g}, nil
	}
	run := func(limit int) *generation {
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = limited(limit, one, two, three)
			h.Backends[2].Backup = limit%2 == 0
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(hangTimeout), TryInterval: caddy.Duration(time.Millisecond), Retries: new(limit % 3)}
			h.DrainTimeout = new(caddy.Duration(hangTimeout))
			checksOff(h)
		})
		g.dial = dial
		g.start()
		return g
	}
	const most = 4
	current := atomic.Pointer[generation]{}
	current.Store(run(most))
	stop := make(chan struct{})
	var wg, clients sync.WaitGroup
	wg.Go(func() {
		for i := 0; !isClosed(stop); i++ {
			old := current.Load()
			current.Store(run(1 + i%most))
			old.stop()
			flaky.Store(i%3 > 0)
			time.Sleep(time.Millisecond)
		}
	})
	wg.Go(func() {
		for !isClosed(stop) {
			b := current.Load().members()[rand.IntN(3)].Backend
			setHand(t, t.Name(), b.address, handChange{state: new(stateDrain)})
			setHand(t, t.Name(), b.address, handChange{state: new(stateReady)})
		}
	})
	var served, refused atomic.Int64
	for range 60 {
		clients.Go(func() {
			for range 50 {
				l, err := connect(current.Load().live())
				if err != nil {
					refused.Add(1)
					continue
				}
				served.Add(1)
				if rand.IntN(2) == 0 {
					time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
				}
				_ = l.conn.Close()
				l.release()
			}
		})
	}
	clients.Wait()
	require.EqualValues(t, 3000, served.Load()+refused.Load())
	require.Zero(t, refused.Load())
	close(stop)
	wg.Wait()
	last := current.Load()
	for address, g := range counts {
		require.LessOrEqual(t, g.most.Load(), int64(most), address)
		require.Zero(t, g.now.Load(), address)
	}
	require.Zero(t, last.pool.waiters.waiting.Load())
	require.Zero(t, last.pool.waiters.n.Load())
	last.stop()
	require.Empty(t, registry.snapshot())
}

type countedConn struct {
	net.Conn
	g    *gauge
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.g.now.Add(-1) })
	return c.Conn.Close()
}

// Every policy passes over the full, and finds the one that has a place.
func TestEveryPolicyPassesOverTheFull(t *testing.T) {
	for name, policy := range map[string]SelectionPolicy{
		"round_robin": RoundRobin{}, "least_conn": LeastConn{}, "random": Random{}, "random_choose": &RandomChoose{Choose: 2}, "first": First{}, "ip_hash": IPHash{},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var addresses []string
				for i := range 100 {
					addresses = append(addresses, fmt.Sprintf("10.0.0.%d:80", i))
				}
				g, _ := testGeneration(t, newFakeNet(), func(h *Handler) {
					h.Backends = limited(1, addresses...)
					h.LoadBalancing = waitsFor(time.Hour)
					checksOff(h)
				})
				g.policy = policy
				g.start()
				var clients []*queued
				for range 120 {
					clients = append(clients, lineUp(g))
				}
				require.Equal(t, upTo(100), servedOf(clients))
				for _, i := range rand.Perm(20) {
					clients[i].release()
					synctest.Wait()
				}
				require.Equal(t, upTo(120), servedOf(clients))
				for _, q := range clients[20:] {
					q.release()
				}
				g.stop()
			})
		})
	}
}
