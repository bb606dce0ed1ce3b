package tcplb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// dialError is the kind of a failed connect; its names are values of the
// metrics' label "error_type".
type dialError int

const (
	dialRefused dialError = iota // the backend's host answered that nobody listens
	dialTimeout                  // no answer in time
	dialOther                    // a name that does not resolve, no route, …
	numDialErrors
)

var dialErrorNames = [numDialErrors]string{
	dialRefused: "dial_refused",
	dialTimeout: "dial_timeout",
	dialOther:   "dial_error",
}

func classify(err error) dialError {
	var timeout interface{ Timeout() bool }
	switch {
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
// of both families side by side. The end of ctx ends it at once.
//
// It does not use Dialer.DialTCP, which binds the local end even to no address
// in particular: a port taken by bind serves one connection only, one taken by
// connect serves one to each destination.
func dialTarget(ctx context.Context, t target, timeout time.Duration) (net.Conn, error) {
	if t.name != nil {
		return dialName(ctx, t, time.Now().Add(timeout))
	}
	d := net.Dialer{Timeout: timeout, KeepAlive: -1} // see keepAliveAfter
	if t.unix != "" {
		return d.DialContext(ctx, "unix", t.unix)
	}
	return d.DialContext(ctx, "tcp", t.text)
}

func dialName(ctx context.Context, t target, deadline time.Time) (net.Conn, error) {
	wait, cancel := context.WithDeadline(ctx, deadline)
	addrs, err := t.name.resolve(wait)
	cancel()
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
	}
	conn, err := connectAny(ctx, addrs, t.port, deadline, connectTCP)
	if err != nil {
		if trouble := t.name.troubled(); trouble != "" {
			err = fmt.Errorf("%w (%s)", err, trouble)
		}
		return nil, err
	}
	return conn, nil
}

var errNoBackend = errors.New("no backend available")

// link is a connection to a backend, and what it took.
type link struct {
	backend  *Backend
	conn     net.Conn
	release  func() // of the backend, after conn is closed
	attempts int
	took     time.Duration // of the successful connect alone
}

// connect picks a backend and connects to it. A failed connect moves on at once
// to a backend that was not tried, up to the number of retries; when none is
// left, and within tryDuration, it starts over every tryInterval. The error
// joins those of all attempts of the last round and matches errNoBackend.
func (g *generation) connect(client net.Addr) (link, error) {
	deadline := time.Now().Add(g.tryDuration)
	attempts := 0
	for {
		l, err := g.connectOnce(client, &attempts)
		if err == nil {
			return l, nil
		}
		if time.Until(deadline) < g.tryInterval || !pause(g.tryInterval, g.stopped) {
			return link{attempts: attempts}, err
		}
	}
}

// pause waits for d, and reports false if stop was closed before.
func pause(d time.Duration, stop <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-stop:
		return false
	}
}

// connectOnce is one round of connect: each backend at most once.
func (g *generation) connectOnce(client net.Addr, attempts *int) (link, error) {
	var (
		tried []*Backend
		errs  []error
	)
	for range 1 + g.retries {
		b := g.pick(client, tried)
		if b == nil {
			g.wantProbes()
			break
		}
		if len(tried) > 0 {
			tried[len(tried)-1].stats.retries.Add(1)
		}
		tried = append(tried, b)
		*attempts++
		held, release := b.hold()
		conn, took, err := g.dialBackend(held)
		if err == nil {
			return link{backend: held, conn: conn, release: release, attempts: *attempts, took: took}, nil
		}
		release()
		errs = append(errs, err)
	}
	return link{}, errors.Join(append([]error{errNoBackend}, errs...)...)
}

func (g *generation) dialBackend(b *Backend) (net.Conn, time.Duration, error) {
	began := time.Now()
	conn, err := g.dial(context.Background(), b.target, g.dialTimeout)
	took := time.Since(began)
	b.setConnect(began.Add(took), err)
	if err == nil {
		b.stats.dialTime.observe(took)
		return conn, took, nil
	}
	b.stats.errors[classify(err)].Add(1)
	b.setError(err)
	if !isScarcity(err) {
		b.checkSoon()
	}
	return nil, took, fmt.Errorf("dialing backend %q: %w", b.address, err)
}
