package tcplb

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

func init() { caddy.RegisterModule(new(always)) }

// always is a check that a test answers; without By it passes.
type always struct {
	By string `json:"by,omitempty"`
}

// answers has those of the tests, by name: func(context.Context, checks.Target) error.
var answers sync.Map

func (*always) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: checks.Namespace + ".always", New: func() caddy.Module { return new(always) }}
}

// Check implements checks.Check.
func (a *always) Check(ctx context.Context, t checks.Target) error {
	if answer, ok := answers.Load(a.By); ok {
		return answer.(func(context.Context, checks.Target) error)(ctx, t)
	}
	return nil
}

func (a *always) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.Errf("takes no value, found %q", d.Val())
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("takes no block, found %q", d.Val())
	}
	return nil
}

// tell has the checks by this name answered until the test ends.
func tell(t testing.TB, by string, f func(ctx context.Context, t checks.Target) error) {
	t.Helper()
	answers.Store(by, f)
	t.Cleanup(func() { answers.Delete(by) })
}

// askedBy has backends checked by what the test answers.
func askedBy(by string, change func(*ActiveHealthChecks), addresses ...string) func(*Handler) {
	return func(h *Handler) {
		h.Backends = backendList(addresses...)
		h.activeChecks().CheckRaw = fmt.Appendf(nil, `{"check":"always","by":%q}`, by)
		if change != nil {
			change(h.HealthChecks.Active)
		}
	}
}

// roleServer answers 200 at the path of its role, and 503 elsewhere.
func roleServer(t testing.TB, role string) *server {
	t.Helper()
	return startServer(t, func(c *net.TCPConn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		switch {
		case err != nil:
		case r.URL.Path == "/"+role:
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		default:
			_, _ = io.WriteString(c, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
		}
	})
}

// Two pools over the same backends ask different things, and each believes what it
// was told.
func TestVerdictsOfTwoChecks(t *testing.T) {
	db1, db2 := echoServer(t), echoServer(t)
	primary, replica := roleServer(t, "primary"), roleServer(t, "replica")
	port := func(s *server) int { return s.ln.Addr().(*net.TCPAddr).Port }
	backends := fmt.Sprintf(`"backends":[{"address":%q,"health_port":%d},{"address":%q,"health_port":%d}]`,
		db1.address, port(primary), db2.address, port(replica))
	noPoolsYet(t)
	runCaddy(t, layer4Config(
		lbAt("rw", freeAddress(t), `{"name":"rw",`+backends+`,"health_checks":{"active":{"uri":"/primary"}}}`)+`,`+
			lbAt("ro", freeAddress(t), `{"name":"ro",`+backends+`,"health_checks":{"active":{"uri":"/replica"}}}`)))
	for name, want := range map[string]string{"rw": db1.address, "ro": db2.address} {
		g := registry.newest(name)
		for _, m := range g.members() {
			b := m.Backend
			eventually(t, b.isChecked, "a verdict on %s in %s", b.address, name)
			eventually(t, func() bool { return b.Available() == (b.address == want) }, "%s in %s", b.address, name)
			if b.address != want {
				require.Equal(t, "HTTP 503, want 2xx", *b.lastError.Load())
			}
		}
		for range 4 {
			require.Equal(t, want, choice(g).address)
		}
	}
	require.Zero(t, db1.acceptedCount()+db2.acceptedCount(), "the checks are on their own ports")
}

func TestCheckByAModule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeNet()
		var targets []string
		tell(t, t.Name(), func(ctx context.Context, target checks.Target) error {
			if _, err := target.Dial(ctx); err != nil {
				return err
			}
			targets = append(targets, target.Address+" "+target.Host)
			return errors.New("not today")
		})
		g, _ := testGeneration(t, f, askedBy(t.Name(), func(a *ActiveHealthChecks) { a.Port = 81 }, "db.example:80"))
		g.start()
		synctest.Wait()
		b := g.members()[0].Backend
		require.False(t, b.Available())
		require.Equal(t, "not today", *b.lastError.Load())
		require.Equal(t, []string{"db.example:81 db.example"}, targets)
		require.Len(t, f.times("db.example:81"), 1, "by the balancer's own connect")
		g.stop()
		synctest.Wait()
	})
}

// All of a check has the timeout, and says so.
func TestCheckHasItsTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tell(t, t.Name(), func(ctx context.Context, target checks.Target) error {
			_, _ = target.Dial(ctx)
			<-ctx.Done()
			return ctx.Err()
		})
		f := newFakeNet()
		f.latency = time.Second
		g, _ := testGeneration(t, f, askedBy(t.Name(), nil, one))
		g.start()
		time.Sleep(2*time.Second + time.Millisecond)
		b := g.members()[0].Backend
		require.False(t, b.Available())
		require.Equal(t, "no verdict within 2s: context deadline exceeded", *b.lastError.Load())
		g.stop()
		synctest.Wait()
	})
}

func TestPanicInACheckIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tell(t, t.Name(), func(context.Context, checks.Target) error { panic("bang") })
		g, logs := testGeneration(t, newFakeNet(), askedBy(t.Name(), nil, one))
		g.start()
		synctest.Wait()
		b := g.members()[0].Backend
		require.False(t, b.Available())
		require.Equal(t, "panic in the check: bang", *b.lastError.Load())
		require.Equal(t, 1, logs.FilterMessage("panic in a health check").Len())
		g.stop()
		synctest.Wait()
	})
}

// Nobody waits for a check that is gone.
func TestCheckThatEndsItsGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tell(t, t.Name(), func(context.Context, checks.Target) error {
			runtime.Goexit()
			return nil
		})
		g, _ := testGeneration(t, newFakeNet(), askedBy(t.Name(), nil, one))
		g.start()
		synctest.Wait()
		require.Equal(t, "the check ended without a verdict", *g.members()[0].Backend.lastError.Load())
		g.stop()
		synctest.Wait()
	})
}

// A check that is another one starts over: its first result decides alone, and
// until there is one the verdict stands.
func TestAnotherCheckDecidesAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := 100 * time.Millisecond
		tell(t, t.Name()+" down", func(context.Context, checks.Target) error { return errors.New("no") })
		tell(t, t.Name()+" up", func(ctx context.Context, _ checks.Target) error {
			pause(slow, ctx.Done())
			return nil
		})
		f := newFakeNet()
		patient := func(a *ActiveHealthChecks) { a.Passes, a.Fails = 10, 10 }
		g, _ := testGeneration(t, f, askedBy(t.Name()+" up", patient, one))
		g.start()
		time.Sleep(15 * time.Second)
		b := g.members()[0].Backend
		require.True(t, b.Available())

		next := func(by string, change func(*ActiveHealthChecks)) {
			t.Helper()
			old := g
			g, _ = testGeneration(t, f, askedBy(by, change, one))
			g.start()
			old.stop()
			require.Same(t, b, g.members()[0].Backend)
		}
		next(t.Name()+" down", patient)
		require.True(t, b.Available())
		time.Sleep(slow) // what an old check that is under way takes
		synctest.Wait()
		require.False(t, b.Available(), "at once, by one result")

		next(t.Name()+" up", patient)
		synctest.Wait()
		require.False(t, b.Available(), "until there is a result")
		require.True(t, b.isChecked())
		time.Sleep(slow)
		synctest.Wait()
		require.True(t, b.Available())

		passed := b.stats.checksPassed.Load()
		next(t.Name()+" up", func(a *ActiveHealthChecks) { a.Passes, a.Fails = 3, 3 })
		synctest.Wait()
		require.Equal(t, passed, b.stats.checksPassed.Load(), "the same question is not asked anew")
		next(t.Name()+" up", func(a *ActiveHealthChecks) { a.Passes, a.Fails, a.Port = 3, 3, 81 })
		time.Sleep(2 * slow)
		synctest.Wait()
		require.Greater(t, b.stats.checksPassed.Load(), passed, "but another port is another question")
		g.stop()
		synctest.Wait()
	})
}

// The result of a check that a reload overtook says nothing.
func TestResultOfTheOldCheckIsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tell(t, t.Name()+" slow", func(ctx context.Context, _ checks.Target) error {
			pause(time.Second, ctx.Done())
			return errors.New("of the old one")
		})
		var asked atomic.Int64
		tell(t, t.Name()+" up", func(context.Context, checks.Target) error {
			asked.Add(1)
			return nil
		})
		f := newFakeNet()
		old, logs := testGeneration(t, f, askedBy(t.Name()+" slow", nil, one))
		old.start()
		synctest.Wait()
		next, _ := testGeneration(t, f, askedBy(t.Name()+" up", nil, one))
		next.start()
		old.stop()
		b := next.members()[0].Backend
		time.Sleep(2 * time.Second)
		require.True(t, b.Available())
		require.Positive(t, asked.Load())
		require.Nil(t, b.lastError.Load())
		require.Zero(t, b.stats.checksFailed.Load())
		require.Zero(t, logs.FilterMessage("backend is down").Len())
		next.stop()
		synctest.Wait()
	})
}

func TestChecksOverTLSAndUnixSockets(t *testing.T) {
	h := handlerOf(t, `{"backends":[{"address":"unix//run/a.sock"}],"health_checks":{"active":{"tls":{"server_name":"db"}}}}`)
	require.NoError(t, h.fill())
	require.NoError(t, h.check())
	asked, err := h.newInquiry(caddy.Context{Context: t.Context()})
	require.NoError(t, err)
	require.Equal(t, checks.Connect{}, asked.check)
	require.Equal(t, "db", asked.wire.TLS.ServerName)

	h = handlerOf(t, `{`+backendsJSON("a:80")+`}`)
	require.NoError(t, h.fill())
	asked, err = h.newInquiry(caddy.Context{Context: t.Context()})
	require.NoError(t, err)
	require.Zero(t, asked, "a bare connect is what it always was")
}
