package tcplb

import (
	"errors"
	"net"
)

// isAny reports whether err is, or wraps, one of the set.
func isAny(err error, set []error) bool {
	for _, e := range set {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// isScarcity reports whether a connect failed for want of something on this
// side, files, memory, places in epoll (ENOSPC) or local ports, which says
// nothing of the other side.
//
// Not among these are EAGAIN, by which a Unix socket's full queue is reported,
// and EPERM and EACCES, of a firewall, a policy or a route on this machine: by
// them the one backend can't be reached, for as long as they are in force.
func isScarcity(err error) bool {
	return isAny(err, shortageErrnos) || lacksPorts(err)
}

// lacksPorts reports whether all local ports to the destination are in use. The
// system has the same error for a destination that no local address can reach,
// as IPv6's where IPv6 is off. That holds for UDP, too, whose ports are others
// and whose connect sends nothing.
func lacksPorts(err error) bool {
	if !isAny(err, noAddressErrnos) {
		return false
	}
	var dial *net.OpError
	if !errors.As(err, &dial) {
		return true
	}
	to, ok := dial.Addr.(*net.TCPAddr)
	if !ok || dial.Source != nil { // the latter is there, or bind would have said so
		return true
	}
	c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: to.IP, Port: to.Port, Zone: to.Zone})
	if err == nil {
		_ = c.Close()
	}
	return !isAny(err, noAddressErrnos)
}
