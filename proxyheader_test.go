package tcplb

import (
	"bufio"
	"bytes"
	"net"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/pires/go-proxyproto"
	"github.com/stretchr/testify/require"
)

func tcpAddr(ip string, port int) *net.TCPAddr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: port} }

// textAddr is an address of a type that nobody knows.
type textAddr string

func (a textAddr) Network() string { return "tcp" }
func (a textAddr) String() string  { return string(a) }

func TestProxyHeader(t *testing.T) {
	mapped := &net.TCPAddr{IP: net.ParseIP("10.0.0.7").To16(), Port: 4000}
	zoned := &net.TCPAddr{IP: net.ParseIP("fe80::7"), Port: 4000, Zone: "eth0"}
	socket := &net.UnixAddr{Name: "@", Net: "unix"}
	for _, c := range []struct {
		name          string
		client, local net.Addr
		v1            string
		source        string // of v2; empty = none
		transport     proxyproto.AddressFamilyAndProtocol
	}{
		{"IPv4", tcpAddr("10.0.0.7", 4000), tcpAddr("10.0.0.1", 80), "PROXY TCP4 10.0.0.7 10.0.0.1 4000 80\r\n", "10.0.0.7:4000", proxyproto.TCPv4},
		{"IPv4 in 16 bytes", mapped, tcpAddr("10.0.0.1", 80), "PROXY TCP4 10.0.0.7 10.0.0.1 4000 80\r\n", "10.0.0.7:4000", proxyproto.TCPv4},
		{"IPv6", tcpAddr("fd00::7", 4000), tcpAddr("fd00::1", 80), "PROXY TCP6 fd00::7 fd00::1 4000 80\r\n", "[fd00::7]:4000", proxyproto.TCPv6},
		{"a zone", zoned, tcpAddr("fe80::1", 80), "PROXY TCP6 fe80::7 fe80::1 4000 80\r\n", "[fe80::7]:4000", proxyproto.TCPv6},
		{"two families", tcpAddr("fd00::7", 4000), tcpAddr("10.0.0.1", 80), "PROXY TCP6 fd00::7 ::ffff:10.0.0.1 4000 80\r\n", "[fd00::7]:4000", proxyproto.TCPv6},
		{"the other two", tcpAddr("10.0.0.7", 4000), tcpAddr("fd00::1", 80), "PROXY TCP6 ::ffff:10.0.0.7 fd00::1 4000 80\r\n", "10.0.0.7:4000", proxyproto.TCPv6},
		{"of some wrapper", textAddr("[::ffff:10.0.0.7]:4000"), textAddr("10.0.0.1:80"), "PROXY TCP4 10.0.0.7 10.0.0.1 4000 80\r\n", "10.0.0.7:4000", proxyproto.TCPv4},
		{"a Unix socket", socket, socket, "PROXY UNKNOWN\r\n", "", proxyproto.UNSPEC},
		{"a header of one of a Unix socket's clients", tcpAddr("10.0.0.7", 4000), socket, "PROXY UNKNOWN\r\n", "", proxyproto.UNSPEC},
		{"no address", nil, nil, "PROXY UNKNOWN\r\n", "", proxyproto.UNSPEC},
		{"an empty one", &net.TCPAddr{}, &net.TCPAddr{}, "PROXY UNKNOWN\r\n", "", proxyproto.UNSPEC},
	} {
		t.Run(c.name, func(t *testing.T) {
			header, err := proxyHeader("v1", parties{c.client, c.local})
			require.NoError(t, err)
			require.Equal(t, c.v1, string(header))

			header, err = proxyHeader("v2", parties{c.client, c.local})
			require.NoError(t, err)
			got, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(header)))
			require.NoError(t, err)
			require.Equal(t, c.transport, got.TransportProtocol)
			if c.source == "" {
				require.True(t, got.Command.IsLocal())
				return
			}
			require.True(t, got.Command.IsProxy())
			require.Equal(t, c.source, got.SourceAddr.String())
			require.Equal(t, 80, got.DestinationAddr.(*net.TCPAddr).Port)
		})
	}
}

// Its cost is next to nothing beside a connect's.
func BenchmarkProxyHeader(b *testing.B) {
	who := parties{tcpAddr("10.0.0.7", 4000), tcpAddr("10.0.0.1", 80)}
	for _, v := range []checks.ProxyVersion{"v1", "v2"} {
		b.Run(string(v), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := proxyHeader(v, who); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
