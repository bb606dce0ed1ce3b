//go:build linux

package main

import (
	"flag"
	"fmt"
	"sync/atomic"
	"time"
)

// connectTimeout is what the balancers give a connect to a backend, but for
// caddy-l4's proxy, which has no limit to set.
var connectTimeout = flag.Duration("connect", 3*time.Second, "time for a connect to a backend")

// storm has so many clients come at once, and says how many were served, and when.
func (b balancer) storm(servers *backends, n int) error {
	p, err := b.start()
	if err != nil {
		return err
	}
	defer p.stop()
	var failed atomic.Int64
	short(b.echo, clients, &failed) // what is needed once is not measured
	time.Sleep(settle)
	all, _, _, err := processors()
	if err != nil {
		return err
	}
	a, _, _, err := p.load(servers, all, b.echo, 0, n, time.Millisecond)
	if err != nil {
		return err
	}
	fmt.Printf("%s: of %d clients %d failed; half had ended within %.2f s, the last within %.2f\n",
		b.name, a.Connections, a.Failed, a.P50/1000, a.Seconds)
	return nil
}

// storms compares the balancers, each in turn.
func storms(results []*result, servers *backends) error {
	for range *rounds {
		for _, r := range results {
			if err := r.balancer.storm(servers, scaled(8_000)); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	return nil
}
