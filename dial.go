package tcplb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// dialError is the kind of a failed connect; its names are values of the
// metrics' label "error_type".
type dialError int

const (
	dialRefused dialError = iota // the backend's host answered that nobody listens
	dialTimeout                  // no answer in time
	dialTLS                      // there was a connection, but no TLS on it
	dialOther                    // a name that does not resolve, no route, …
	numDialErrors
)

var dialErrorNames = [numDialErrors]string{
	dialRefused: "dial_refused",
	dialTimeout: "dial_timeout",
	dialTLS:     "dial_tls",
	dialOther:   "dial_error",
}

func classify(err error) dialError {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, errTLS): // whatever it was that ended it
		return dialTLS
	case isAny(err, refusedErrnos):
		return dialRefused
	case isAny(err, timeoutErrnos), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return dialTimeout
	default:
		return dialOther
	}
}

// dialFunc connects to a backend, within the timeout. Tests replace it.
type dialFunc func(ctx context.Context, t target, timeout time.Duration) (net.Conn, error)

// dialTarget is the real dialFunc. A name is looked up at each call, but see
// hostName for when that does not work, and all its addresses are tried, those
// of both families side by side. The end of ctx ends it, by
// watchAfter at the latest.
func dialTarget(ctx context.Context, t target, timeout time.Duration) (net.Conn, error) {
	deadline := time.Now().Add(timeout)
	switch {
	case t.name != nil:
		return dialName(ctx, t, deadline)
	case t.unix != "":
		return connectUnix(ctx, t.unix, deadline)
	}
	return connectFrom(ctx, t.from, netip.AddrPortFrom(t.literal, t.port), deadline)
}

func dialName(ctx context.Context, t target, deadline time.Time) (net.Conn, error) {
	wait, cancel := context.WithDeadline(ctx, deadline)
	addrs, err := t.name.resolve(wait)
	cancel()
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
	}
	if t.from.IsValid() {
		if addrs = ofFamily(addrs, t.from); len(addrs) == 0 {
			err := &net.DNSError{Err: "no " + family(t.from) + " address, as local_address " + t.from.String() + " is", Name: t.host}
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
		}
	}
	conn, err := connectAny(ctx, addrs, t.port, deadline, func(ctx context.Context, to netip.AddrPort, deadline time.Time) (net.Conn, error) {
		return connectFrom(ctx, t.from, to, deadline)
	})
	if err != nil {
		if trouble := t.name.troubled(); trouble != "" {
			err = fmt.Errorf("%w (%s)", err, trouble)
		}
		return nil, err
	}
	return conn, nil
}
