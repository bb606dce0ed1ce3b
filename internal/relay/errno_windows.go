package relay

import (
	"syscall"

	"golang.org/x/sys/windows"
)

// resetErrnos: the peer reset an open connection, or was lost. The numbers of
// package syscall that are called as on Unix are of Go's own making; Winsock
// returns others, and neither Is the other.
var resetErrnos = []error{
	windows.WSAECONNRESET, windows.WSAECONNABORTED, windows.WSAENETRESET,
	windows.WSAETIMEDOUT, windows.WSAEHOSTUNREACH, windows.WSAENETUNREACH,
	syscall.ECONNRESET, syscall.EPIPE,
}
