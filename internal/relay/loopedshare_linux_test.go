package relay

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"golang.org/x/sys/unix"
)

// Bulk is moved in smaller pieces for a moment after a message, and only then.
func TestBulkBesideMessages(t *testing.T) {
	r := onLoop.start(t, 0).relay.(*Looped)
	looked := false
	look := func() {
		if r.loop.Shared() {
			return // since it began itself
		}
		looked = true
		w := &r.down
		w.most = spliceMax
		w.bulk = true
		r.Ready(1, unix.EPOLLOUT)
		assert.False(t, r.loop.Shared(), "bulk is no message")
		assert.Equal(t, spliceMax, r.atOnce(w, 2*spliceMax))
		assert.Equal(t, 1000, r.atOnce(w, 1000))
		w.bulk = false
		r.Ready(0, unix.EPOLLOUT)
		assert.True(t, r.loop.Shared())
		assert.Equal(t, spliceShared, r.atOnce(w, 2*spliceMax))
		w.most = smallSplice
		assert.Equal(t, smallSplice, r.atOnce(w, 2*spliceMax))
	}
	eventually(t, func() bool {
		r.on(t, look)
		return looked
	}, "it is never alone")
}
