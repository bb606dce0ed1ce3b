package relay

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Urgent data is TCP's way to interrupt: telnet's, FTP's, Oracle's. What comes
// behind the mark arrives like all else, in small messages and in bulk.
func TestRelayUrgentData(t *testing.T) {
	eachKind(t, func(t *testing.T, k kind) {
		for _, before := range []int{3, 4 << 20} {
			r := k.start(t, 0)
			want := make([]byte, before)
			fill(want)
			want = append(want, "behind the mark"...)
			// The receiver begins late, so that the mark comes into the midst of it.
			sent := make(chan error, 1)
			go func() { sent <- sendUrgent(r.client, want[:before], want[before:]) }()
			time.Sleep(10 * time.Millisecond)
			got := make([]byte, len(want))
			_, err := io.ReadFull(r.backend, got)
			require.NoError(t, err, "%d bytes before", before)
			require.NoError(t, <-sent)
			require.True(t, string(want) == string(got))
			require.NoError(t, r.client.CloseWrite())
			expectEOF(t, r.backend)
			require.NoError(t, r.backend.Close())
			r.reason(t)
		}
	})
}

// sendUrgent sends an urgent byte between the two, which the stream is without.
func sendUrgent(c *net.TCPConn, before, behind []byte) error {
	if _, err := c.Write(before); err != nil {
		return err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	werr := raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil)
		return err != unix.EAGAIN
	})
	if err == nil {
		err = werr
	}
	if err == nil {
		_, err = c.Write(behind)
	}
	return err
}
