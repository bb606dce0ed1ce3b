// Package raw has system calls on sockets that don't block. Go's scheduler is not
// told of them, which would take each for one that may last: on a busy machine it
// gives the processor away after 20 µs, wakes another thread for it, and has to
// give it back; that costs more than most of these calls. It is Linux's only.
package raw
