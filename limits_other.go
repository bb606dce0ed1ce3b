//go:build !unix

package tcplb

// openFileLimit returns 0: this system sets no limit of its own.
func openFileLimit() uint64 { return 0 }
