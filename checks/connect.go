package checks

import (
	"context"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddy.RegisterModule(Connect{})
	caddy.RegisterModule(new(HTTP))
	caddy.RegisterModule(new(Dialogue))
}

// Connect connects: with TLS it wants a handshake and a certificate that holds.
type Connect struct{}

// CaddyModule returns the Caddy module information.
func (Connect) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  Namespace + ".connect",
		New: func() caddy.Module { return new(Connect) },
	}
}

// Check implements Check.
func (Connect) Check(ctx context.Context, t Target) error {
	_, err := t.Dial(ctx)
	return err
}

// Interface guard
var _ Check = Connect{}
