//go:build !linux

// Command bench compares balancers; it needs Linux.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench: needs Linux, whose /proc tells what a process costs")
	os.Exit(1)
}
