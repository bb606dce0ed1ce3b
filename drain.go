package tcplb

import (
	"context"
	"sync/atomic"
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

// exitMargin is how long past the drain timeout the process waits for
// connections that are still being set up.
const exitMargin = time.Second

// drainOnExit waits until all connections have ended, by themselves or by their
// drain timeout, which began when the config stopped. Caddy calls it with the
// listeners closed and the metrics endpoint still up.
func drainOnExit(ctx context.Context) {
	limit := time.Duration(lastDrain.Load()) + exitMargin
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	logger := caddy.Log().Named("tcp_lb")
	if n := open.n.Load(); n > 0 {
		logger.Info("waiting for open connections", zap.Int64("connections", n), zap.Duration("at_most", limit))
	}
	open.wait(ctx)
	for _, p := range registry.snapshot() {
		p.logEnd(p.total()) // those whose connections could not be ended in time
	}
}

// lastDrain is the longest time, in nanoseconds, that a connection of a stopped
// generation may still take: to connect, and to drain.
var lastDrain atomic.Int64
