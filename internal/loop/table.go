package loop

// Ref is a handler's place in its loop.
type Ref struct{ index, generation uint32 }

// table has the handlers of one loop. A place that is free is used again, in
// another generation.
type table struct {
	entries []entry
	free    uint32 // the first free place, plus one; they are linked by next
}

type entry struct {
	handler    Handler // nil: free
	due        int64   // tick of the timer
	next, prev uint32  // in the timer's list; places, plus one
	generation uint32
	list       uint16 // the timer's list, plus one; 0 = it is stopped
}

func (t *table) add(h Handler) Ref {
	if t.free == 0 {
		t.entries = append(t.entries, entry{handler: h})
		return Ref{index: uint32(len(t.entries) - 1)}
	}
	i := t.free - 1
	e := &t.entries[i]
	t.free, e.next = e.next, 0
	e.handler = h
	return Ref{i, e.generation}
}

// remove frees the place of a handler whose timer is stopped.
func (t *table) remove(ref Ref) {
	e := &t.entries[ref.index]
	e.handler = nil
	e.generation++
	e.next, t.free = t.free, ref.index+1
}

// find returns nil where the place is no longer that of ref.
func (t *table) find(ref Ref) Handler {
	if int(ref.index) >= len(t.entries) {
		return nil
	}
	if e := &t.entries[ref.index]; e.generation == ref.generation {
		return e.handler
	}
	return nil
}
