package tcplb

import (
	"context"
	"net"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
	"github.com/caddyserver/caddy/v2"
	"github.com/mholt/caddy-l4/layer4"
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
	return listenShared(ctx, address, config, arrivalsOf(ctx, address.JoinHostPort(0)))
}

// arrivals is what a listener has to know of its connections.
type arrivals struct {
	waiting *waitingList // nil: not all of them lead to a tcp_lb handler
	files   int64        // that each takes, if not all do
}

// arrivalsOf looks at who listens: the layer4 app, an HTTP server, or another.
func arrivalsOf(ctx context.Context, address string) arrivals {
	c, ok := ctx.(caddy.Context)
	if !ok {
		return arrivals{files: files.PerConnection}
	}
	if _, ok := c.Module().(*layer4.App); !ok {
		return arrivals{files: 1}
	}
	app, err := c.AppIfConfigured("tcp_lb")
	if err == nil && coversAddress(app.(*App).servers, address) {
		return arrivals{waiting: app.(*App).waiting}
	}
	return arrivals{files: files.PerConnection}
}
