package relay

import "sync/atomic"

// Reason says why a connection ended.
type Reason uint8

const (
	None          Reason = iota // still open
	ClientClosed                // the client closed first
	BackendClosed               // the backend closed first
	ClientReset                 // the client reset the connection, or was lost
	BackendReset                // the backend reset the connection, or was lost
	IdleTimeout                 // no byte either way for the idle timeout
	LifetimeOver                // it has reached its lifetime
	ClientError                 // anything else at the client: no PROXY header, no TLS
	Error                       // anything else: a TLS error of the backend, a panic
	OwnReasons                  // those from here on mean what the caller of Cut says
)

// Orderly reports whether one side simply closed. Such a reason gives way to
// any other: a stream that is half-closed and then reset was reset.
func (r Reason) Orderly() bool { return r == ClientClosed || r == BackendClosed }

// verdict is why a relay has ended.
type verdict struct{ why atomic.Uint32 }

// Reason returns why the relay ended; None if it has not.
func (v *verdict) Reason() Reason { return Reason(v.why.Load()) }

// conclude records why the connection ends. The first reason stays, except
// that an orderly close gives way to anything else. It reports whether this one does.
func (v *verdict) conclude(why Reason) bool {
	for {
		old := v.Reason()
		if old != None && (!old.Orderly() || why.Orderly()) {
			return false
		}
		if v.why.CompareAndSwap(uint32(old), uint32(why)) {
			return true
		}
	}
}
