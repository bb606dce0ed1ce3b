package tcplb

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeAddresses connects, or not, by address.
type fakeAddresses struct {
	t *testing.T

	mu    sync.Mutex
	began time.Time
	takes map[string]time.Duration // absent = it hangs
	errs  map[string]error         // what it ends in, absent = a connection
	tried []string
	at    map[string]time.Duration // since began
	gave  map[string]time.Duration // to the deadline
	open  map[string]bool
}

type fakeConn struct {
	net.Conn
	close func()
}

func (c fakeConn) Close() error { c.close(); return nil }

func (f *fakeAddresses) connect(ctx context.Context, to netip.AddrPort, deadline time.Time) (net.Conn, error) {
	a := to.Addr().String()
	require.EqualValues(f.t, 80, to.Port())
	f.mu.Lock()
	f.tried = append(f.tried, a)
	f.at[a], f.gave[a] = time.Since(f.began), time.Until(deadline)
	takes, ends := f.takes[a]
	err := f.errs[a]
	f.mu.Unlock()
	if !ends {
		takes = forEver
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(time.Until(deadline)):
		return nil, context.DeadlineExceeded
	case <-time.After(takes):
	}
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open[a] = true
	return fakeConn{close: func() { f.open[a] = false }}, nil
}

func TestConnectAny(t *testing.T) {
	const ms = time.Millisecond
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", errnoCases[0].errno)}
	noFile := &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", shortageErrnos[0])}
	noFamily := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", noAddressErrnos[0])}
	type times = map[string]time.Duration
	for _, c := range []struct {
		name  string
		addrs []netip.Addr
		takes times
		errs  map[string]error
		won   string
		err   error
		after time.Duration
		at    times // when each was tried
		gave  times // how long it had
	}{
		{"one", addrs("10.0.0.1"), times{"10.0.0.1": 5 * ms}, nil,
			"10.0.0.1", nil, 5 * ms, times{"10.0.0.1": 0}, times{"10.0.0.1": 3000 * ms}},
		{"one that hangs", addrs("10.0.0.1"), nil, nil,
			"", context.DeadlineExceeded, 3000 * ms, times{"10.0.0.1": 0}, nil},
		{"refused, then the next", addrs("10.0.0.1", "10.0.0.2"), times{"10.0.0.1": 10 * ms, "10.0.0.2": 10 * ms},
			map[string]error{"10.0.0.1": refused},
			"10.0.0.2", nil, 20 * ms, times{"10.0.0.1": 0, "10.0.0.2": 10 * ms}, nil},
		{"each has a share of the time", addrs("10.0.0.1", "10.0.0.2", "10.0.0.3"), times{"10.0.0.3": 10 * ms}, nil,
			"10.0.0.3", nil, 2010 * ms, times{"10.0.0.1": 0, "10.0.0.2": 1000 * ms, "10.0.0.3": 2000 * ms},
			times{"10.0.0.1": 1000 * ms, "10.0.0.2": 1000 * ms, "10.0.0.3": 1000 * ms}},
		{"what one does not use goes to the others", addrs("10.0.0.1", "10.0.0.2"), times{"10.0.0.1": 0},
			map[string]error{"10.0.0.1": refused},
			"", refused, 3000 * ms, times{"10.0.0.1": 0, "10.0.0.2": 0}, times{"10.0.0.2": 3000 * ms}},
		{"the first family is prompt", addrs("fd00::1", "10.0.0.1"), times{"fd00::1": 299 * ms, "10.0.0.1": 0}, nil,
			"fd00::1", nil, 299 * ms, times{"fd00::1": 0}, nil},
		{"the first family hangs", addrs("fd00::1", "10.0.0.1", "fd00::2"), times{"10.0.0.1": 10 * ms}, nil,
			"10.0.0.1", nil, 310 * ms, times{"fd00::1": 0, "10.0.0.1": 300 * ms}, times{"fd00::1": 1500 * ms, "10.0.0.1": 2700 * ms}},
		{"the first family hangs, IPv4 first", addrs("10.0.0.1", "fd00::1"), times{"fd00::1": 10 * ms}, nil,
			"fd00::1", nil, 310 * ms, times{"10.0.0.1": 0, "fd00::1": 300 * ms}, nil},
		{"the first family fails", addrs("fd00::1", "fd00::2", "10.0.0.1"), times{"fd00::1": 1 * ms, "fd00::2": 1 * ms, "10.0.0.1": 5 * ms},
			map[string]error{"fd00::1": refused, "fd00::2": refused},
			"10.0.0.1", nil, 7 * ms, times{"fd00::1": 0, "fd00::2": 1 * ms, "10.0.0.1": 2 * ms}, nil},
		{"the first family wins late", addrs("fd00::1", "10.0.0.1"), times{"fd00::1": 400 * ms}, nil,
			"fd00::1", nil, 400 * ms, times{"fd00::1": 0, "10.0.0.1": 300 * ms}, nil},
		{"both at the same time", addrs("fd00::1", "10.0.0.1"), times{"fd00::1": 400 * ms, "10.0.0.1": 100 * ms}, nil,
			"either", nil, 400 * ms, times{"fd00::1": 0, "10.0.0.1": 300 * ms}, nil},
		{"both fail", addrs("fd00::1", "10.0.0.1"), times{"fd00::1": 0, "10.0.0.1": 0},
			map[string]error{"fd00::1": refused, "10.0.0.1": errRefused},
			"", refused, 0, times{"fd00::1": 0, "10.0.0.1": 0}, nil},
		{"a lack of files says more than a refusal", addrs("fd00::1", "10.0.0.1"), times{"fd00::1": 0, "10.0.0.1": 0},
			map[string]error{"fd00::1": refused, "10.0.0.1": noFile},
			"", noFile, 0, times{"fd00::1": 0, "10.0.0.1": 0}, nil},
		{"a family that this host has not says less", addrs("fd00::1", "10.0.0.1"), times{"fd00::1": 0, "10.0.0.1": 0},
			map[string]error{"fd00::1": noFamily, "10.0.0.1": refused},
			"", refused, 0, times{"fd00::1": 0, "10.0.0.1": 0}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeAddresses{t: t, began: time.Now(), takes: c.takes, errs: c.errs, at: times{}, gave: times{}, open: map[string]bool{}}
				conn, err := connectAny(t.Context(), c.addrs, 80, f.began.Add(3*time.Second), f.connect)
				require.Equal(t, c.after, time.Since(f.began))
				require.Equal(t, c.at, f.at)
				for a, d := range c.gave {
					require.Equal(t, d, f.gave[a], a)
				}
				if c.err != nil {
					require.ErrorIs(t, err, c.err)
					require.Nil(t, conn)
					return
				}
				require.NoError(t, err)
				open := 0
				for a, isOpen := range f.open {
					if isOpen {
						open++
						require.True(t, c.won == a || c.won == "either", a)
					}
				}
				require.Equal(t, 1, open, "the loser is closed")
				require.NoError(t, conn.Close())
				for a, isOpen := range f.open {
					require.False(t, isOpen, a)
				}
			})
		})
	}
}

// The file of a second family beside the first is of the budget, for as long as
// there are two, and the family waits for it.
func TestConnectAnyTakesAFileForTheSecondFamily(t *testing.T) {
	const ms = time.Millisecond
	type times = map[string]time.Duration
	for _, c := range []struct {
		name    string
		takes   times
		refused string        // the address that ends in an error
		freed   time.Duration // when there is a file; 0 = at once
		at      times
		held    time.Duration // until when the file is
	}{
		{"the first loses", times{"10.0.0.1": 100 * ms}, "", 0, times{"fd00::1": 0, "10.0.0.1": 300 * ms}, 400 * ms},
		{"the second fails", times{"fd00::1": 900 * ms, "10.0.0.1": 100 * ms}, "10.0.0.1", 0, times{"fd00::1": 0, "10.0.0.1": 300 * ms}, 400 * ms},
		{"there is none at first", times{"10.0.0.1": 200 * ms}, "", 800 * ms, times{"fd00::1": 0, "10.0.0.1": 900 * ms}, 1100 * ms},
		{"there is none", times{"fd00::1": 700 * ms, "10.0.0.1": 100 * ms}, "fd00::1", time.Hour, times{"fd00::1": 0, "10.0.0.1": 700 * ms}, 0},
		{"the first fails before", times{"fd00::1": 100 * ms, "10.0.0.1": 500 * ms}, "fd00::1", 0, times{"fd00::1": 0, "10.0.0.1": 100 * ms}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				useAllFiles(t)
				before := files.Process.Used()
				free := func() { files.Process.Release(1) }
				if c.freed == 0 {
					free()
				} else {
					defer time.AfterFunc(c.freed, free).Stop()
				}
				f := &fakeAddresses{t: t, began: time.Now(), takes: c.takes, errs: map[string]error{c.refused: errRefused}, at: times{}, gave: times{}, open: map[string]bool{}}
				done := make(chan struct{})
				go func() {
					defer close(done)
					conn, err := connectAny(t.Context(), addrs("fd00::1", "10.0.0.1"), 80, f.began.Add(3*time.Second), f.connect)
					if assert.NoError(t, err) {
						assert.NoError(t, conn.Close())
					}
				}()
				if c.held > 0 {
					time.Sleep(c.held - ms)
					require.Equal(t, before, files.Process.Used(), "held")
					time.Sleep(2 * ms)
				} else {
					<-done
				}
				synctest.Wait()
				if c.freed < time.Since(f.began) {
					require.Equal(t, before-1, files.Process.Used(), "given back")
					require.True(t, files.Process.Acquire(1)) // useAllFiles gives it back
				} else {
					require.Equal(t, before, files.Process.Used())
				}
				<-done
				require.Equal(t, c.at, f.at)
			})
		})
	}
}

func TestConnectAnyEndsWithItsContext(t *testing.T) {
	lists := [][]netip.Addr{addrs("10.0.0.1"), addrs("10.0.0.1", "10.0.0.2"), addrs("fd00::1", "10.0.0.1"), addrs("10.0.0.9", "10.0.0.1"), addrs("10.0.0.9", "fd00::1")}
	for _, list := range lists {
		synctest.Test(t, func(t *testing.T) {
			takes, errs := map[string]time.Duration{"10.0.0.9": 0}, map[string]error{"10.0.0.9": errRefused}
			f := &fakeAddresses{t: t, began: time.Now(), takes: takes, errs: errs, at: map[string]time.Duration{}, gave: map[string]time.Duration{}}
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(500*time.Millisecond, cancel)
			_, err := connectAny(ctx, list, 80, f.began.Add(3*time.Second), f.connect)
			require.ErrorIs(t, err, context.Canceled)
			require.Equal(t, 500*time.Millisecond, time.Since(f.began))
			require.LessOrEqual(t, len(f.tried), 2)
		})
	}
}

func TestByFamily(t *testing.T) {
	for _, c := range []struct{ all, first, second []netip.Addr }{
		{addrs("10.0.0.1", "10.0.0.2"), addrs("10.0.0.1", "10.0.0.2"), nil},
		{addrs("fd00::1"), addrs("fd00::1"), nil},
		{addrs("fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2"), addrs("fd00::1", "fd00::2"), addrs("10.0.0.1", "10.0.0.2")},
		{addrs("10.0.0.1", "fd00::1", "10.0.0.2"), addrs("10.0.0.1", "10.0.0.2"), addrs("fd00::1")},
	} {
		first, second := byFamily(c.all)
		require.Equal(t, c.first, first)
		require.Equal(t, c.second, second)
	}
}
