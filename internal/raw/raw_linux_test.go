package raw

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Both ends of a connection are told the same addresses as by Go's sockets.
func TestConnectAndAccept(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			ln, err := net.Listen("tcp", address)
			if err != nil && address == "[::1]:0" {
				t.Skip("this host has no IPv6: ", err)
			}
			require.NoError(t, err)
			defer ln.Close()
			file, err := ln.(*net.TCPListener).File()
			require.NoError(t, err)
			defer file.Close()
			listening := int(file.Fd())
			require.NoError(t, unix.SetNonblock(listening, true))
			_, _, _, err = Accept(listening)
			require.Equal(t, unix.EAGAIN, err)

			to := ln.Addr().(*net.TCPAddr).AddrPort()
			family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port()), Addr: [4]byte{127, 0, 0, 1}})
			if to.Addr().Is6() {
				family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
			}
			client, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			require.NoError(t, Connect(client, sa))
			require.Equal(t, unix.EISCONN, Connect(client, sa))
			require.NoError(t, SetInt(client, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
			v, err := unix.GetsockoptInt(client, unix.IPPROTO_TCP, unix.TCP_NODELAY)
			require.NoError(t, err)
			require.NotZero(t, v)

			server, from, zone, err := Accept(listening)
			require.NoError(t, err)
			require.Zero(t, zone)
			local, zone, err := LocalAddr(client)
			require.NoError(t, err)
			require.Zero(t, zone)
			require.Equal(t, local, from)
			own, _, err := LocalAddr(server)
			require.NoError(t, err)
			require.Equal(t, to, own)

			buf := make([]byte, 8)
			_, err = Read(server, buf)
			require.Equal(t, unix.EAGAIN, err, "it doesn't block")
			n, err := Write(client, []byte("hello"))
			require.NoError(t, err)
			require.Equal(t, 5, n)
			require.NoError(t, Shutdown(client, unix.SHUT_WR))
			n, err = Read(server, buf)
			require.NoError(t, err)
			require.Equal(t, "hello", string(buf[:n]))
			n, err = Read(server, buf)
			require.NoError(t, err)
			require.Zero(t, n)
			for _, fd := range []int{client, server} {
				require.NoError(t, Close(fd))
				require.Equal(t, unix.EBADF, Close(fd))
				require.Equal(t, unix.EBADF, Shutdown(fd, unix.SHUT_RD))
				require.Equal(t, unix.EBADF, SetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
				_, _, err = LocalAddr(fd)
				require.Equal(t, unix.EBADF, err)
			}
		})
	}
}

// What is no address of IP is none, and can be connected to all the same.
func TestUnixSockets(t *testing.T) {
	path := t.TempDir() + "/s"
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer ln.Close()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, Connect(fd, &unix.SockaddrUnix{Name: path}))
	name, zone, err := LocalAddr(fd)
	require.NoError(t, err)
	require.Equal(t, netip.AddrPort{}, name)
	require.Zero(t, zone)
	require.ErrorIs(t, Connect(fd, &unix.SockaddrUnix{Name: path + "no"}), os.ErrNotExist)
}
