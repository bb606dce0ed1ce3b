//go:build !linux

package tcplb

import (
	"context"
	"net"

	"github.com/caddyserver/caddy/v2"
)

// listenShared opens Caddy's own TCP listener.
func listenShared(ctx context.Context, address caddy.NetworkAddress, config net.ListenConfig) (any, error) {
	return address.Listen(ctx, 0, config)
}
