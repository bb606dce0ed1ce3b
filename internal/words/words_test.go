package words

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestForPeople(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 9949: "9.9 kB", 9950: "10 kB", 999_499: "999 kB", 999_500: "1.0 MB",
		34_000_000: "34 MB", 5_600_000_000: "5.6 GB", math.MaxUint64: "18 EB",
	} {
		require.Equal(t, want, Size(n))
	}
	for n, want := range map[uint64]string{0: "0", 999_999: "999999", 1_000_000: "1.0M", 123_456_789: "123M", 5_600_000_000: "5.6G"} {
		require.Equal(t, want, Count(n))
	}
	for seconds, want := range map[float64]string{
		-1: "0.0s", 0: "0.0s", 0.05: "0.0s", 9.99: "9.9s", 10: "10s", 59.9: "59s", 60: "1m00s", 3599: "59m59s", 3600: "1h00m", 86399: "23h59m", 86400: "1d00h", 9e6: "104d04h",
	} {
		require.Equal(t, want, Span(seconds))
	}
}

func TestPlainText(t *testing.T) {
	require.Equal(t, "web\uFFFD1 é", Printable("web\x1b1 é"))
	require.Equal(t, "a\uFFFDb", Printable("a\u202Eb"), "what would turn the text around")
	require.Equal(t, "TLS handshake: certificate has expired", Brief("TLS handshake: tls: failed to verify certificate: x509: certificate has expired"))
	require.Equal(t, "refused", Brief("refused"))
	require.Equal(t, "é…", Shorten("éab", 2))
	require.Equal(t, "éa", Shorten("éa", 2))
	require.Equal(t, "1 client", Plural(1, "client", "clients"))
	require.Equal(t, "0 clients", Plural(0, "client", "clients"))
}
