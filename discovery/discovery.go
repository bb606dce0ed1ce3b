// Package discovery has the sources of backends that come and go.
//
// A source is a guest module in the namespace layer4.tcp_lb.sources, with the
// inline key source. It knows nothing of pools, checks or connections: it tells
// what it has found, and tcp_lb has each address join or leave.
package discovery

import "context"

// Found is one backend that a source has found.
type Found struct {
	Address string // host:port; the host is a literal IP address
	Weight  int    // 0 = not said
	Backup  bool
}

// Source finds backends for as long as a config runs.
type Source interface {
	// Run looks for backends until ctx ends, and returns soon after. It calls
	// update with each complete answer: what is not in it leaves. A lookup that
	// fails, or finds nothing, is no answer: what was found before stays.
	Run(ctx context.Context, update func([]Found))
}
