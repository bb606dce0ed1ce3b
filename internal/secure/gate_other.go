//go:build !linux

package secure

// canWait says that reads wait with a buffer in hand here.
const canWait = false

func (*gate) await() error { panic("unreachable") }

func (*gate) fillFrom(uintptr) bool { panic("unreachable") }
