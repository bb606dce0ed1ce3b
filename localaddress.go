package tcplb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// localOff is the local address that is any.
const localOff = "off"

// errNotHere is of a local address that a connect can't be from. Unlike a lack of
// ports it lasts, and the backends can't be reached meanwhile: for the checks, too,
// they are down.
var errNotHere = errors.New("this machine does not have that address")

// connectFrom is connectTCP, with errors that tell of the local address.
func connectFrom(ctx context.Context, from netip.Addr, to netip.AddrPort, deadline time.Time) (net.Conn, error) {
	if from.IsValid() && from.Is4() != to.Addr().Is4() {
		return nil, fmt.Errorf("dial tcp %s: %w", to, unlike(from, to.Addr()))
	}
	conn, err := connectTCP(ctx, from, to, deadline)
	var call *os.SyscallError
	if err == nil || !errors.As(err, &call) || call.Syscall != "bind" {
		return conn, err
	}
	if isAny(err, noAddressErrnos) {
		err = errNotHere
	}
	return nil, fmt.Errorf("local_address %s: %w", from, err)
}

// unlike says that the addresses are not of one family.
func unlike(from, to netip.Addr) error {
	return fmt.Errorf("local_address %s is an %s address, and this an %s one", from, family(from), family(to))
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// ofFamily returns those of the addresses that are of the family.
func ofFamily(addrs []netip.Addr, of netip.Addr) (list []netip.Addr) {
	for _, a := range addrs {
		if a.Is4() == of.Is4() {
			list = append(list, a)
		}
	}
	return list
}

// checkLocalAddress refuses what nothing can be sent from. A placeholder is known
// only when it is loaded.
func checkLocalAddress(text string) error {
	if text == localOff || hasPlaceholder(text) {
		return nil
	}
	a, err := netip.ParseAddr(text)
	if _, portErr := netip.ParseAddrPort(text); portErr == nil {
		return fmt.Errorf("%s: want an IP address without a port, which the system chooses", text)
	}
	switch a = a.Unmap(); {
	case err != nil, checkText(text) != nil:
		return fmt.Errorf("%s: want an IP address of this machine, such as 10.0.0.9, or off", text)
	case a.IsUnspecified():
		return fmt.Errorf("%s: leave it out for any address of this machine", text)
	case a.IsLinkLocalUnicast() && a.Is6() && a.Zone() == "":
		return fmt.Errorf("%s: want its interface, too, such as %s%%eth0", text, text)
	case a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return fmt.Errorf("%s: no connection is from that: want an IP address of this machine", text)
	}
	return nil
}

// localAddress is the address in a checked config; not valid = any.
func localAddress(text string) netip.Addr {
	a, _ := netip.ParseAddr(text)
	return a.Unmap()
}
