package relay

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// benchEach runs the benchmark over bare sockets, for each kind that relays
// those. Client and backend are a part of what it measures.
func benchEach(b *testing.B, bench func(b *testing.B, k kind)) {
	for _, k := range kinds {
		if k.wrap == nil {
			b.Run(k.name, func(b *testing.B) { bench(b, k) })
		}
	}
}

// benchPair returns the far ends of a relay.
func benchPair(b *testing.B, k kind) (client, backend *net.TCPConn) {
	b.Helper()
	r := k.start(b, time.Hour)
	_ = r.client.SetDeadline(time.Time{})
	_ = r.backend.SetDeadline(time.Time{})
	return r.client, r.backend
}

// BenchmarkRelayRoundTrip is a message of 64 bytes through the relay and back.
func BenchmarkRelayRoundTrip(b *testing.B) {
	benchEach(b, func(b *testing.B, k kind) {
		client, backend := benchPair(b, k)
		go func() { _, _ = io.Copy(backend, struct{ io.Reader }{backend}) }()
		message := make([]byte, 64)
		b.ReportAllocs()
		for b.Loop() {
			_, err := client.Write(message)
			require.NoError(b, err)
			_, err = io.ReadFull(client, message)
			require.NoError(b, err)
		}
	})
}

// BenchmarkRelayBulk is a megabyte from backend to client.
func BenchmarkRelayBulk(b *testing.B) {
	benchEach(b, func(b *testing.B, k kind) {
		client, backend := benchPair(b, k)
		const size = 1 << 20
		zeros := make([]byte, size)
		go func() {
			for err := error(nil); err == nil; {
				_, err = backend.Write(zeros)
			}
		}()
		buf := make([]byte, size)
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			_, err := io.ReadFull(client, buf)
			require.NoError(b, err)
		}
		_ = client.Close()
	})
}

// BenchmarkRelayShort is a relay between two connections, from its making to its
// end, with a round trip of 64 bytes.
func BenchmarkRelayShort(b *testing.B) {
	benchEach(b, func(b *testing.B, k kind) {
		message := make([]byte, 64)
		b.ReportAllocs()
		for b.Loop() {
			var r relayed
			client, nearClient := tcpPair(b)
			backend, nearBackend := tcpPair(b)
			k.between(b, &r, nearClient, nearBackend, time.Hour)
			ended := make(chan struct{})
			r.relay.Start(func() {
				if r.pair != nil {
					_ = nearClient.Close()
					_ = nearBackend.Close()
				}
				close(ended)
			})
			for _, c := range [][2]*net.TCPConn{{client, backend}, {backend, client}} {
				_, err := c[0].Write(message)
				require.NoError(b, err)
				_, err = io.ReadFull(c[1], message)
				require.NoError(b, err)
			}
			_ = client.Close()
			_ = backend.Close()
			<-ended
		}
	})
}
