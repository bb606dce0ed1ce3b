package tcplb

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/loop"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
	"golang.org/x/sys/unix"
)

// connectTCP connects to one address, by the deadline; from one of this machine
// where that is valid. Go's poller gets to know nothing of it.
func connectTCP(ctx context.Context, from netip.Addr, to netip.AddrPort, deadline time.Time) (net.Conn, error) {
	return connected(socket.ConnectFrom(from, to, deadline, awaitUnder(ctx)))
}

func connectUnix(ctx context.Context, path string, deadline time.Time) (net.Conn, error) {
	return connected(socket.ConnectUnix(path, deadline, awaitUnder(ctx)))
}

func connected(c *socket.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// sendFirst writes b, which is little, by the deadline or the end of ctx. A bare socket
// stays one.
func sendFirst(ctx context.Context, conn net.Conn, b []byte, deadline time.Time) error {
	if c, ok := conn.(*socket.Conn); ok {
		return c.Send(b, deadline, awaitUnder(ctx))
	}
	return sendAny(ctx, conn, b, deadline)
}

// awaitUnder waits for a socket until ctx ends. Of ctx nothing is asked while
// that is quick, as nearly all are: see patience.
func awaitUnder(ctx context.Context) socket.Await {
	return func(fd int, deadline time.Time) error {
		if soon := time.Now().Add(watchAfter); deadline.IsZero() || soon.Before(deadline) {
			err := loop.Await(fd, unix.POLLOUT, soon, nil)
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
		}
		return loop.Await(fd, unix.POLLOUT, deadline, ctx.Done())
	}
}

// brief makes of a connection one that ends soon, if it can be.
func brief(c net.Conn) (net.Conn, error) {
	if c, ok := c.(*socket.Conn); ok {
		return c.Brief()
	}
	return c, nil
}
