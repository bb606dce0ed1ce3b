//go:build !unix

package files

// OpenLimit returns 0: this system sets no limit of its own.
func OpenLimit() uint64 { return 0 }
