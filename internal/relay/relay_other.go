//go:build !linux

package relay

import (
	"net"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/loop"
)

// Looped can't be had here.
type Looped struct{ Relay }

// NewLooped fails here, where there are no loops.
func NewLooped(int, int, Options) (*Looped, error) { return nil, loop.ErrUnavailable }

// canPump says that bare sockets are relayed like wrapped ones here.
const canPump = false

type pump struct{}

func (*pump) run(*direction) error { panic("unreachable") }

// LimitPipes does nothing here, where there are no pipes.
func LimitPipes(int) {}

// Pipes returns how many pipes are open: none here.
func Pipes() int { return 0 }

// wasReset can't be told here: where a reset meets a write of the other
// direction first, it may be passed on as an end of file.
func wasReset(net.Conn) bool { return false }

// unsent can't be told here: a reset may overtake the last bytes before it.
func unsent(net.Conn) int { return 0 }

// hasFailed can't be told here: who resets while what it sent has to wait is
// found when that goes on, or by the idle timeout.
func hasFailed(net.Conn) bool { return false }
