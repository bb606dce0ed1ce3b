package tcplb

import (
	"iter"
	"slices"
)

// sessionList has a backend's open sessions, the last that began first. They are
// linked by themselves: in a map each would take twice the memory, and more at
// times.
type sessionList struct {
	first   *session
	count   int
	cursors []*cursor
}

// place is a session's in its list.
type place struct{ prev, next *session }

func (l *sessionList) add(s *session) {
	s.place = place{next: l.first}
	if l.first != nil {
		l.first.place.prev = s
	}
	l.first = s
	l.count++
}

// remove takes out s, if it is in the list.
func (l *sessionList) remove(s *session) {
	prev, next := s.place.prev, s.place.next
	if prev == nil && l.first != s {
		return
	}
	for _, c := range l.cursors {
		if c.next == s {
			c.next = next
		}
	}
	if prev != nil {
		prev.place.next = next
	} else {
		l.first = next
	}
	if next != nil {
		next.place.prev = prev
	}
	s.place = place{}
	l.count--
}

// all yields them. The list must not change meanwhile.
func (l *sessionList) all() iter.Seq[*session] {
	return func(yield func(*session) bool) {
		for s := l.first; s != nil && yield(s); {
			s = s.place.next
		}
	}
}

// cursor goes over a list that changes meanwhile, and meets each session once
// that is in it all the while.
type cursor struct {
	list *sessionList
	next *session
}

func (l *sessionList) cursor() *cursor {
	c := &cursor{list: l, next: l.first}
	l.cursors = append(l.cursors, c)
	return c
}

// take appends the next sessions, as many as there is room for.
func (c *cursor) take(some []*session) []*session {
	for c.next != nil && len(some) < cap(some) {
		some = append(some, c.next)
		c.next = c.next.place.next
	}
	return some
}

func (c *cursor) end() {
	c.list.cursors = slices.DeleteFunc(c.list.cursors, func(other *cursor) bool { return other == c })
}
