// Package loop waits for many sockets without a goroutine each. It is Linux's
// only: elsewhere Acquire and Await fail with ErrUnavailable.
//
// There is a loop for every two processors, up to eight loops. Each calls its handlers one at a
// time, so that what belongs to one loop needs no lock; in return no handler may
// block, or work for long: it asks for another turn instead. A loop begins with
// its first user and ends, with its files, when it has had none for a moment.
//
// A handler never hears of a socket that is not its own any more: what the kernel
// reported of a descriptor whose number was reused since is dropped. A handler's
// panic is its own affair, and no other's.
package loop

import "errors"

// ErrUnavailable says that this system has no loops.
var ErrUnavailable = errors.New("event loops are available on Linux only")

// Handler is what a loop calls, one call at a time, never two at once.
type Handler interface {
	// Ready tells what has changed at the socket that was added with the tag,
	// in epoll's bits.
	Ready(tag uint32, events uint32)
	// Turn follows a call of Again.
	Turn()
	// Expired follows when the time of SetTimer has come.
	Expired()
	// Posted passes on what another goroutine has posted.
	Posted(what uint32)
	// Panicked follows a panic of one of the others.
	Panicked(value any, stack []byte)
}
