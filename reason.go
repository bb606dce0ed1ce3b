package tcplb

// reason says why a connection ended. Its names are the values of the metrics'
// label "reason" and of the access log's field of that name.
type reason uint32

const (
	reasonNone               reason = iota // still open
	reasonClientClosed                     // the client closed first
	reasonBackendClosed                    // the backend closed first
	reasonClientReset                      // the client reset the connection, or was lost
	reasonBackendReset                     // the backend reset the connection, or was lost
	reasonIdleTimeout                      // no byte either way for idle_timeout
	reasonDrainTimeout                     // cut at the end of drain_timeout
	reasonNoBackend                        // no backend could be reached
	reasonMaxConnections                   // over the connection limit
	reasonError                            // anything else: a TLS error, a panic
	reasonBackendClosedEarly               // the backend closed first, at once and before it had sent a byte
	numReasons
)

var reasonNames = [numReasons]string{
	reasonClientClosed:   "client_closed",
	reasonBackendClosed:  "backend_closed",
	reasonClientReset:    "client_reset",
	reasonBackendReset:   "backend_reset",
	reasonIdleTimeout:    "idle_timeout",
	reasonDrainTimeout:   "drain_timeout",
	reasonNoBackend:      "no_backend",
	reasonMaxConnections: "max_connections",
	reasonError:          "error",

	reasonBackendClosedEarly: "backend_closed_early",
}

func (r reason) String() string { return reasonNames[r] }

// orderly reports whether one side simply closed. Such a reason gives way to
// any other: a stream that is half-closed and then reset was reset.
func (r reason) orderly() bool {
	return r == reasonClientClosed || r == reasonBackendClosed
}

// failure reports whether the connection failed, for which the network, a
// client or an operator's cut is not to blame.
func (r reason) failure() bool {
	switch r {
	case reasonNoBackend, reasonMaxConnections, reasonBackendReset, reasonBackendClosedEarly, reasonError:
		return true
	}
	return false
}
