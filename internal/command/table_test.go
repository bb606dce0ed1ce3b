package command

import (
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestForPeople(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 9949: "9.9 kB", 9950: "10 kB", 999_499: "999 kB", 999_500: "1.0 MB",
		34_000_000: "34 MB", 5_600_000_000: "5.6 GB", math.MaxUint64: "18 EB",
	} {
		require.Equal(t, want, size(n))
	}
	for n, want := range map[uint64]string{0: "0", 999_999: "999999", 1_000_000: "1.0M", 123_456_789: "123M", 5_600_000_000: "5.6G"} {
		require.Equal(t, want, count(n))
	}
	for seconds, want := range map[float64]string{
		-1: "0.0s", 0: "0.0s", 0.05: "0.0s", 9.99: "9.9s", 10: "10s", 59.9: "59s", 60: "1m00s", 3599: "59m59s", 3600: "1h00m", 86399: "23h59m", 86400: "1d00h", 9e6: "104d04h",
	} {
		require.Equal(t, want, span(seconds))
	}
}

// However long what is shown is, addresses stay whole and free text ends the line.
func TestTableIsBounded(t *testing.T) {
	address := strings.Repeat("a", 50) + ".example:5432"
	var b strings.Builder
	rows := [][]string{{"web", address, "1", strings.Repeat("é", 300)}, {"é", "b:1", "22", "x\ny"}}
	require.NoError(t, writeTable(&b, []column{{title: "LB"}, {title: "BACKEND"}, {"OPEN", true}, {title: "LAST ERROR"}}, rows, true))
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	require.Len(t, lines, 3)
	for _, l := range lines {
		require.LessOrEqual(t, width(l), maxWidth)
		require.Equal(t, strings.TrimRight(l, " "), l)
	}
	require.Contains(t, lines[1], address)
	require.True(t, strings.HasSuffix(lines[1], "é…"))
	require.True(t, strings.HasPrefix(lines[2], "é    b:1 "))
	require.True(t, strings.HasSuffix(lines[2], "    22  x\uFFFDy"), lines[2])
}
