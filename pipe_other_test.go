//go:build !linux

package tcplb

func countSparePipes() int { return 0 }
