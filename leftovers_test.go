package tcplb

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"go.uber.org/goleak"
)

// Caddy and its libraries start these, and end them later or never.
var caddysGoroutines = []goleak.Option{
	goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2/modules/caddytls.(*TLS).keepStorageClean.func1"),
	goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
	goleak.IgnoreAnyFunction("github.com/DeRuina/timberjack.(*Logger).millRun"),
	goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"),
	goleak.IgnoreAnyFunction("go.opencensus.io/stats/view.(*worker).start"),
}

// watchLeftovers checks, when all other clean-up of the test is done, that
// goroutines, sockets, pipes and the file budget are where they were.
func watchLeftovers(t testing.TB) {
	t.Helper()
	noPoolsYet(t)
	goroutines := append([]goleak.Option{goleak.IgnoreCurrent()}, caddysGoroutines...)
	filesBefore := openFiles(t)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		noPoolsYet(t)
		var err error
		eventually(t, func() bool { err = goleak.Find(goroutines...); return err == nil }, "no goroutine left: %v", lazily(func() any { return err }))
		eventually(t, func() bool { return openFiles(t) <= filesBefore }, "%d sockets and pipes open again, now %v", filesBefore, lazily(func() any { return openFiles(t) }))
		eventually(t, func() bool { return files.Process.Used() == 0 }, "the file budget is free again")
		eventually(t, func() bool { return files.Process.Overflow() == 0 && files.Process.Guests() == 0 }, "its shares, too")
		eventually(t, func() bool { return onTheirWay() == 0 }, "no connection is on its way")
	})
}

// onTheirWay is how many connections have yet to reach a handler.
func onTheirWay() int {
	n, _ := listener.OnTheirWay()
	return n
}

// lazily is a value for a message, found when that is written.
type lazily func() any

func (f lazily) String() string { return fmt.Sprint(f()) }

// requireSharedListener skips the test where tcp_lb/ is Caddy's own listener,
// which loses connections that wait in its queue.
func requireSharedListener(t testing.TB) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("the listener network tcp_lb is Linux's only")
	}
}
