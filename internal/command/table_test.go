package command

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// However long what is shown is, addresses and free text stay whole, and that ends
// the line.
func TestTableCutsNothing(t *testing.T) {
	address := strings.Repeat("a", 50) + ".example:5432"
	long := strings.Repeat("é", 300)
	var b strings.Builder
	rows := [][]string{{"web", address, "1", long}, {"é", "b:1", "22", "x\ny"}}
	require.NoError(t, writeTable(&b, []column{{title: "LB"}, {title: "BACKEND"}, {"OPEN", true}, {title: "LAST ERROR"}}, rows))
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	require.Len(t, lines, 3)
	for _, l := range lines {
		require.Equal(t, strings.TrimRight(l, " "), l)
	}
	require.Contains(t, lines[1], address)
	require.True(t, strings.HasSuffix(lines[1], "  "+long))
	require.True(t, strings.HasPrefix(lines[2], "é    b:1 "))
	require.True(t, strings.HasSuffix(lines[2], "    22  x\uFFFDy"), lines[2])
}
