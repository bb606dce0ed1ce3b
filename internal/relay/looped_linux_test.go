package relay

import (
	"net"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func init() { kinds = append(kinds, onLoop) }

// onLoop relays on a loop.
var onLoop = kind{name: "looped", looped: func(t testing.TB, client, backend net.Conn, o Options) Relay {
	r, err := NewLooped(detach(t, client), detach(t, backend), o)
	require.NoError(t, err)
	return r
}}

// detach returns the connection's socket, which is in no poller any more.
func detach(t testing.TB, c net.Conn) (fd int) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	cerr := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	require.NoError(t, cerr)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	return fd
}
