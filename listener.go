package tcplb

import (
	"context"
	"errors"
	"io/fs"
	"net"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

func init() {
	caddy.RegisterNetwork(networkName, listenNetwork)
}

// networkName is the network of this package's listeners.
const networkName = "tcp_lb"

// listenNetwork opens a listener of the network "tcp_lb", as in
// "tcp_lb/:8080". It is TCP on a socket that all configs share which listen on
// the address, so that a reload loses no connection that waits to be accepted.
// Caddy opens one socket for each config and closes it with that.
func listenNetwork(ctx context.Context, _, host, ports string, offset uint, config net.ListenConfig) (any, error) {
	address, err := caddy.ParseNetworkAddress(caddy.JoinNetworkAddress("tcp", host, ports))
	if err != nil {
		return nil, err
	}
	address = address.At(offset)
	key := address.JoinHostPort(0)
	ln, err := listener.Listen(ctx, key, config, arrivalsOf(ctx, key), listenerLog)
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, errors.ErrUnsupported):
		return address.Listen(ctx, 0, config) // Caddy may have ways to get it, or has all there is
	case err != nil:
		return nil, err
	}
	return ln, nil
}

// listenerLog is the newest config's: a listening socket may outlive many.
func listenerLog() *zap.Logger { return caddy.Log().Named("tcp_lb") }

// arrivalsOf looks at who listens: the layer4 app, an HTTP server, or another.
func arrivalsOf(ctx context.Context, address string) listener.Arrivals {
	c, ok := ctx.(caddy.Context)
	if !ok {
		return listener.Arrivals{Files: files.PerConnection}
	}
	if _, ok := c.Module().(*layer4.App); !ok {
		return listener.Arrivals{Files: 1}
	}
	app, err := c.AppIfConfigured("tcp_lb")
	if err == nil && coversAddress(app.(*App).servers, address) {
		return listener.Arrivals{Waiting: app.(*App).waiting}
	}
	return listener.Arrivals{Files: files.PerConnection}
}

// acceptedFrom returns the connection of a tcp_lb listener that conn is, or that
// is somewhere inside; nil if there is none.
func acceptedFrom(conn net.Conn) *listener.Conn {
	for conn != nil {
		if c, ok := conn.(*listener.Conn); ok {
			return c
		}
		conn = relay.Unwrap(conn)
	}
	return nil
}
