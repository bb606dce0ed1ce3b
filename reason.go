package tcplb

import "github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"

// reason says why a connection ended. Its names are the values of the metrics'
// label "reason" and of the access log's field of that name.
type reason relay.Reason

// Those that a relay finds.
const (
	reasonNone          = reason(relay.None)
	reasonClientClosed  = reason(relay.ClientClosed)
	reasonBackendClosed = reason(relay.BackendClosed)
	reasonClientReset   = reason(relay.ClientReset)
	reasonBackendReset  = reason(relay.BackendReset)
	reasonIdleTimeout   = reason(relay.IdleTimeout)
	reasonClientError   = reason(relay.ClientError)
	reasonError         = reason(relay.Error)
	reasonMaxLifetime   = reason(relay.LifetimeOver)
)

const (
	reasonDrainTimeout       = reason(relay.OwnReasons) + iota // cut at the end of drain_timeout
	reasonNoBackend                                            // no backend could be reached
	reasonMaxConnections                                       // over the connection limit
	reasonBackendClosedEarly                                   // the backend closed first, at once and before it had sent a byte
	reasonKilled                                               // cut by hand
	reasonBackendDown                                          // cut as the checks found the backend down

	reasonMaxConnectionsPerClient // over the limit of one client
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
	reasonClientError:    "client_error",
	reasonError:          "error",

	reasonBackendClosedEarly: "backend_closed_early",
	reasonKilled:             "killed",
	reasonBackendDown:        "backend_down",

	reasonMaxLifetime:             "max_lifetime",
	reasonMaxConnectionsPerClient: "max_connections_per_client",
}

func (r reason) String() string { return reasonNames[r] }

// failure reports whether the connection failed, for which the network, a
// client or an operator's cut is not to blame.
func (r reason) failure() bool {
	switch r {
	case reasonNoBackend, reasonMaxConnections, reasonBackendReset, reasonBackendClosedEarly, reasonBackendDown, reasonError:
		return true
	}
	return false
}
