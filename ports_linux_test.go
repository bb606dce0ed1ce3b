package tcplb

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const namespaceEnv = "TCPLB_TEST_NAMESPACE"

// inNamespace runs the test once more in a process with a network of its own,
// in which it is root. It reports whether this is that process.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv(namespaceEnv) != "" {
		return true
	}
	c := exec.Command(os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	c.Env = append(os.Environ(), namespaceEnv+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},

		GidMappingsEnableSetgroups: os.Getuid() == 0,
	}
	out, err := c.CombinedOutput()
	if c.Process == nil {
		t.Skip("needs user namespaces: ", err)
	}
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "--- PASS: "+t.Name())
	return false
}

func sysctl(t *testing.T, name, value string) {
	t.Helper()
	require.NoError(t, os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644))
}

// bringUp brings the loopback interface up.
func bringUp(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	require.NoError(t, err)
	lo.SetUint16(unix.IFF_UP)
	require.NoError(t, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo))
}

// The kernel has one error for two things: that all local ports are in use,
// and that there is no local address for the destination.
func TestLocalPortsRunOut(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	bringUp(t)
	sysctl(t, "ipv4/ip_local_port_range", "40000 40003")
	s := echoServer(t)
	dial := func(address string) (net.Conn, error) {
		to, err := parseTarget(address)
		require.NoError(t, err)
		return dialTarget(context.Background(), to, hangTimeout)
	}
	var err error
	for range 5 {
		var c net.Conn
		if c, err = dial(s.address); err != nil {
			break
		}
		defer c.Close()
	}
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	require.True(t, isScarcity(err))

	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return // and nobody can be told to turn it off
	}
	sysctl(t, "ipv6/conf/all/disable_ipv6", "1")
	_, port, _ := net.SplitHostPort(s.address)
	_, err = dial(fmt.Sprintf("[::1]:%s", port))
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	require.False(t, isScarcity(err), "that backend can't be reached for as long as it lasts")
}

// Connections from one local address take a port for each destination, as others
// do, and not for themselves alone.
func TestLocalPortsOfALocalAddress(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	bringUp(t)
	sysctl(t, "ipv4/ip_local_port_range", "40000 40003")
	for from, host := range map[string]string{"127.0.0.5": "127.0.0.1", "::1": "::1"} {
		var last error
		for _, port := range []string{"5001", "5002", "5003"} {
			ln, err := net.Listen("tcp", net.JoinHostPort(host, port))
			if err != nil && from == "::1" {
				break // no IPv6
			}
			require.NoError(t, err)
			defer ln.Close()
			to, err := parseTarget(ln.Addr().String())
			require.NoError(t, err)
			to.from = netip.MustParseAddr(from)
			opened := 0
			for last = nil; last == nil && opened < 5; {
				var c net.Conn
				if c, last = dialTarget(context.Background(), to, hangTimeout); last == nil {
					defer c.Close()
					opened++
				}
			}
			require.Equal(t, 4, opened, "each destination has all ports")
		}
		if last == nil {
			continue
		}
		require.ErrorIs(t, last, syscall.EADDRNOTAVAIL)
		require.NotErrorIs(t, last, errNotHere)
		require.True(t, isScarcity(last), "it says nothing of the backend")
	}
}
