package tcplb

import (
	"context"
	ossignal "os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

func init() {
	caddy.OnExit(drainOnExit)
}

// open counts the connections that handlers are working on, so that the
// process can wait for the last of them.
var open tracker

// tracker counts what is under way. One waiter may wait for none to be left.
type tracker struct {
	n     atomic.Int64
	empty chan struct{} // wakes the waiter; capacity 1
}

func init() { open.empty = make(chan struct{}, 1) }

func (t *tracker) enter() { t.n.Add(1) }

func (t *tracker) leave() {
	if t.n.Add(-1) == 0 {
		signal(t.empty)
	}
}

// wait returns true once none is left, false if ctx ends before.
func (t *tracker) wait(ctx context.Context) bool {
	for t.n.Load() > 0 {
		select {
		case <-t.empty:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// exitMargin is how long past the drain timeout the process waits: for
// connections to be cut and counted.
const exitMargin = time.Second

// drainOnExit waits until all connections have ended, by themselves or by their
// drain timeout, which began when the config stopped. A SIGTERM that comes now is
// the second, and cuts them. Caddy calls this with the listeners closed and the
// metrics endpoint still up.
func drainOnExit(ctx context.Context) {
	limit := max(0, time.Until(time.Unix(0, drainEnd.Load()))) + exitMargin
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	logger := caddy.Log().Named("tcp_lb")
	if n := open.n.Load(); n > 0 {
		logger.Info("waiting for open connections", zap.Int64("connections", n), zap.Duration("at_most", limit))
	}
	impatient, stop := ossignal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	if !open.wait(impatient) && ctx.Err() == nil {
		logger.Warn("terminated again, cutting the open connections", zap.Int64("connections", open.n.Load()))
		registry.cutAll()
		open.wait(ctx)
	}
	for _, p := range registry.snapshot() {
		p.logEnd(p.total()) // those whose connections could not be ended in time
	}
}

// cutAll ends every connection of pools that no config has any more.
func (r *poolRegistry) cutAll() {
	for _, p := range r.snapshot() {
		p.abandon()
		for _, b := range p.backends {
			b.cut()
		}
	}
}

// drainEnd is when the last drain timeout ends that has begun, in Unix
// nanoseconds.
var drainEnd atomic.Int64

// drainsBy notes that connections may be drained until then.
func drainsBy(t time.Time) {
	for {
		old := drainEnd.Load()
		if t.UnixNano() <= old || drainEnd.CompareAndSwap(old, t.UnixNano()) {
			return
		}
	}
}
