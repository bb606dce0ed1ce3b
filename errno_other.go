//go:build !windows

package tcplb

import "syscall"

// What the system's error numbers say.
var (
	// refusedErrnos: the host answered that nobody listens.
	refusedErrnos = []error{syscall.ECONNREFUSED}
	// timeoutErrnos: no answer in the time that the kernel allows.
	timeoutErrnos = []error{syscall.ETIMEDOUT}
	// shortageErrnos: of files, memory or places in epoll (ENOSPC), on this side.
	shortageErrnos = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ENOSPC}
	// noAddressErrnos: no local port is left for a connect, or no local address
	// of the family is there.
	noAddressErrnos = []error{syscall.EADDRNOTAVAIL}
)
