//go:build !linux

package tcplb

import (
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/listener"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/socket"
)

func newLooped(*listener.Conn, *socket.Conn, relay.Options) relay.Relay { return nil }
