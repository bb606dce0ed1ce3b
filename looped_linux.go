package tcplb

import (
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/loop"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
	"golang.org/x/sys/unix"
)

// newLooped returns a relay on an event loop, to which both connections belong
// from here on; nil where there is none to be had, and nothing has changed.
func newLooped(client *listener.Conn, backend *socket.Conn, o relay.Options) relay.Relay {
	l, err := loop.Acquire()
	if err != nil {
		return nil
	}
	from, ok := client.Detach()
	if !ok {
		l.Leave()
		return nil
	}
	to, ok := backend.Detach()
	if !ok { // never: nobody else has it
		_ = unix.Close(from)
		l.Leave()
		return nil
	}
	return relay.NewLoopedOn(l, from, to, o)
}
