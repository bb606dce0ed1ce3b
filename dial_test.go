package tcplb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want dialError
	}{
		{"refused", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, dialRefused},
		{"deadline", &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, dialTimeout},
		{"context", context.DeadlineExceeded, dialTimeout},
		{"kernel's own timeout", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ETIMEDOUT)}, dialTimeout},
		{"no such host", &net.DNSError{Err: "no such host", IsNotFound: true}, dialOther},
		{"no route", fmt.Errorf("dialing: %w", syscall.EHOSTUNREACH), dialOther},
	} {
		t.Run(c.name, func(t *testing.T) { require.Equal(t, c.want, classify(c.err)) })
	}
}

func TestDialTarget(t *testing.T) {
	s := echoServer(t)
	_, port, _ := net.SplitHostPort(s.address)
	socket := t.TempDir() + "/s"
	ln, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer ln.Close()
	for _, address := range []string{s.address, "localhost:" + port, "unix/" + socket} {
		target, err := parseTarget(address)
		require.NoError(t, err)
		c, err := dialTarget(context.Background(), target, hangTimeout)
		require.NoError(t, err, address)
		require.NoError(t, c.Close())
	}
	target, err := parseTarget(freeAddress(t))
	require.NoError(t, err)
	c, err := dialTarget(context.Background(), target, hangTimeout)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.Nil(t, c, "a nil interface, not a nil pointer in one")
}

// down makes backends whose connects fail and that no check has found yet.
func down(f *fakeNet, addresses ...string) {
	for _, a := range addresses {
		f.fail(a, errRefused)
	}
}

func checksOff(h *Handler) {
	h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Disabled: true}}
}

func TestConnectTriesEachBackendOnce(t *testing.T) {
	f := newFakeNet()
	down(f, one, two, three)
	g, _ := testGeneration(t, f, func(h *Handler) {
		h.Backends = backendList(one, two, three)
		checksOff(h)
	})
	g.start()
	defer g.stop()
	l, err := connect(g)
	require.ErrorIs(t, err, errNoBackend)
	require.ErrorIs(t, err, errRefused)
	for _, a := range []string{one, two, three} {
		require.ErrorContains(t, err, fmt.Sprintf("dialing backend %q", a))
		require.Len(t, f.times(a), 1)
	}
	require.Equal(t, 3, l.attempts)
	require.Zero(t, g.members()[0].Backend.Load(), "nothing is held")
}

func TestConnectRetryLimits(t *testing.T) {
	addresses := []string{"10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3", "10.0.0.1:4", "10.0.0.1:5", "10.0.0.1:6"}
	for _, c := range []struct {
		name    string
		retries *int
		want    int
	}{
		{"default", nil, 4},
		{"none", new(0), 1},
		{"two", new(2), 3},
		{"more than there are", new(50), 6},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeNet()
			down(f, addresses...)
			g, _ := testGeneration(t, f, func(h *Handler) {
				h.Backends = backendList(addresses...)
				h.LoadBalancing = &LoadBalancing{Retries: c.retries}
				checksOff(h)
			})
			g.start()
			defer g.stop()
			l, err := connect(g)
			require.Error(t, err)
			require.Equal(t, c.want, l.attempts)
		})
	}
}

func TestConnectWaitsForABackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, _ := testGeneration(t, f, func(h *Handler) {
			h.Backends = backendList(one)
			h.LoadBalancing = &LoadBalancing{TryDuration: caddy.Duration(5 * time.Second)}
			h.HealthChecks = &HealthChecks{Active: &ActiveHealthChecks{Interval: caddy.Duration(time.Second), Passes: 1}}
		})
		g.start()
		synctest.Wait()
		began := time.Now()
		_, err := connect(g)
		require.ErrorIs(t, err, errNoBackend)
		require.Equal(t, 5*time.Second, time.Since(began))

		go func() {
			time.Sleep(2 * time.Second)
			f.fail(one, nil)
		}()
		began = time.Now()
		l, err := connect(g)
		require.NoError(t, err)
		l.release()
		require.LessOrEqual(t, time.Since(began), 3*time.Second+defaultTryInterval)

		down(f, one)
		g.stop()
		began = time.Now()
		_, err = connect(g)
		require.Error(t, err)
		require.Zero(t, time.Since(began), "a stopped config waits for nothing")
	})
}

func TestConnectGivesUpAtOnceByDefault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		down(f, one)
		g, _ := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one) })
		g.start()
		synctest.Wait()
		began := time.Now()
		l, err := connect(g)
		require.True(t, errors.Is(err, errNoBackend))
		require.Zero(t, l.attempts, "a down backend is not tried")
		require.Zero(t, time.Since(began))
		g.stop()
	})
}
