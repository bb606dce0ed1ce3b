package tcplb

import "golang.org/x/sys/windows"

// What Winsock returns.
var errnoCases = []errnoCase{
	{"refused", windows.WSAECONNREFUSED, dialRefused, false, false},
	{"timed out", windows.WSAETIMEDOUT, dialTimeout, true, false},
	{"reset", windows.WSAECONNRESET, dialOther, true, false},
	{"aborted", windows.WSAECONNABORTED, dialOther, true, false},
	{"network reset", windows.WSAENETRESET, dialOther, true, false},
	{"host unreachable", windows.WSAEHOSTUNREACH, dialOther, true, false},
	{"network unreachable", windows.WSAENETUNREACH, dialOther, true, false},
	{"no socket to spare", windows.WSAEMFILE, dialOther, false, true},
	{"no buffer to spare", windows.WSAENOBUFS, dialOther, false, true},
	{"no access", windows.WSAEACCES, dialOther, false, false},
}
