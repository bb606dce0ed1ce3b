package literal

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCheck(t *testing.T) {
	for _, host := range []string{
		"", ".", "db", "db.internal", "db.internal.", "10.0.0.1", "::1", "fe80::1%eth0", "10.0.0.1.nip.io", "web-1", "web1", "1a", "10.0.0.1x",
		"0xg", "x0", "1.2.3.web2", "a.0b1",
	} {
		require.NoError(t, Check(host), host)
	}
	for _, host := range []string{
		"10.0.5.300", "256.1.1.1", "1.2.3.4.5", "10.0.0", "10", "010.0.0.1", "10.0.0.01", "10..0.1", ".1", "web.1", "0x7f000001", "0x7F.1", "127.0.0.0x1", "0x", "1.2.3.4.5.",
	} {
		require.ErrorIs(t, Check(host), errNoAddress, host)
	}
	require.EqualError(t, Check("10.0.0.1."), "an IP address has no dot at its end: did you mean 10.0.0.1?")
}
