package raw

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read and Write are read(2) and write(2).
func Read(fd int, b []byte) (int, error)  { return transfer(unix.SYS_READ, fd, b) }
func Write(fd int, b []byte) (int, error) { return transfer(unix.SYS_WRITE, fd, b) }

func transfer(trap uintptr, fd int, b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(trap, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Close is close(2). It is for sockets that don't linger.
func Close(fd int) error {
	_, _, errno := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	return errorOf(errno)
}

// Shutdown is shutdown(2).
func Shutdown(fd, how int) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), uintptr(how), 0)
	return errorOf(errno)
}

func errorOf(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

// SetInt is setsockopt(2).
func SetInt(fd, level, name, value int) error {
	v := int32(value)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
	return errorOf(errno)
}

// Connect is connect(2). An address that is none of IP takes the long way.
func Connect(fd int, to unix.Sockaddr) error {
	switch to := to.(type) {
	case *unix.SockaddrInet4:
		sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Port: swap(uint16(to.Port)), Addr: to.Addr}
		_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
		return errorOf(errno)
	case *unix.SockaddrInet6:
		sa := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: swap(uint16(to.Port)), Addr: to.Addr, Scope_id: to.ZoneId}
		_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
		return errorOf(errno)
	}
	return unix.Connect(fd, to)
}

// Accept is accept4(2) with SOCK_NONBLOCK and SOCK_CLOEXEC. The address is the zero
// AddrPort if it is none of IP, and has no zone: that is a number.
func Accept(listener int) (fd int, from netip.AddrPort, zone uint32, err error) {
	var sa unix.RawSockaddrInet6 // as long as any of IP
	size := uint32(unsafe.Sizeof(sa))
	n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&sa)),
		uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, 0, errno
	}
	from, zone = addrOf(&sa)
	return int(n), from, zone, nil
}

// LocalAddr is getsockname(2); see Accept for what it returns.
func LocalAddr(fd int) (local netip.AddrPort, zone uint32, err error) {
	var sa unix.RawSockaddrInet6
	size := uint32(unsafe.Sizeof(sa))
	_, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return netip.AddrPort{}, 0, errno
	}
	local, zone = addrOf(&sa)
	return local, zone, nil
}

func addrOf(sa *unix.RawSockaddrInet6) (netip.AddrPort, uint32) {
	switch sa.Family {
	case unix.AF_INET:
		sa4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(sa4.Addr), swap(sa4.Port)), 0
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), swap(sa.Port)), sa.Scope_id
	}
	return netip.AddrPort{}, 0
}

// swap makes a port of the network's order one of the machine's, and back.
func swap(port uint16) uint16 {
	b := *(*[2]byte)(unsafe.Pointer(&port))
	return uint16(b[0])<<8 | uint16(b[1])
}
