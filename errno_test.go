package tcplb

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
	"github.com/stretchr/testify/require"
)

// errnoCase is an error number of this system, and what it says.
type errnoCase struct {
	name     string
	errno    error
	kind     dialError // of a connect
	reset    bool      // of an open connection
	shortage bool
}

func TestErrno(t *testing.T) {
	for _, c := range errnoCases {
		t.Run(c.name, func(t *testing.T) {
			connect := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", c.errno)}
			read := fmt.Errorf("relaying: %w", &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", c.errno)})
			require.Equal(t, c.kind, classify(connect))
			require.Equal(t, c.kind, classify(errors.Join(errNoBackend, connect)))
			require.Equal(t, c.reset, relay.IsReset(read))
			require.Equal(t, c.shortage, isScarcity(connect))
		})
	}
	require.Equal(t, dialOther, classify(errNoBackend))
	require.False(t, relay.IsReset(nil))
	require.False(t, isScarcity(nil))
}
