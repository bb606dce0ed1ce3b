package tcplb

import (
	"cmp"
	"slices"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
)

// entranceCounts is how many connections each tcp_lb listener has ended before they
// reached a handler, by the reason.
type entranceCounts map[*listener.Entrance]map[string]uint64

func countEntrances() entranceCounts {
	counts := make(entranceCounts)
	for _, e := range listener.Entrances() {
		counts[e] = make(map[string]uint64)
		for why, n := range e.TurnedAway() {
			counts[e][why] = n
		}
	}
	return counts
}

// entranceHistory remembers when listeners ended connections, for as long as
// histories go back.
type entranceHistory struct {
	seen   entranceCounts // nil = nobody has looked yet
	lately []turnedAway   // oldest first
}

// turnedAway is how many connections were ended for a reason since someone looked
// before.
type turnedAway struct {
	at     time.Time
	reason string
	count  uint64
}

// update takes the counts for those of now. A listener that was not there before
// has counted from 0 since; of those at the first look nobody knows when that was.
func (h *entranceHistory) update(counts entranceCounts, now time.Time) {
	if h.seen != nil {
		sums := make(map[string]uint64)
		for e, reasons := range counts {
			for why, n := range reasons {
				sums[why] += n - h.seen[e][why]
			}
		}
		for why, n := range sums {
			if n > 0 {
				h.add(why, n, now)
			}
		}
	}
	h.seen = counts
	h.lately = slices.DeleteFunc(h.lately, func(t turnedAway) bool { return now.Sub(t.at) >= historyWindow })
}

// add keeps one number for each reason and time between looks, however often pages
// look in between.
func (h *entranceHistory) add(why string, n uint64, now time.Time) {
	for i := range h.lately {
		if t := &h.lately[i]; t.reason == why && now.Sub(t.at) < historyPause {
			t.count += n
			return
		}
	}
	h.lately = append(h.lately, turnedAway{now, why, n})
}

// refusals sums up those of all listeners, by the reason.
func (h *entranceHistory) refusals() (list []statuspage.Refusal) {
	sums := make(map[string]statuspage.Refusal)
	for _, reasons := range h.seen {
		for why, n := range reasons {
			r := sums[why]
			r.Total += n
			sums[why] = r
		}
	}
	for _, t := range h.lately { // also of a listener that has left since
		r := sums[t.reason]
		r.Recent += t.count
		r.Total = max(r.Total, r.Recent)
		sums[t.reason] = r
	}
	for why, r := range sums {
		if r.Reason = why; r.Total > 0 {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b statuspage.Refusal) int { return cmp.Compare(a.Reason, b.Reason) })
	return list
}

// turnedAway returns how many connections the listeners have ended, now and lately.
func (r *recorder) turnedAway(now time.Time) []statuspage.Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.users == 0 {
		return nil
	}
	r.entrances.update(countEntrances(), now) // locked, or an older count might come after a newer one
	return r.entrances.refusals()
}
