package tcplb

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func TestPanicIsContained(t *testing.T) {
	s := echoServer(t)
	f := newFakeNet()
	g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(s.address) })
	g.policy = panickingPolicy{}
	g.start()
	far, near := tcpPair(t)
	cx := layer4Connection(near)
	g.serve(cx)
	require.Equal(t, 1, logs.FilterMessage("panic while handling a connection").Len())
	require.Contains(t, string(logs.All()[0].ContextMap()["stack"].(string)), "panickingPicker")
	require.EqualValues(t, 1, g.pool.closed[reasonError].Load())
	require.Zero(t, g.pool.active.Load())
	expectEOF(t, far)
}

// A connect that panics leaves its backend no place and no line the poorer.
func TestPanicOfAConnectIsContained(t *testing.T) {
	near, far := tcpPair(t)
	for name, dial := range map[string]func(ctx context.Context, _ target, _ time.Duration) (net.Conn, error){
		"while connecting": func(ctx context.Context, _ target, _ time.Duration) (net.Conn, error) {
			ctx.Done() // as a handshake asks
			panic("in a connect")
		},
		"as it is prepared": func(context.Context, target, time.Duration) (net.Conn, error) { return stubbornConn{near}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			g, logs := testGeneration(t, newFakeNet(), func(h *Handler) {
				h.Backends = backendList(one)
				h.Backends[0].MaxConnections = 1
				h.ProxyProtocol = "v2"
				checksOff(h)
			})
			g.dial = dial
			g.start()
			defer g.stop()
			for n := range 2 {
				client, served := tcpPair(t)
				g.serve(layer4Connection(served))
				expectEOF(t, client)
				require.Equal(t, n+1, logs.FilterMessage("panic while handling a connection").Len(), "it had a place")
			}
			require.Zero(t, g.members()[0].Backend.Load())
			require.Zero(t, g.pool.waiters.waiting.Load())
			require.Zero(t, g.pool.active.Load())
		})
	}
	expectEOF(t, far)
}

// stubbornConn takes no header.
type stubbornConn struct{ net.Conn }

func (stubbornConn) Write([]byte) (int, error)        { panic("in a write") }
func (stubbornConn) SetWriteDeadline(time.Time) error { panic("in a deadline") }
func (stubbornConn) SetDeadline(time.Time) error      { panic("in a deadline") }

// A policy that can't make a picker does not keep a pool from serving.
func TestPanicOfAPolicyIsContained(t *testing.T) {
	f := newFakeNet()
	g, logs := testGeneration(t, f, func(h *Handler) { h.Backends = backendList(one, two); checksOff(h) })
	g.policy = hopelessPolicy{}
	g.start()
	defer g.stop()
	for range 2 {
		l, err := connect(g)
		require.NoError(t, err)
		l.release()
	}
	require.Len(t, f.times(one), 1, "round robin serves")
	require.Len(t, f.times(two), 1)
	lines := logs.FilterMessageSnippet("panic in the selection policy").All()
	require.NotEmpty(t, lines)
	require.Contains(t, lines[0].ContextMap()["stack"], "hopelessPolicy")
}

type hopelessPolicy struct{}

func (hopelessPolicy) NewPicker([]Candidate, Picker) Picker { panic("no idea") }

// Nor does a panic at a connection's end keep anything from being given back.
func TestPanicAtTheEndIsContained(t *testing.T) {
	watchLeftovers(t)
	s := namedServer(t, "a")
	g, logs := testGeneration(t, newFakeNet(), func(h *Handler) {
		h.Backends = backendList(s.address)
		h.AccessLog = true
	})
	g.dial = dialTarget
	g.access = zap.New(panickingCore{zapcore.NewNopCore()})
	g.start()
	defer g.stop()
	far, near := tcpPair(t)
	require.NoError(t, far.CloseWrite())
	g.serve(layer4Connection(near))
	require.Equal(t, 1, logs.FilterMessage("panic while handling a connection").Len())
	expect(t, far, "a")
	expectEOF(t, far)
	require.Zero(t, g.members()[0].Backend.Load())
	require.Zero(t, g.pool.active.Load())
	opened, active, _ := g.members()[0].Backend.stats.connections()
	require.EqualValues(t, 1, opened)
	require.Zero(t, active)
}

// Nor in the line of a connection that has its backend: it goes on, among the
// backend's others.
func TestPanicAtTheBeginningIsContained(t *testing.T) {
	watchLeftovers(t)
	s := echoServer(t)
	g, logs := testGeneration(t, newFakeNet(), func(h *Handler) {
		h.Backends = backendList(s.address)
		h.AccessLog, h.AccessLogConnects = true, true
	})
	g.dial = dialTarget
	g.start()
	defer g.stop()
	serve := func() *net.TCPConn {
		far, near := tcpPair(t)
		go g.serve(layer4Connection(near))
		write(t, far, "a")
		expect(t, far, "a")
		return far
	}
	before := serve()
	voice := *g.pool.voice.Load()
	voice.access = zap.New(panickingCore{zapcore.NewNopCore()})
	g.pool.voice.Store(&voice)
	panics := serve()
	require.Equal(t, 1, logs.FilterMessage("panic while handling a connection").Len())
	b := g.members()[0].Backend
	b.mu.Lock()
	open := slices.Collect(b.sessions.all())
	b.mu.Unlock()
	require.Len(t, open, 2)
	require.NoError(t, panics.Close())
	require.NoError(t, before.Close())
	eventually(t, func() bool { return b.Load() == 0 }, "both have ended")
	_, active, _ := b.stats.connections()
	require.Zero(t, active)
}

// Nor a wrapper's. It is closed at the end and, as it can't half-close, also when
// the backend ends first.
func TestPanicInCloseIsContained(t *testing.T) {
	for name, c := range map[string]struct {
		end    func(client, backend net.Conn)
		panics int
	}{
		"the client ends first":  {func(client, _ net.Conn) { _ = client.Close() }, 1},
		"the backend ends first": {func(_, backend net.Conn) { _ = backend.Close() }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			watchLeftovers(t)
			g, logs := testGeneration(t, newFakeNet(), func(h *Handler) { h.Backends = backendList(one); checksOff(h) })
			far, near := net.Pipe()
			inner, backend := net.Pipe()
			defer far.Close()
			defer backend.Close()
			g.dial = func(context.Context, target, time.Duration) (net.Conn, error) { return inner, nil }
			g.start()
			defer g.stop()
			c.end(far, backend)
			g.serve(layer4Connection(panickingConn{near}))
			require.Equal(t, c.panics, logs.FilterMessage("panic while handling a connection").Len())
			b := g.members()[0].Backend
			opened, active, _ := b.stats.connections()
			require.EqualValues(t, 1, opened)
			require.Zero(t, active)
			require.Zero(t, b.sessions.count)
			require.Zero(t, b.Load())
			require.Zero(t, g.pool.active.Load())
		})
	}
}

type panickingConn struct{ net.Conn }

func (panickingConn) Close() error { panic("not today") }

// panickingCore is an encoder with a bug, as anybody's module may have.
type panickingCore struct{ zapcore.Core }

func (panickingCore) Enabled(zapcore.Level) bool { return true }

func (panickingCore) Check(zapcore.Entry, *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	panic("no line today")
}

type panickingPolicy struct{}

func (panickingPolicy) NewPicker([]Candidate, Picker) Picker { return panickingPicker{} }

type panickingPicker struct{}

func (panickingPicker) Pick(*Request) *Backend { panic("out of luck") }
