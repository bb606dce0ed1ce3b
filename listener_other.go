//go:build !linux

package tcplb

import (
	"context"
	"net"

	"github.com/caddyserver/caddy/v2"
)

// listenShared opens Caddy's own TCP listener.
func listenShared(ctx context.Context, address caddy.NetworkAddress, config net.ListenConfig, _ arrivals) (any, error) {
	return address.Listen(ctx, 0, config)
}

// entrances returns those that have books: none, since the listeners are Caddy's.
func entrances() []*entrance { return nil }
