//go:build !linux

package tcplb

import (
	"net"
	"time"
)

// hangup can't be had here: a client that leaves while it waits is found gone
// when it has its backend.
type hangup struct{}

func watchHangup(net.Conn, bool) *hangup { return nil }

func (*hangup) setDeadline(time.Time) {}

func (*hangup) wait() {}

func (*hangup) look() reason { return reasonNone }
