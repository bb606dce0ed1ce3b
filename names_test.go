package tcplb

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

var (
	noSuchHost = &net.DNSError{Err: "no such host", Name: "db", IsNotFound: true}
	serverFail = &net.DNSError{Err: "server misbehaving", Name: "db", IsTemporary: true}
)

// fakeLookup is a resolver under the test's control.
type fakeLookup struct {
	mu    sync.Mutex
	takes time.Duration
	found answer
	err   error
	asked int
}

// set has lookups that begin from now on take so long, and end so.
func (f *fakeLookup) set(takes time.Duration, err error, addresses ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.takes, f.err, f.found = takes, err, answer{whole: true}
	f.found.addrs = addrs(addresses...)
}

func (f *fakeLookup) lookup(ctx context.Context, _ string) (answer, error) {
	f.mu.Lock()
	takes, found, err := f.takes, f.found, f.err
	f.asked++
	f.mu.Unlock()
	select {
	case <-time.After(takes):
		return found, err
	case <-ctx.Done():
		return answer{}, &net.DNSError{Err: "i/o timeout", Name: "db", IsTimeout: true}
	}
}

func (f *fakeLookup) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

func addrs(texts ...string) (list []netip.Addr) {
	for _, a := range texts {
		list = append(list, netip.MustParseAddr(a))
	}
	return list
}

const forEver = 1000 * time.Hour

// observedNames has the log of names if it is set.
var observedNames atomic.Pointer[zap.Logger]

func init() {
	caddys := namesLog
	namesLog = func() *zap.Logger {
		if l := observedNames.Load(); l != nil {
			return l
		}
		return caddys()
	}
}

// observeNames returns what is logged of names during the test.
func observeNames(t testing.TB) *observer.ObservedLogs {
	core, logs := observer.New(zap.DebugLevel)
	observedNames.Store(zap.New(core))
	t.Cleanup(func() { observedNames.Store(nil) })
	return logs
}

// testName runs the test in a bubble, with a name that the test resolves, and
// the log of names.
func testName(t *testing.T, test func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs)) {
	logs := observeNames(t)
	slots, trouble := lookupSlots, troubleSlots
	defer func() { lookupSlots, troubleSlots = slots, trouble }()
	synctest.Test(t, func(t *testing.T) {
		lookupSlots, troubleSlots = newLookupSlots(0) // of the bubble
		defer time.Sleep(lookupTimeout)               // a lookup that nobody waits for ends by then
		f := new(fakeLookup)
		test(t, &hostName{host: "db", lookup: f.lookup}, f, logs)
	})
}

// requireResolves has the name resolve to the addresses, after so long.
func requireResolves(t *testing.T, n *hostName, after time.Duration, addresses ...string) {
	t.Helper()
	began := time.Now()
	got, err := n.resolve(t.Context())
	require.NoError(t, err)
	require.Equal(t, addrs(addresses...), got)
	require.Equal(t, after, time.Since(began))
}

// requireAllResolve is the same for a thousand at once.
func requireAllResolve(t *testing.T, n *hostName, after time.Duration, addresses ...string) {
	t.Helper()
	var (
		wg    sync.WaitGroup
		began = time.Now()
		got   [1000][]netip.Addr
		errs  [1000]error
	)
	for i := range got {
		wg.Go(func() { got[i], errs[i] = n.resolve(t.Context()) })
	}
	wg.Wait()
	require.Equal(t, after, time.Since(began))
	for i := range got {
		require.NoError(t, errs[i])
		require.Equal(t, addrs(addresses...), got[i])
	}
}

// requireLogged has the messages logged since the last call, in a bubble.
func requireLogged(t *testing.T, logs *observer.ObservedLogs, messages ...string) {
	t.Helper()
	synctest.Wait()
	require.Equal(t, messages, logged(logs))
}

func logged(logs *observer.ObservedLogs) (messages []string) {
	for _, l := range logs.TakeAll() {
		messages = append(messages, l.Level.String()+" "+l.Message)
	}
	return messages
}

const (
	logServesOn = "warn lookups of a name fail or are late, its last addresses serve on"
	logAnswered = "info lookups of a name are answered again in time"
)

func TestNameIsLookedUpEachTime(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(20*time.Millisecond, nil, "10.0.0.1")
		requireResolves(t, n, 20*time.Millisecond, "10.0.0.1")
		f.set(20*time.Millisecond, nil, "10.0.0.2", "10.0.0.3")
		requireResolves(t, n, 20*time.Millisecond, "10.0.0.2", "10.0.0.3")
		require.Equal(t, 2, f.count())
		requireAllResolve(t, n, 20*time.Millisecond, "10.0.0.2", "10.0.0.3")
		require.Equal(t, 3, f.count(), "one for all who ask at a time")
		require.Empty(t, n.troubled())
		requireLogged(t, logs)
	})
}

func TestNameOfAResolverThatStalls(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		answered := time.Now().UTC().Format(time.RFC3339)

		f.set(forEver, nil)
		requireAllResolve(t, n, lookupWait, "10.0.0.1")
		require.Empty(t, n.troubled(), "it may just be slow")
		requireResolves(t, n, 0, "10.0.0.1")
		time.Sleep(lookupLate)
		require.Equal(t, "lookup db: no answer within 1s; using its addresses of "+answered, n.troubled())
		for range 1000 {
			requireResolves(t, n, 0, "10.0.0.1")
		}
		require.Equal(t, 2, f.count(), "nobody starts another")
		requireLogged(t, logs, logServesOn)

		time.Sleep(lookupTimeout)
		require.Equal(t, "lookup db: i/o timeout; using its addresses of "+answered, n.troubled())
		time.Sleep(lookupAgain)
		requireResolves(t, n, 0, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		synctest.Wait()
		require.Equal(t, 3, f.count())
		time.Sleep(lookupTimeout + lookupAgain)
		requireLogged(t, logs)

		f.set(time.Millisecond, nil, "10.0.0.2")
		requireResolves(t, n, 0, "10.0.0.1")
		time.Sleep(time.Millisecond)
		synctest.Wait()
		require.Empty(t, n.troubled())
		requireLogged(t, logs, logAnswered)
		requireResolves(t, n, time.Millisecond, "10.0.0.2")
	})
}

func TestNameOfAResolverThatFails(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(0, serverFail)
		_, err := n.resolve(t.Context())
		require.ErrorIs(t, err, serverFail, "there is nothing to use")
		require.Empty(t, n.troubled(), "the connect's error says it")
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		requireLogged(t, logs)

		f.set(time.Millisecond, serverFail)
		asked := f.count()
		requireResolves(t, n, time.Millisecond, "10.0.0.1")
		for range 100 {
			requireResolves(t, n, 0, "10.0.0.1")
		}
		synctest.Wait()
		require.Equal(t, asked+1, f.count(), "not more often than lookupAgain")
		time.Sleep(staleFor - time.Second)
		requireResolves(t, n, time.Millisecond, "10.0.0.1")
		require.Contains(t, n.troubled(), "server misbehaving; using its addresses of ")
		requireLogged(t, logs, logServesOn)
		time.Sleep(2 * time.Second)
		_, err = n.resolve(t.Context())
		require.ErrorIs(t, err, serverFail, "their time is over")
		require.Empty(t, n.troubled())

		f.set(0, nil, "10.0.0.9")
		requireResolves(t, n, 0, "10.0.0.9")
		requireLogged(t, logs, logAnswered)
	})
}

func TestNameThatEnds(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(time.Millisecond, noSuchHost)
		_, err := n.resolve(t.Context())
		require.ErrorIs(t, err, noSuchHost, "an answer")
		f.set(0, serverFail)
		_, err = n.resolve(t.Context())
		require.ErrorIs(t, err, serverFail, "which ended the use of the addresses")

		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(0, serverFail)
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(0, noSuchHost)
		time.Sleep(lookupAgain)
		requireResolves(t, n, 0, "10.0.0.1")
		synctest.Wait()
		require.Empty(t, n.troubled())
		_, err = n.resolve(t.Context())
		require.ErrorIs(t, err, noSuchHost)
		requireLogged(t, logs, logServesOn, logAnswered)
	})
}

func TestNameThatNeverResolved(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(5*time.Second, nil, "10.0.0.1")
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		_, err := n.resolve(ctx)
		require.Equal(t, 3*time.Second, time.Since(began))
		require.EqualError(t, err, "lookup db: i/o timeout")
		require.Equal(t, dialTimeout, classify(&net.OpError{Op: "dial", Net: "tcp", Err: err}))

		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		_, err = n.resolve(ctx)
		require.Equal(t, 4*time.Second, time.Since(began), "at once")
		require.ErrorIs(t, err, context.Canceled)

		requireResolves(t, n, time.Second, "10.0.0.1")
		require.Equal(t, 1, f.count(), "the first lookup served those who came later")
	})
}

// The first of two servers does not answer: each lookup takes its five seconds.
func TestNameOfAResolverThatIsAlwaysLate(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(5*time.Second, nil, "10.0.0.1")
		requireResolves(t, n, 5*time.Second, "10.0.0.1")
		f.set(5*time.Second, nil, "10.0.0.2")
		got := make(map[string]bool)
		for range 60 {
			time.Sleep(time.Second)
			began := time.Now()
			a, err := n.resolve(t.Context())
			require.NoError(t, err)
			require.Zero(t, time.Since(began))
			got[a[0].String()] = true
		}
		require.Equal(t, map[string]bool{"10.0.0.1": true, "10.0.0.2": true}, got, "late answers count")
		requireLogged(t, logs, logServesOn)
		require.Contains(t, n.troubled(), "no answer within 1s")
	})
}

func TestNameWaitEndsWithItsContext(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, _ *observer.ObservedLogs) {
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(forEver, nil)
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		time.AfterFunc(time.Millisecond, cancel)
		_, err := n.resolve(ctx)
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, time.Millisecond, time.Since(began))
	})
}

// Nobody connects while the trouble ends.
func TestNameThatNobodyUsedForAWhile(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, logs *observer.ObservedLogs) {
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(0, serverFail)
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(time.Millisecond, nil, "10.0.0.2")
		time.Sleep(lookupRecent)
		requireResolves(t, n, time.Millisecond, "10.0.0.2")
		requireLogged(t, logs, logServesOn, logAnswered)
	})
}

func TestNameWithLittleTime(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, _ *observer.ObservedLogs) {
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		f.set(forEver, nil)
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		got, err := n.resolve(ctx)
		require.NoError(t, err)
		require.Equal(t, addrs("10.0.0.1"), got)
		require.Equal(t, 10*time.Millisecond, time.Since(began), "half of it is left for the connect")
	})
}

func TestNamesInTroubleDoNotHoldUpOthers(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, _ *observer.ObservedLogs) {
		dead := new(fakeLookup)
		dead.set(forEver, nil)
		var most, now atomic.Int64
		for range 500 {
			d := &hostName{host: "dead", lookup: func(ctx context.Context, host string) (answer, error) {
				most.Store(max(most.Load(), now.Add(1)))
				defer now.Add(-1)
				return dead.lookup(ctx, host)
			}, trouble: serverFail}
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			_, err := d.resolve(ctx)
			require.Error(t, err)
			cancel()
		}
		f.set(0, nil, "10.0.0.1")
		requireResolves(t, n, 0, "10.0.0.1")
		require.EqualValues(t, 4, most.Load())
	})
}

func TestNameKeepsAFamilyThatFailed(t *testing.T) {
	testName(t, func(t *testing.T, n *hostName, f *fakeLookup, _ *observer.ObservedLogs) {
		f.set(0, nil, "10.0.0.1", "fd00::1", "fd00::2")
		requireResolves(t, n, 0, "10.0.0.1", "fd00::1", "fd00::2")
		half := func(addresses ...string) {
			f.set(0, nil, addresses...)
			f.mu.Lock()
			f.found.whole = false
			f.mu.Unlock()
		}
		half("10.0.0.2")
		requireResolves(t, n, 0, "10.0.0.2", "fd00::1", "fd00::2")
		time.Sleep(staleFor)
		requireResolves(t, n, 0, "10.0.0.2", "fd00::1", "fd00::2")
		time.Sleep(time.Second)
		requireResolves(t, n, 0, "10.0.0.2")
		f.set(0, nil, "10.0.0.3", "fd00::3")
		requireResolves(t, n, 0, "10.0.0.3", "fd00::3")
		f.set(0, nil, "fd00::4")
		requireResolves(t, n, 0, "fd00::4")
	})
}

func TestNamesAreShared(t *testing.T) {
	a, err := parseTarget("Shared.tcp-lb.test:80")
	require.NoError(t, err)
	b, err := parseTarget("shared.tcp-lb.test:81")
	require.NoError(t, err)
	require.Same(t, a.name, b.name)
	require.Same(t, a.name, a.withPort(1).name)
	for _, address := range []string{"10.0.0.1:80", "[fe80::1%eth0]:80", "unix//run/x.sock"} {
		literal, err := parseTarget(address)
		require.NoError(t, err)
		require.Nil(t, literal.name, "%s needs no lookup", address)
	}
}
