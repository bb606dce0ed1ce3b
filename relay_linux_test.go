package tcplb

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func socketOptionOf(t testing.TB, c *net.TCPConn, o socketOption) (value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	cerr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), o.level, o.name) })
	require.NoError(t, cerr)
	require.NoError(t, err)
	return value
}

// The connection to the backend is probed once it is old enough to need it.
func TestRelayKeepsOldConnectionsAlive(t *testing.T) {
	s := echoServer(t)
	target, err := parseTarget(s.address)
	require.NoError(t, err)
	conn, err := dialTarget(t.Context(), target, hangTimeout)
	require.NoError(t, err)
	defer conn.Close()
	backend := conn.(*net.TCPConn)
	require.Zero(t, socketOptionOf(t, backend, keepAliveOptions[0]))

	_, near := tcpPair(t)
	defer near.Close()
	for _, idleTimeout := range []time.Duration{0, time.Hour} {
		r := newRelay(near, conn, idleTimeout)
		r.timer = time.NewTimer(0)
		<-r.timer.C
		r.onTimer()
		require.True(t, r.timer.Stop(), "there is to be another look")
		for _, o := range keepAliveOptions {
			require.Equal(t, o.value, socketOptionOf(t, backend, o))
		}
		require.Equal(t, reasonNone, reason(r.why.Load()))
	}
	require.Equal(t, keepAlive, net.KeepAliveConfig{
		Enable:   true,
		Idle:     time.Duration(keepAliveOptions[1].value) * time.Second,
		Interval: time.Duration(keepAliveOptions[2].value) * time.Second,
		Count:    keepAliveOptions[3].value,
	}, "the same on both sides")
}
