package tcplb

import (
	"net"
	"net/netip"
)

// compactAddr is a net.TCPAddr in less memory, without a v4 address in v6 clothes.
type compactAddr netip.AddrPort

func (a compactAddr) Network() string { return "tcp" }
func (a compactAddr) String() string  { return netip.AddrPort(a).String() }

// compact returns the same address.
func compact(a net.Addr) net.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return a
	}
	ap := tcp.AddrPort()
	if !ap.IsValid() { // a wrapper may give anything
		return a
	}
	return compactAddr(netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
}
