package tcplb

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// pickFor picks for a client that has tried nothing.
func pickFor(p Picker, client string) *Backend {
	r := testRequest(client)
	return r.pickBy(p)
}

func testRequest(client string) Request {
	var addr net.Addr
	if client != "" {
		addr = &net.TCPAddr{IP: net.ParseIP(client), Port: 5}
	}
	return Request{client: addr}
}

// endOne ends a connection that was picked by p.
func endOne(p Picker, b *Backend) {
	b.load.Add(-1)
	if o, ok := p.(LoadObserver); ok {
		o.LoadChanged(b)
	}
}

func TestPoliciesWithoutBackends(t *testing.T) {
	for name, policy := range allPolicies() {
		t.Run(name, func(t *testing.T) {
			require.Nil(t, pickFor(policy.NewPicker(nil, nil), "192.0.2.1"))
		})
	}
}

func allPolicies() map[string]SelectionPolicy {
	return map[string]SelectionPolicy{
		"round_robin":   RoundRobin{},
		"least_conn":    LeastConn{},
		"random":        Random{},
		"random_choose": &RandomChoose{Choose: 2},
		"first":         First{},
		"ip_hash":       IPHash{},
	}
}

// TestPoliciesTryAll takes every backend once for one connection that fails to
// connect, each counted, and then none.
func TestPoliciesTryAll(t *testing.T) {
	for name, policy := range allPolicies() {
		t.Run(name, func(t *testing.T) {
			list := testCandidates(1, 256, 7, 1, 30)
			p := policy.NewPicker(list, nil)
			r := testRequest("192.0.2.1")
			seen := make(map[*Backend]bool)
			for range list {
				b := r.pickBy(p)
				require.NotNil(t, b)
				require.False(t, seen[b], "picked twice")
				require.EqualValues(t, 1, b.Load())
				seen[b] = true
				r.tried = append(r.tried, b)
			}
			require.Nil(t, r.pickBy(p))
		})
	}
}

func TestFirst(t *testing.T) {
	list := testCandidates(1, 256, 1)
	p := First{}.NewPicker(list, nil)
	for range 3 {
		require.Equal(t, list[0].Backend.Address(), pickFor(p, "192.0.2.1").Address())
	}
	list[0].Backend.setHealthy(false)
	require.Equal(t, list[1].Backend.Address(), pickFor(p, "192.0.2.1").Address())
}

func TestLeastConnFollowsLoad(t *testing.T) {
	list := testCandidates(1, 1, 2)
	a, b, c := list[0].Backend, list[1].Backend, list[2].Backend
	p := LeastConn{}.NewPicker(list, nil)
	a.load.Store(3)
	b.load.Store(1)
	c.load.Store(4)
	for _, x := range list {
		p.(LoadObserver).LoadChanged(x.Backend)
	}
	require.Equal(t, b.Address(), pickFor(p, "").Address(), "1 a unit, against 3 and 2")
	require.Equal(t, c.Address(), pickFor(p, "").Address(), "level with b, which had its turn")
	require.Equal(t, b.Address(), pickFor(p, "").Address(), "2 a unit, against 3 and 2.5")
}

// TestLeastConnIsLevel is the policy's definition: after any picks, also at once,
// and when connections have ended in any order, whoever comes next goes where the
// fewest are, so that picks alone never leave two backends further apart than
// one connection for each unit of weight.
func TestLeastConnIsLevel(t *testing.T) {
	for _, weights := range [][]int{{1, 1, 1, 1}, {1, 2, 3}, {256, 1, 17, 17, 3}, {5}} {
		t.Run(fmt.Sprint(weights), func(t *testing.T) {
			list := testCandidates(weights...)
			p := LeastConn{}.NewPicker(list, nil)
			total := 0
			for _, w := range weights {
				total += w
			}
			var wg sync.WaitGroup
			for g := range 8 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(g), 1))
					var open []*Backend
					for range 2000 {
						if len(open) > 0 && r.IntN(3) == 0 {
							i := r.IntN(len(open))
							endOne(p, open[i])
							open[i] = open[len(open)-1]
							open = open[:len(open)-1]
							continue
						}
						open = append(open, pickFor(p, ""))
					}
					for _, b := range open {
						endOne(p, b)
					}
				})
			}
			wg.Wait()
			for _, c := range list {
				require.Zero(t, c.Backend.Load())
			}
			requireHeap(t, p.(*byLoad))

			const n = 3000
			for range 6 {
				wg.Go(func() {
					for range n / 6 {
						pickFor(p, "")
					}
				})
			}
			wg.Wait()
			requireHeap(t, p.(*byLoad))
			for _, c := range list {
				ideal := float64(n) / float64(total)
				require.InDelta(t, ideal, perWeight(c), 1, "load for each unit of weight %d", c.Weight)
			}
		})
	}
}

func requireHeap(t *testing.T, l *byLoad) {
	t.Helper()
	for i, k := range l.heap {
		e := l.entries[k.entry]
		require.EqualValues(t, i, e.at)
		require.Equal(t, e.backend.Load(), e.load)
		require.Equal(t, float64(e.load)/e.weight, k.load)
		if i > 0 {
			require.False(t, l.heap[i].before(&l.heap[(i-1)/arity]), "place %d is before its parent", i)
		}
	}
}

// TestLeastConnTakesTurns has connections that end before the next one comes, so
// that all are always level: then weights still count.
func TestLeastConnTakesTurns(t *testing.T) {
	list := testCandidates(1, 2, 5)
	p := LeastConn{}.NewPicker(list, nil)
	got := make(map[*Backend]int)
	for range 80 {
		b := pickFor(p, "")
		got[b]++
		endOne(p, b)
	}
	for _, c := range list {
		require.InDelta(t, 10*c.Weight, got[c.Backend], 1)
	}
	// One that was busy for long does not catch up.
	busy := list[2].Backend
	busy.load.Store(1000)
	p.(LoadObserver).LoadChanged(busy)
	for range 300 {
		endOne(p, pickFor(p, ""))
	}
	busy.load.Store(0)
	p.(LoadObserver).LoadChanged(busy)
	clear(got)
	for range 80 {
		b := pickFor(p, "")
		got[b]++
		endOne(p, b)
	}
	for _, c := range list {
		require.InDelta(t, 10*c.Weight, got[c.Backend], 2)
	}
}

// TestLeastConnSeesOthers has connections at its backends that other pickers
// counted, as of the config before.
func TestLeastConnSeesOthers(t *testing.T) {
	list := testCandidates(1, 1)
	p := LeastConn{}.NewPicker(list, nil)
	list[0].Backend.load.Add(5)
	for range 5 {
		require.Equal(t, list[1].Backend.Address(), pickFor(p, "").Address())
	}
}

func TestLotteryIsExact(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		weights := make([]int, 1+r.IntN(40))
		total := 0
		for i := range weights {
			weights[i] = 1 + r.IntN(256)
			total += weights[i]
		}
		l := newLottery(testCandidates(weights...))
		share := make([]float64, len(weights))
		for i, ticket := range l.tickets {
			own := float64(ticket.own) / math.Pow(2, 64) / float64(len(weights))
			share[i] += own
			share[ticket.other] += 1/float64(len(weights)) - own
		}
		for i, w := range weights {
			require.InDelta(t, float64(w)/float64(total), share[i], 1e-12, "weights %v", weights)
		}
	}
}

func TestRandomDrawsByWeight(t *testing.T) {
	list := testCandidates(1, 2, 7)
	p := Random{}.NewPicker(list, nil)
	const n = 100_000
	for range n {
		pickFor(p, "")
	}
	for _, c := range list {
		share := float64(c.Weight) / 10
		sigma := math.Sqrt(n * share * (1 - share))
		require.InDelta(t, n*share, float64(c.Backend.Load()), 7*sigma) // once in 10¹¹ runs
	}
}

// TestRandomChooseSpread compares with theory: when as many connections as
// backends have come, the share of backends that have at least i of them follows
// s'(i) = s(i-1)² - s(i)² over one unit of time (Mitzenmacher 2001, section 2).
func TestRandomChooseSpread(t *testing.T) {
	const n = 10_000
	s := [6]float64{1}
	const steps = 10_000
	for range steps {
		for i := len(s) - 1; i > 0; i-- {
			s[i] += (s[i-1]*s[i-1] - s[i]*s[i]) / steps
		}
	}
	list := testCandidates(make1s(n)...)
	p := (&RandomChoose{Choose: 2}).NewPicker(list, nil)
	for range n {
		pickFor(p, "")
	}
	for i := 1; i < len(s); i++ {
		atLeast := 0
		for _, c := range list {
			if c.Backend.Load() >= int64(i) {
				atLeast++
			}
		}
		require.InDelta(t, s[i]*n, float64(atLeast), 7*math.Sqrt(n*s[i])+1, "backends with %d or more", i)
	}
}

func make1s(n int) []int {
	weights := make([]int, n)
	for i := range weights {
		weights[i] = 1
	}
	return weights
}

func TestRandomChooseOfFew(t *testing.T) {
	list := testCandidates(1, 1, 1)
	p := (&RandomChoose{Choose: 100}).NewPicker(list, nil)
	list[0].Backend.load.Store(4)
	list[1].Backend.load.Store(2)
	list[2].Backend.load.Store(3)
	seen := make(map[*Backend]int)
	for range 100 {
		b := pickFor(p, "")
		seen[b]++
		b.load.Add(-1)
	}
	require.Greater(t, seen[list[1].Backend], 95, "200 draws out of three leave one out once in 10³⁴ times")
}

// namedCandidates have the addresses as names.
func namedCandidates(weights map[string]int) []Candidate {
	var list []Candidate
	for name, w := range weights { // in any order
		list = append(list, Candidate{Backend: newBackend(&pool{}, name, target{text: name}), Weight: w})
	}
	return list
}

// TestMaglevIsTheDocumentedTable holds golden values that another program
// computed from the documentation of IPHash alone.
func TestMaglevIsTheDocumentedTable(t *testing.T) {
	many := make(map[string]int)
	for i := range 300 {
		many[fmt.Sprintf("10.0.%d.%d:80", i/250, i%250+1)] = 1 + i%7
	}
	clients := []string{"192.0.2.1", "192.0.2.2", "198.51.100.7", "2001:db8:1:2::1", "2001:db8:1:3::1"}
	for _, c := range []struct {
		name     string
		backends map[string]int
		size     int
		digest   string // of the places' names, a line each
		picks    []string
	}{
		{"three of one weight", map[string]int{"10.0.0.1:80": 1, "10.0.0.2:80": 1, "10.0.0.3:80": 1}, 65537, "aa0dd386fb40d938",
			[]string{"10.0.0.1:80", "10.0.0.1:80", "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"}},
		{"weights", map[string]int{"10.0.0.1:80": 3, "10.0.0.2:80": 1, "db.internal:5432": 2}, 65537, "67186c8f274b7910",
			[]string{"10.0.0.1:80", "10.0.0.1:80", "10.0.0.1:80", "db.internal:5432", "db.internal:5432"}},
		{"large", many, 655373, "56146d9ca39818f8",
			[]string{"10.0.1.44:80", "10.0.0.188:80", "10.0.0.6:80", "10.0.0.165:80", "10.0.1.24:80"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := IPHash{}.NewPicker(namedCandidates(c.backends), nil)
			table := p.(*maglev)
			require.Len(t, table.table, c.size)
			h := sha256.New()
			for i := range table.table {
				fmt.Fprintln(h, table.at(uint64(i)).Address())
			}
			require.Equal(t, c.digest, hex.EncodeToString(h.Sum(nil)[:8]))
			for i, client := range clients {
				require.Equal(t, c.picks[i], pickFor(p, client).Address(), client)
			}
		})
	}
}

func TestIPHashOfAddresses(t *testing.T) {
	list := testCandidates(make1s(100)...)
	p := IPHash{}.NewPicker(list, nil)
	for _, same := range [][2]string{
		{"192.0.2.1", "192.0.2.1"},
		{"192.0.2.1", "::ffff:192.0.2.1"},
		{"2001:db8:1:2::1", "2001:db8:1:2:ffff::9"},
	} {
		require.Equal(t, pickFor(p, same[0]).Address(), pickFor(p, same[1]).Address(), "%v", same)
	}
	seen := make(map[*Backend]bool)
	for range 1000 {
		seen[pickFor(p, "")] = true // of a Unix socket
	}
	require.Greater(t, len(seen), 50)
}

func TestMaglevShares(t *testing.T) {
	for _, n := range []int{5, 50, 500, 655, 656, 1000} {
		table := IPHash{}.NewPicker(testCandidates(make1s(n)...), nil).(*maglev)
		requireShares(t, table)
	}
	for _, weights := range [][]int{{1, 2, 3, 4, 5}, {256, 128, 64, 3}, {100, 1}} {
		requireShares(t, IPHash{}.NewPicker(testCandidates(weights...), nil).(*maglev))
	}
}

// requireShares wants each backend's share within 1 % of its weight's.
func requireShares(t *testing.T, m *maglev) {
	t.Helper()
	total := 0
	for _, c := range m.candidates {
		total += c.Weight
	}
	places := make([]int, len(m.candidates))
	for _, i := range m.table {
		places[i]++
	}
	for i, c := range m.candidates {
		want := float64(len(m.table)) * float64(c.Weight) / float64(total)
		require.InEpsilon(t, want, places[i], .01, "%d backends, weight %d", len(m.candidates), c.Weight)
	}
}

// TestMaglevDisruption takes one backend out: besides its own clients few may
// move, as in section 5.3 of the paper.
func TestMaglevDisruption(t *testing.T) {
	for _, c := range []struct {
		n    int
		most float64 // of the other backends' places
	}{{5, .01}, {100, .02}, {1000, .02}} {
		list := testCandidates(make1s(c.n)...)
		before := IPHash{}.NewPicker(list, nil).(*maglev)
		after := IPHash{}.NewPicker(list[1:], before).(*maglev)
		moved, others := 0, 0
		m := min(len(before.table), len(after.table))
		require.Len(t, after.table, m)
		for i := range uint64(m) {
			if was := before.at(i); was != list[0].Backend {
				others++
				if after.at(i) != was {
					moved++
				}
			}
		}
		t.Logf("%d backends: %.2f %% of the others' places moved", c.n, 100*float64(moved)/float64(others))
		require.Less(t, float64(moved)/float64(others), c.most, "%d backends", c.n)
	}
}

// TestIPHashSpreadsWhatCantBeHad has one backend that was found to be down just now.
func TestIPHashSpreadsWhatCantBeHad(t *testing.T) {
	list := testCandidates(make1s(20)...)
	p := IPHash{}.NewPicker(list, nil)
	list[7].Backend.setHealthy(false)
	got := make(map[*Backend]int)
	for i := range 20_000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String()
		b := pickFor(p, a)
		require.NotEqual(t, list[7].Backend.Address(), b.Address())
		got[b]++
	}
	for _, c := range list {
		if c.Backend != list[7].Backend {
			require.InDelta(t, 20_000/19, got[c.Backend], 300)
		}
	}
}

func BenchmarkPolicies(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		for name, policy := range allPolicies() {
			list := testCandidates(make1s(n)...)
			for i := range list {
				list[i].Weight = 1 + i%256
			}
			b.Run(fmt.Sprintf("rebuild/%s/%d", name, n), func(b *testing.B) {
				for b.Loop() {
					policy.NewPicker(list, nil)
				}
			})
			b.Run(fmt.Sprintf("pick/%s/%d", name, n), func(b *testing.B) {
				b.ReportAllocs()
				p := policy.NewPicker(list, nil)
				client := &net.TCPAddr{IP: net.IP{192, 0, 2, 1}, Port: 1}
				r := Request{client: client} // as for the retries of one connection
				for b.Loop() {
					client.IP[3]++
					picked := r.pickBy(p)
					picked.load.Add(-1) // no end that the picker is told of
				}
			})
		}
	}
}

// TestIPHashTakesTheProxysAddress has clients behind a proxy, whose header says who
// they are: all have the address of the proxy.
func TestIPHashTakesTheProxysAddress(t *testing.T) {
	var addresses []string
	weights := make(map[string]int)
	for range 10 {
		s := startServer(t, func(c *net.TCPConn) {
			_, _ = io.WriteString(c, c.LocalAddr().String())
		})
		addresses = append(addresses, s.address)
		weights[s.address] = 1
	}
	lb := freeAddress(t)
	runCaddy(t, routeConfig(lb, `{"handler":"proxy_protocol"}`, "", backendsJSON(addresses...)+`,"load_balancing":{"selection_policy":{"policy":"ip_hash"}}}`, ""))
	table := IPHash{}.NewPicker(namedCandidates(weights), nil).(*maglev)
	seen := make(map[string]bool)
	for i := range 40 {
		address := netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
		if i%2 == 1 {
			address = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0, 0, byte(i), 15: byte(i)})
		}
		version := map[bool]string{true: "TCP4", false: "TCP6"}[address.Is4()]
		c := dialClient(t, lb)
		write(t, c, fmt.Sprintf("PROXY %s %s %s 1111 2222\r\n", version, address, address))
		got, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, table.at(table.placeOf(address)).Address(), string(got), "client %s", address)
		seen[string(got)] = true
	}
	require.Greater(t, len(seen), 4)
}
