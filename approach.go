package tcplb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
	"github.com/caddyserver/caddy/v2"
)

// ApproachConfig is how backends are connected to: for a handler, and for one
// backend, where what is set holds for that in place of the handler's.
type ApproachConfig struct {
	// ProxyProtocol is the version, v1 or v2, of the PROXY header by which a backend
	// learns the client's address; the health checks begin with one, too, unless they
	// say otherwise. Default: off.
	ProxyProtocol checks.ProxyVersion `json:"proxy_protocol,omitempty"`
	// LocalAddress is the IP address of this machine to connect from, for health
	// checks as for clients, or off. Placeholders are resolved once, when the config is
	// loaded. Default: off, which is as the system routes.
	LocalAddress string `json:"local_address,omitempty"`
	// TLS is what backends speak with the balancer, after a PROXY header; the health
	// checks speak it, too, unless they say otherwise or go to another port. Default:
	// none.
	TLS *BackendTLS `json:"tls,omitempty"`
}

// over returns c with what it leaves open as the handler's has it.
func (c ApproachConfig) over(handlers ApproachConfig) ApproachConfig {
	setDefault(&c.ProxyProtocol, handlers.ProxyProtocol)
	setDefault(&c.LocalAddress, handlers.LocalAddress)
	c.TLS = c.TLS.over(handlers.TLS)
	return c
}

// approach is how a connection to a backend begins, beyond its address. Nil is a
// bare connect.
type approach struct {
	local    netip.Addr          // to connect from; not valid = any
	proxy    checks.ProxyVersion // of the header that goes first; empty = none
	security *security           // nil = no TLS
	text     string              // of all that

	resumesNothing bool
}

// newApproach makes the approach of a checked config.
func newApproach(ctx caddy.Context, c ApproachConfig, loaded securities) (*approach, error) {
	if c.ProxyProtocol == proxyOff {
		c.ProxyProtocol = ""
	}
	if c.LocalAddress == localOff {
		c.LocalAddress = ""
	}
	if c == (ApproachConfig{}) {
		return nil, nil
	}
	s, err := loaded.load(ctx, c.TLS)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	return &approach{local: localAddress(c.LocalAddress), proxy: c.ProxyProtocol, security: s, text: string(text)}, nil
}

// to returns the target as a connect of a's wants it.
func (a *approach) to(t target) target {
	if a != nil {
		t.from = a.local
	}
	return t
}

// afresh returns a, which has TLS, without what was kept of earlier connections.
func (a *approach) afresh() *approach {
	c := *a
	c.resumesNothing = true
	return &c
}

// parties are the two ends of a client's connection to the balancer.
type parties struct{ client, local net.Addr }

// open has a connection to b begin as a says, by the deadline or the end of ctx, so
// that the client's bytes may follow; who has it is what a PROXY header tells. It
// returns the connection to use from then on. Where that fails conn is closed.
//
// Of ctx nothing is asked while it is quick: see patience.
func (a *approach) open(ctx context.Context, b *Backend, conn net.Conn, deadline time.Time, who parties, turn *secure.Turn) (net.Conn, error) {
	if a.proxy != "" {
		header, err := proxyHeader(a.proxy, who)
		if err == nil {
			err = sendFirst(ctx, conn, header, deadline)
		}
		if err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("sending the PROXY header: %w", err)
		}
	}
	if a.security != nil {
		return b.secure(ctx, conn, a.security, a.resumesNothing, deadline, turn)
	}
	return conn, nil
}

// sendAny is sendFirst for a connection of any kind.
func sendAny(ctx context.Context, conn net.Conn, b []byte, deadline time.Time) error {
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Unix(1, 0)) })
	_, err := conn.Write(b)
	if !stop() && err == nil { // its deadline may come after the next one
		err = context.Cause(ctx)
	}
	return errors.Join(err, conn.SetWriteDeadline(time.Time{}))
}
