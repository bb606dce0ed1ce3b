package command

import (
	"strings"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
	"github.com/stretchr/testify/require"
)

// However long what is shown is, addresses stay whole and free text ends the line.
func TestTableIsBounded(t *testing.T) {
	address := strings.Repeat("a", 50) + ".example:5432"
	var b strings.Builder
	rows := [][]string{{"web", address, "1", strings.Repeat("é", 300)}, {"é", "b:1", "22", "x\ny"}}
	require.NoError(t, writeTable(&b, []column{{title: "LB"}, {title: "BACKEND"}, {"OPEN", true}, {title: "LAST ERROR"}}, rows, true))
	lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	require.Len(t, lines, 3)
	for _, l := range lines {
		require.LessOrEqual(t, words.Width(l), maxWidth)
		require.Equal(t, strings.TrimRight(l, " "), l)
	}
	require.Contains(t, lines[1], address)
	require.True(t, strings.HasSuffix(lines[1], "é…"))
	require.True(t, strings.HasPrefix(lines[2], "é    b:1 "))
	require.True(t, strings.HasSuffix(lines[2], "    22  x\uFFFDy"), lines[2])
}
