package tcplb

import (
	"syscall"

	"golang.org/x/sys/windows"
)

// What the system's error numbers say, as in errno_other.go. Those of package
// syscall that are called as on Unix are made up for source compatibility:
// Winsock returns its own, and neither Is the other.
var (
	refusedErrnos  = []error{windows.WSAECONNREFUSED, syscall.ECONNREFUSED}
	timeoutErrnos  = []error{windows.WSAETIMEDOUT, syscall.ETIMEDOUT}
	shortageErrnos = []error{
		windows.WSAEMFILE, windows.WSAENOBUFS,
		windows.ERROR_TOO_MANY_OPEN_FILES, windows.ERROR_NOT_ENOUGH_MEMORY, windows.ERROR_NO_SYSTEM_RESOURCES,
	}
	noAddressErrnos = []error{windows.WSAEADDRNOTAVAIL}
)
