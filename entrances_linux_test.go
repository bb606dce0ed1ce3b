package tcplb

import (
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
	"github.com/stretchr/testify/require"
)

// Whom a listener turns away never comes to a pool: the page has them on its own.
func TestStatusPageOfWhoNeverCame(t *testing.T) {
	watchLeftovers(t)
	d := newDoors(t)
	d.run(t, `"200ms"`)
	recent.begin()
	defer recent.end()
	require.Empty(t, statusPage(nil, 0).TurnedAway)
	for range 3 {
		expectReset(t, dialClient(t, d.secure))
	}
	late := []statuspage.Refusal{{Reason: "handshake_timeout", Recent: 3, Total: 3}}
	eventually(t, func() bool {
		return len(statusPage(nil, 0).TurnedAway) == 1 && statusPage(nil, 0).TurnedAway[0].Total == 3
	}, "counted")
	require.Equal(t, late, statusPage(nil, 0).TurnedAway, "at once")
	reload(t, d.config(`"disabled":true`, `"300ms"`))
	require.Equal(t, late, statusPage([]string{"web"}, 0).TurnedAway, "over reloads")
	html, err := statusPage(nil, time.Second).Render(statuspage.View{})
	require.NoError(t, err)
	require.Contains(t, string(html), "3 clients turned away before they came to a pool, in the last 20m (handshake_timeout)")
}
