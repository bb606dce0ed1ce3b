package socket

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/raw"
	"golang.org/x/sys/unix"
)

// Connect opens a TCP connection, of which Go's poller gets to know nothing.
// Errors are as net.Dialer has them. The local end is not bound before: a port
// taken by bind serves one connection only, one taken by connect serves one to
// each destination.
func Connect(to netip.AddrPort, deadline time.Time, await Await) (*Conn, error) {
	return ConnectFrom(netip.Addr{}, to, deadline, await)
}

// ConnectFrom does the same from an address of this host; that which is not valid
// is any. The port is chosen by connect.
func ConnectFrom(from netip.Addr, to netip.AddrPort, deadline time.Time, await Await) (*Conn, error) {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	remote := net.TCPAddrFromAddrPort(to)
	family, sa := sockaddrOf(to)
	var (
		source net.Addr
		local  unix.Sockaddr
	)
	if from.IsValid() {
		at := netip.AddrPortFrom(from.Unmap(), 0)
		source = net.TCPAddrFromAddrPort(at)
		_, local = sockaddrOf(at)
	}
	for try := 1; ; try++ {
		fd, err := open(family, local, sa, deadline, await)
		if err == nil {
			c := &Conn{network: "tcp", remote: remote, fd: fd}
			if err = c.meet(to); err == nil {
				return c, nil
			}
			_ = raw.Close(fd)
		}
		if try == connects || err != errConnectedToItself && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Source: source, Addr: remote, Err: err}
		}
	}
}

// connects is how often Connect tries, as net.Dialer does: a socket may happen to
// be connected to itself, and EADDRNOTAVAIL may be said where a port was free.
const connects = 3

// errConnectedToItself is of a socket whose port the kernel chose to be the one
// to which it connected: nobody else is there.
var errConnectedToItself = os.NewSyscallError("connect", unix.ECONNREFUSED)

// meet finds out the addresses of a connection that is established.
func (c *Conn) meet(to netip.AddrPort) error {
	name, zone, err := raw.LocalAddr(c.fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	local, remote := tcpAddr(name, zone), c.remote.(*net.TCPAddr)
	if to.Addr().IsUnspecified() { // which is this host's loopback address
		if sa, err := unix.Getpeername(c.fd); err == nil {
			remote = addrOf(sa).(*net.TCPAddr)
		}
	}
	if local.Port == remote.Port && local.IP.Equal(remote.IP) {
		return errConnectedToItself
	}
	c.local, c.remote = local, remote
	return nil
}

// ConnectUnix does the same to a Unix socket. A path with a leading @ is an
// abstract name.
func ConnectUnix(path string, deadline time.Time, await Await) (*Conn, error) {
	remote := &net.UnixAddr{Name: path, Net: "unix"}
	fd, err := open(unix.AF_UNIX, nil, &unix.SockaddrUnix{Name: path}, deadline, await)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: remote, Err: err}
	}
	return &Conn{network: "unix", remote: remote, local: &net.UnixAddr{Net: "unix"}, fd: fd}, nil
}

func sockaddrOf(to netip.AddrPort) (family int, sa unix.Sockaddr) {
	if to.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16(), ZoneId: zones.id(to.Addr().Zone())}
}

// open makes a socket and connects it, from an address where one is given.
func open(family int, from, to unix.Sockaddr, deadline time.Time, await Await) (fd int, err error) {
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if family != unix.AF_UNIX {
		_ = raw.SetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if from != nil {
		// Without the option bind takes a port, of which each serves one connection only.
		_ = raw.SetInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		if err := unix.Bind(fd, from); err != nil {
			_ = raw.Close(fd)
			return -1, os.NewSyscallError("bind", err)
		}
	}
	switch err = raw.Connect(fd, to); err {
	case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
		err = established(fd, to, deadline, await)
	case unix.EISCONN:
		err = nil
	default:
		err = os.NewSyscallError("connect", err)
	}
	if err != nil {
		_ = raw.Close(fd)
		return -1, err
	}
	return fd, nil
}

// established waits for the end of a connect. On loopback it has come already. To
// call connect again says how it ended, and changes nothing before.
func established(fd int, to unix.Sockaddr, deadline time.Time, await Await) error {
	for {
		switch err := raw.Connect(fd, to); err {
		case nil, unix.EISCONN:
			return nil
		case unix.EALREADY, unix.EINPROGRESS:
			if err := await(fd, deadline); err != nil {
				return err
			}
		case unix.EINTR:
		default:
			return os.NewSyscallError("connect", err)
		}
	}
}
