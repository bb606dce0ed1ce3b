//go:build unix

package files

import "golang.org/x/sys/unix"

// OpenLimit returns how many files the process may have open, 0 if it
// can't be told. Go raises the soft limit to the hard one at start.
func OpenLimit() uint64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0
	}
	return uint64(r.Cur)
}
