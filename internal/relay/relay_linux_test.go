package relay

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func socketOptionOf(t testing.TB, c net.Conn, level, name int) (value int) {
	t.Helper()
	require.NoError(t, control(c, func(fd int) (err error) {
		value, err = unix.GetsockoptInt(fd, level, name)
		return err
	}))
	return value
}

// The connection to the backend is probed once it is old enough to need it.
func TestRelayKeepsOldConnectionsAlive(t *testing.T) {
	ln := listen(t)
	defer ln.Close()
	backend, err := (&net.Dialer{KeepAlive: -1}).Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	defer backend.Close()
	require.Zero(t, socketOptionOf(t, backend, unix.SOL_SOCKET, unix.SO_KEEPALIVE))

	_, near := tcpPair(t)
	defer near.Close()
	for _, idleTimeout := range []time.Duration{0, time.Hour} {
		r := New(near, backend, Options{IdleTimeout: idleTimeout})
		r.timer = time.NewTimer(0)
		<-r.timer.C
		r.onTimer()
		require.True(t, r.timer.Stop(), "there is to be another look")
		require.Equal(t, 1, socketOptionOf(t, backend, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
		require.EqualValues(t, KeepAlive.Idle/time.Second, socketOptionOf(t, backend, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE))
		require.EqualValues(t, KeepAlive.Interval/time.Second, socketOptionOf(t, backend, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL))
		require.Equal(t, KeepAlive.Count, socketOptionOf(t, backend, unix.IPPROTO_TCP, unix.TCP_KEEPCNT))
		require.Equal(t, None, r.Reason())
	}
}
