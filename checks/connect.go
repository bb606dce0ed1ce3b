package checks

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/caddyserver/caddy/v2"
)

func init() {
	caddy.RegisterModule(Connect{})
	caddy.RegisterModule(new(HTTP))
	caddy.RegisterModule(new(Dialogue))
}

// Connect connects: with TLS it wants a handshake, a certificate that holds, and no
// complaint about its own.
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
	conn, err := t.Dial(ctx)
	if secure, ok := conn.(*tls.Conn); ok && err == nil {
		return refusal(secure)
	}
	return err
}

// refusal waits for what a backend may have against a handshake that was done here:
// since TLS 1.3 it sees a certificate after that, or that there is none.
func refusal(conn *tls.Conn) error {
	if conn.CloseWrite() != nil || conn.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return nil // it is gone, and has said nothing
	}
	_, err := io.Copy(io.Discard, conn)
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		return fmt.Errorf("after the TLS handshake: %w", err)
	}
	return nil
}

// Interface guard
var _ Check = Connect{}
