//go:build !linux

package tcplb

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// connectTCP connects to one address, by the deadline; from one of this machine
// where that is valid.
//
// It does not use Dialer.DialTCP, which binds the local end even to no address
// in particular: a port taken by bind serves one connection only, one taken by
// connect serves one to each destination.
func connectTCP(ctx context.Context, from netip.Addr, to netip.AddrPort, deadline time.Time) (net.Conn, error) {
	d := dialer(deadline)
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	return d.DialContext(ctx, "tcp", to.String())
}

func connectUnix(ctx context.Context, path string, deadline time.Time) (net.Conn, error) {
	return dialer(deadline).DialContext(ctx, "unix", path)
}

// dialer leaves keep-alive probes to relay.KeepAlive.
func dialer(deadline time.Time) *net.Dialer { return &net.Dialer{Deadline: deadline, KeepAlive: -1} }

// sendFirst writes b by the deadline or the end of ctx.
func sendFirst(ctx context.Context, conn net.Conn, b []byte, deadline time.Time) error {
	return sendAny(ctx, conn, b, deadline)
}

// brief makes of a connection one that ends soon, if it can be.
func brief(c net.Conn) (net.Conn, error) { return c, nil }
