package tcplb

import (
	"context"
	"net"

	"github.com/caddyserver/caddy/v2"
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
	return listenShared(ctx, address.At(offset), config)
}
