//go:build !linux

package loop

import "time"

// Available says whether this system has loops.
const Available = false

// Await fails here.
func Await(int, int16, time.Time, <-chan struct{}) error { return ErrUnavailable }

// Limit does nothing here.
func Limit(int) {}
