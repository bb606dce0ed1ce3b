//go:build !linux

package tcplb

import (
	"net"
	"syscall"
)

// canPump says that bare sockets are relayed like wrapped ones here.
const canPump = false

type pump struct{}

func (*pump) run(*direction) error { panic("unreachable") }

// freePipes has none to free here.
func freePipes() bool { return false }

func spareFiles() int64 { return 0 }

// wasReset can't be told here: where a reset meets a write of the other
// direction first, it may be passed on as an end of file.
func wasReset(syscall.RawConn) bool { return false }

// unsent can't be told here: a reset may overtake the last bytes before it.
func unsent(net.Conn) int { return 0 }
