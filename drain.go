package tcplb

import (
	"context"
	"os"
	ossignal "os/signal"
	"sync"
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
	end := time.Unix(0, exitEnd.Load())
	if exitEnd.Load() == 0 { // the config has no pool: those of earlier ones keep their time
		end = registry.lastDrainEnd()
	}
	if now := time.Now(); end.Before(now) {
		end = now
	}
	registry.drainBefore(end) // also what an earlier config gave more time
	limit := time.Until(end) + exitMargin
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	logger := caddy.Log().Named("tcp_lb")
	if n := open.n.Load(); n > 0 {
		logger.Info("waiting for open connections", zap.Int64("connections", n), zap.Duration("at_most", limit))
	}
	impatient, cut := context.WithCancel(ctx)
	defer cut()
	listenForTermination()
	go func() { // ends with impatient
		select {
		case <-terminated:
			cut()
		case <-impatient.Done():
		}
	}()
	if !open.wait(impatient) && ctx.Err() == nil {
		logger.Warn("terminated again, cutting the open connections", zap.Int64("connections", open.n.Load()))
		registry.drainBefore(time.Now())
		open.wait(ctx)
	}
	pools, departed, _ := registry.snapshotWithDeparted()
	for _, p := range departed {
		if p.untold {
			p.logEnd(poolView{pool: p.pool}.total())
		}
	}
	for _, p := range pools {
		p.logEnd(p.total()) // those whose connections could not be ended in time
	}
}

// lastDrainEnd returns when the last of the drain timeouts ends that have begun.
func (r *poolRegistry) lastDrainEnd() (last time.Time) {
	for _, p := range r.snapshot() {
		ends := []time.Time{p.drainLimit()}
		for _, b := range p.backends {
			b.mu.Lock()
			ends = append(ends, b.drainEnd)
			b.mu.Unlock()
		}
		for _, end := range ends {
			if end.After(last) {
				last = end
			}
		}
	}
	return last
}

// drainBefore ends all that is drained for longer by then.
func (r *poolRegistry) drainBefore(t time.Time) {
	for _, p := range r.snapshot() {
		p.drainBefore(t)
		for _, b := range p.backends {
			b.drainBefore(t)
		}
	}
}

// exitEnd is when the last drain timeout ends that has begun with the exit, in
// Unix nanoseconds.
var exitEnd atomic.Int64

// exitsBy notes that connections may be drained until then.
func exitsBy(t time.Time) {
	for {
		old := exitEnd.Load()
		if t.UnixNano() <= old || exitEnd.CompareAndSwap(old, t.UnixNano()) {
			return
		}
	}
}

// delayShutdown waits for shutdown_delay, with all apps at work. A SIGTERM that comes
// now is the second: it ends the delay, and then what is open.
func (a *App) delayShutdown() {
	if a.ShutdownDelay == 0 || exitDelayed.Swap(true) {
		return
	}
	logger := caddy.Log().Named("tcp_lb")
	logger.Info("exiting, tcp_lb_health says so; listening goes on for the delay", zap.Duration("shutdown_delay", time.Duration(a.ShutdownDelay)))
	delay := time.NewTimer(time.Duration(a.ShutdownDelay))
	defer delay.Stop()
	select {
	case <-delay.C:
	case s := <-terminated:
		select {
		case terminated <- s: // for drainOnExit
		default: // there is a third
		}
		logger.Warn("terminated again, ending the shutdown delay")
	}
}

// terminated has the SIGTERMs that come once an exit is under way.
var terminated = make(chan os.Signal, 1)

var listenForTermination = sync.OnceFunc(func() { ossignal.Notify(terminated, syscall.SIGTERM) })

// exitDelayed is whether the exit has had its delay: one that begins while a config
// is being loaded stops two of them, one after the other.
var exitDelayed atomic.Bool

// cutOnTermination cuts what is open at the next SIGTERM, whatever Caddy waits for
// at the time. It ends with the process.
func cutOnTermination() {
	s := <-terminated
	registry.drainBefore(time.Now())
	select {
	case terminated <- s: // drainOnExit is to end, too
	default:
	}
}
