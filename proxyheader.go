package tcplb

import (
	"net"
	"net/netip"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/pires/go-proxyproto"
)

// proxyOff is the version that says that there is no header.
const proxyOff checks.ProxyVersion = "off"

// proxyHeader returns the header that tells of a client's connection. Where one end
// has no IP address, as a Unix socket, it says only that the connection is real.
//
// Addresses of two families, which come from a header that was taken, are both
// IPv6 ones. A zone is left out: there is no room for it, and it holds on one host.
func proxyHeader(v checks.ProxyVersion, who parties) ([]byte, error) {
	version := byte(2)
	if v == "v1" {
		version = 1
	}
	return proxyproto.HeaderProxyFromAddrs(version, plainTCP(who.client), plainTCP(who.local)).Format()
}

// plainTCP returns the address without its zone; nil for what has no IP address.
func plainTCP(a net.Addr) net.Addr {
	ap := addrPortOf(a)
	if !ap.IsValid() {
		return nil
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()))
}
