package relay

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// relayPair returns the far ends of a relay, for a benchmark.
func relayPair(b *testing.B) (client, backend *net.TCPConn) {
	b.Helper()
	r := startRelay(b, 0, nil)
	_ = r.client.SetDeadline(time.Time{})
	_ = r.backend.SetDeadline(time.Time{})
	return r.client, r.backend
}

// BenchmarkRelayRoundTrip is a message of 64 bytes through the relay and back,
// client and backend included.
func BenchmarkRelayRoundTrip(b *testing.B) {
	client, backend := relayPair(b)
	go func() { _, _ = io.Copy(backend, struct{ io.Reader }{backend}) }()
	message := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		_, err := client.Write(message)
		require.NoError(b, err)
		_, err = io.ReadFull(client, message)
		require.NoError(b, err)
	}
}

// BenchmarkRelayBulk is a megabyte from backend to client.
func BenchmarkRelayBulk(b *testing.B) {
	client, backend := relayPair(b)
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
}
