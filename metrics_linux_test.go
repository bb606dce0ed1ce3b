package tcplb

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// A spare pipe gives way to connections, so its files don't count as used.
func TestSparePipesAreNoOpenFiles(t *testing.T) {
	before := metric(t, "open_files", nil)
	p := pipes.get()
	require.NotNil(t, p)
	require.EqualValues(t, before+filesPerPipe, metric(t, "open_files", nil))
	pipes.put(p)
	require.EqualValues(t, before, metric(t, "open_files", nil))
}
