package tcplb

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPipesComeOutOfTheFileBudget(t *testing.T) {
	var held []*pipe
	for range sparePipes + 5 {
		p := pipes.get()
		require.NotNil(t, p)
		held = append(held, p)
	}
	before := files.used.Load()
	for _, p := range held {
		pipes.put(p)
	}
	require.EqualValues(t, sparePipes*filesPerPipe, spareFiles())
	require.EqualValues(t, before-5*filesPerPipe, files.used.Load(), "the others are closed")
}

func TestNoPipeWithoutFiles(t *testing.T) {
	freePipes()
	rest := files.limit - files.used.Load()
	require.True(t, files.acquire(rest))
	defer files.release(rest)
	require.Nil(t, pipes.get())

	// A bulk transfer goes on without.
	r := startRelay(t, 0, nil)
	const size = 8 << 20
	go func() { _, _ = r.client.Write(make([]byte, size)); _ = r.client.CloseWrite() }()
	n, err := readAllCount(r.backend)
	require.NoError(t, err)
	require.EqualValues(t, size, n)
}

// openFiles counts the sockets and pipes of this process, but for spare pipes.
func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	n := -int(spareFiles())
	for _, entry := range list {
		what, _ := os.Readlink("/proc/self/fd/" + entry.Name())
		if strings.HasPrefix(what, "socket:") || strings.HasPrefix(what, "pipe:") {
			n++
		}
	}
	return n
}
