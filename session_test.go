package tcplb

import (
	"bytes"
	"runtime/pprof"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// On a tcp_lb listener, caddy-l4's goroutine for a connection ends once that
// has its backend, and closes nothing.
func TestConnectionIsTakenOver(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	s := echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, backendsJSON(s.address)+"}"))
	c := dialClient(t, lb)
	write(t, c, "hello")
	expect(t, c, "hello")
	eventually(t, func() bool {
		return goroutinesOf("layer4.(*Server).handle(") == 0
	}, "caddy-l4 has done with the connection")
	write(t, c, "still there")
	expect(t, c, "still there")
	require.NoError(t, c.CloseWrite())
	expectEOF(t, c)
	requireBooksBalance(t, 1)
}

// goroutinesOf returns how many there are with the function on their stack.
func goroutinesOf(function string) int {
	var all bytes.Buffer
	_ = pprof.Lookup("goroutine").WriteTo(&all, 2) // no buffer fails
	return bytes.Count(all.Bytes(), []byte(function))
}

// Who lists connections meets them at any moment, also while they are taken over.
func TestListingBesideTakeOvers(t *testing.T) {
	requireSharedListener(t)
	watchLeftovers(t)
	s := echoServer(t)
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, backendsJSON(s.address)+"}"))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // ends with stop
		defer close(stopped)
		for !isClosed(stop) {
			found, _ := connectionQuery{key: connectionOrders["idle"]}.find(time.Now())
			for _, f := range found {
				f.status(time.Now())
			}
		}
	}()
	for range 100 {
		c := dialClient(t, lb)
		write(t, c, "x")
		expect(t, c, "x")
		_ = c.Close()
	}
	close(stop)
	<-stopped
}
