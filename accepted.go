package tcplb

import (
	"net"
	"sync/atomic"
)

// acceptedConn is a client's connection from a listener of this package. It
// has its files in the budget from the moment it is accepted until it is
// closed, also where it never gets as far as the handler.
type acceptedConn struct {
	*net.TCPConn
	holds atomic.Int32
	taken atomic.Bool
}

// What an acceptedConn holds of the file budget.
const (
	holdsNothing  = iota
	holdsOverflow // its own file; it will be refused unless there is room by then
	holdsPair     // its own and the backend's
)

// claim takes a pair of files or, over the limit, one of those for connections
// to be refused. It reports false where there is neither.
func (c *acceptedConn) claim() bool {
	switch {
	case files.acquirePair():
		c.holds.Store(holdsPair)
	case files.acquireOverflow():
		c.holds.Store(holdsOverflow)
	default:
		return false
	}
	return true
}

// admit reports whether the connection has its pair of files, or gets it now.
func (c *acceptedConn) admit() bool {
	if c.holds.Load() == holdsPair {
		return true
	}
	if !files.acquirePair() {
		return false
	}
	c.giveBack(holdsPair)
	return true
}

// takeOver leaves it to the session to end the connection. Until the handler
// returns, caddy-l4 holds a goroutine with a grown stack, a buffer, two maps and
// more, nearly as much as all else that a connection takes. So the handler
// returns at once, and the Close that caddy-l4 then calls does nothing.
func (c *acceptedConn) takeOver() { c.taken.Store(true) }

// Close closes the connection, unless it was taken over.
func (c *acceptedConn) Close() error {
	if c.taken.Load() {
		return nil
	}
	return c.end()
}

// end closes the connection. The one to the backend must be closed by then.
func (c *acceptedConn) end() error {
	err := c.TCPConn.Close()
	c.giveBack(holdsNothing)
	return err
}

// giveBack exchanges what c holds.
func (c *acceptedConn) giveBack(next int32) {
	switch c.holds.Swap(next) {
	case holdsPair:
		files.releasePair()
	case holdsOverflow:
		files.releaseOverflow()
	}
}

// acceptedFrom returns the acceptedConn that conn is, or that is somewhere
// inside; nil if there is none.
func acceptedFrom(conn net.Conn) *acceptedConn {
	for conn != nil {
		if c, ok := conn.(*acceptedConn); ok {
			return c
		}
		conn = unwrap(conn)
	}
	return nil
}
