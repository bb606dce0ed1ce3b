package tcplb

import (
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
	"github.com/stretchr/testify/require"
)

func TestEntranceHistory(t *testing.T) {
	var (
		h    entranceHistory
		now  = time.Now()
		a, b = new(listener.Entrance), new(listener.Entrance)
	)
	look := func(after time.Duration, counts entranceCounts) []statuspage.Refusal {
		now = now.Add(after)
		h.update(counts, now)
		return h.refusals()
	}
	of := func(late, files uint64) map[string]uint64 {
		return map[string]uint64{"handshake_timeout": late, "files_short": files}
	}
	require.Equal(t, []statuspage.Refusal{{Reason: "handshake_timeout", Total: 5}}, look(0, entranceCounts{a: of(5, 0)}), "nobody knows when that was")
	require.Equal(t, []statuspage.Refusal{{Reason: "files_short", Recent: 1, Total: 1}, {Reason: "handshake_timeout", Recent: 4, Total: 9}},
		look(historyPause, entranceCounts{a: of(6, 1), b: of(3, 0)}), "a new one counts from 0")
	require.Equal(t, []statuspage.Refusal{{Reason: "files_short", Recent: 1, Total: 1}, {Reason: "handshake_timeout", Recent: 4, Total: 4}},
		look(time.Minute, entranceCounts{b: of(3, 0)}), "it was there lately")

	// However often there are looks, there are no more numbers.
	for n := range uint64(10_000) {
		look(historyPause/100, entranceCounts{b: of(4+n, 0)})
	}
	require.LessOrEqual(t, len(h.lately), 2+10_000/100)
	require.EqualValues(t, 10_004, h.refusals()[1].Recent)
	require.Equal(t, []statuspage.Refusal{{Reason: "handshake_timeout", Total: 10_003}}, look(historyWindow, entranceCounts{b: of(10_003, 0)}))
	require.Empty(t, h.lately)
	require.Empty(t, look(0, nil))
}
