// Package listener is how clients come in: listening sockets that configs share,
// and connections that have their files in the budget from the moment they are
// accepted.
//
// What it promises. A connection that waits in a socket's queue outlives the
// config that opened it, and a lack of files: accepting pauses, and goes on. No
// more are accepted than there are files for, a few of which serve to turn the
// rest away. One that is on its way to a handler has its time for that, and gives
// way to others after a grace where files are short. Whatever becomes of it, its
// files come back, once.
//
// It knows neither handlers nor backends: who listens says what becomes of the
// connections.
package listener

// Arrivals is what a listener has to know of its connections.
type Arrivals struct {
	Waiting *WaitingList // nil: not all of them lead to a handler
	Files   int64        // that each takes, if not all do
}
