//go:build !windows

package tcplb

import "syscall"

var errnoCases = []errnoCase{
	{"refused", syscall.ECONNREFUSED, dialRefused, false, false},
	{"timed out", syscall.ETIMEDOUT, dialTimeout, true, false},
	{"reset", syscall.ECONNRESET, dialOther, true, false},
	{"aborted", syscall.ECONNABORTED, dialOther, true, false},
	{"written to after a reset", syscall.EPIPE, dialOther, true, false},
	{"host unreachable", syscall.EHOSTUNREACH, dialOther, true, false},
	{"network unreachable", syscall.ENETUNREACH, dialOther, true, false},
	{"no file to spare", syscall.EMFILE, dialOther, false, true},
	{"none in the whole system", syscall.ENFILE, dialOther, false, true},
	{"no buffer to spare", syscall.ENOBUFS, dialOther, false, true},
	{"no memory", syscall.ENOMEM, dialOther, false, true},
	{"no access", syscall.EACCES, dialOther, false, false},
}
