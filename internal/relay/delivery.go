package relay

import (
	"sync"
	"time"
)

// deliveries are the relays that end once one side has what was sent to it.
var deliveries deliveryQueue

const (
	// Nothing tells when a send queue has been acknowledged: one goroutine for
	// all of the process looks, at a bounded number each time.
	deliveryTick = 5 * time.Millisecond
	deliveryLook = 128
	// A receiver that takes nothing for deliveryPatience is given up, and so is
	// one that is not done after deliveryLimit.
	deliveryPatience = 5 * time.Second
	deliveryLimit    = 5 * time.Minute
)

// delivery is a relay of which one way has failed, and the receiver that is to
// have the rest of the other.
type delivery struct {
	relay *Pair
	to    *side
	// last says that all has been written; else the direction that still writes
	// ends the delivery.
	last  bool
	index int // in the queue's list

	// For the queue's goroutine only.
	began, progressed time.Time
	left              int    // bytes not acknowledged
	moved             uint64 // bytes relayed either way
}

// deliveryQueue looks after all deliveries in turn.
type deliveryQueue struct {
	mu      sync.Mutex
	list    []*delivery
	next    int  // where the next look begins
	running bool // the goroutine that looks
}

// add has the relay severed when to has acknowledged everything, if it is the
// last that was written, or stops taking it.
func (q *deliveryQueue) add(r *Pair, to *side, last bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d := r.awaits; d != nil {
		d.to, d.last = to, d.last || last
		return
	}
	if r.severed.Load() || !r.join() { // checked here, as sever drops what is there
		return
	}
	now := time.Now()
	r.awaits = &delivery{relay: r, to: to, last: last, index: len(q.list), began: now, progressed: now}
	q.list = append(q.list, r.awaits)
	if !q.running {
		q.running = true
		go q.run() // ends when there is no delivery
	}
}

// drop ends the wait for the relay, if there is one.
func (q *deliveryQueue) drop(r *Pair) {
	q.mu.Lock()
	d := r.awaits
	if d != nil {
		r.awaits = nil
		last := len(q.list) - 1
		q.list[d.index] = q.list[last]
		q.list[d.index].index = d.index
		q.list[last] = nil
		q.list = q.list[:last]
	}
	q.mu.Unlock()
	if d != nil {
		r.leave()
	}
}

func (q *deliveryQueue) run() {
	tick := time.NewTicker(deliveryTick)
	defer tick.Stop()
	var turn [deliveryLook]*delivery
	for now := range tick.C {
		n := q.turn(turn[:])
		if n == 0 {
			return
		}
		for _, d := range turn[:n] {
			q.look(d, now)
		}
	}
}

// turn returns how many it has put into list, those that are to be looked at
// now. At 0 the goroutine has to end.
func (q *deliveryQueue) turn(list []*delivery) (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for n < min(len(list), len(q.list)) {
		q.next %= len(q.list)
		list[n] = q.list[q.next]
		q.next++
		n++
	}
	q.running = n > 0
	return n
}

// look severs the relay if there is no more to wait for.
func (q *deliveryQueue) look(d *delivery, now time.Time) {
	q.mu.Lock()
	dropped, to, last := d.relay.awaits != d, d.to, d.last
	q.mu.Unlock()
	if !dropped && d.done(to, last, now) {
		d.relay.sever() // which drops it
	}
}

func (d *delivery) done(to *side, last bool, now time.Time) bool {
	r := d.relay
	last = last || r.running.Load() == 1 // the delivery itself
	left, moved := unsent(to.base), r.up.moved.Load()+r.down.moved.Load()
	if left != d.left || moved != d.moved {
		d.left, d.moved, d.progressed = left, moved, now
	}
	return last && left == 0 || now.Sub(d.progressed) >= deliveryPatience ||
		now.Sub(d.began) >= deliveryLimit
}
