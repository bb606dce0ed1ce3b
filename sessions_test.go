package tcplb

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// The list against a slice, with sessions that come and go at random while two
// cursors go over it.
func TestSessionList(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var l sessionList
		var want []*session // in the list's order
		change := func() {
			if len(want) == 0 || rnd.IntN(2) == 0 {
				s := new(session)
				l.add(s)
				want = slices.Insert(want, 0, s)
			} else {
				i := rnd.IntN(len(want))
				l.remove(want[i])
				want = slices.Delete(want, i, i+1)
			}
			require.True(t, slices.Equal(want, slices.Collect(l.all())))
			require.Equal(t, len(want), l.count)
		}
		for range 20 {
			l.add(new(session))
		}
		want = slices.Collect(l.all())
		before := slices.Clone(want)
		cursors := []*cursor{l.cursor(), l.cursor()}
		seen := make([]map[*session]int, len(cursors))
		for open := true; open; {
			open = false
			for i, c := range cursors {
				if seen[i] == nil {
					seen[i] = make(map[*session]int)
				}
				for _, s := range c.take(make([]*session, 0, 1+rnd.IntN(3))) {
					seen[i][s]++
				}
				open = open || c.next != nil
			}
			change()
		}
		for i, c := range cursors {
			c.end()
			for _, s := range before {
				if slices.Contains(want, s) {
					require.Equal(t, 1, seen[i][s], "it was there all the while")
				}
			}
			for s, times := range seen[i] {
				require.Equal(t, 1, times)
				require.True(t, slices.Contains(before, s), "who comes later is not met")
			}
		}
		require.Empty(t, l.cursors)
	}
}

func TestSessionListOfNobody(t *testing.T) {
	var l sessionList
	in, out := new(session), new(session)
	l.add(in)
	l.remove(out)
	require.Equal(t, 1, l.count)
	l.remove(in)
	l.remove(in)
	require.Zero(t, l.count)
}

// A visit that panics leaves nothing behind that later ends would have to mind.
func TestVisitThatPanics(t *testing.T) {
	b := new(Backend)
	b.sessions.add(new(session))
	require.Panics(t, func() { b.visitSessions(func([]*session) { panic("whose address is this") }) })
	require.Empty(t, b.sessions.cursors)
}
