//go:build !windows

package relay

import "syscall"

// resetErrnos: the peer reset an open connection, or was lost.
var resetErrnos = []error{
	syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED,
	syscall.ETIMEDOUT, syscall.EHOSTUNREACH, syscall.ENETUNREACH,
}
