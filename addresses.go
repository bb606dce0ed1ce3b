package tcplb

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/files"
)

// fallbackDelay is the head start of the first address's family.
const fallbackDelay = 300 * time.Millisecond

// connectFunc connects to one address, by the deadline.
type connectFunc func(ctx context.Context, to netip.AddrPort, deadline time.Time) (net.Conn, error)

// connectAny connects to one of the addresses: those of the first one's family
// in turn and, after fallbackDelay or as soon as all of them have failed, those
// of the other family beside them. The first connection wins. This is the
// variant of RFC 8305 that Go's own dialer has, with each address's share of the
// time cut so that none is left out. The error is of the first address, unless
// another says more.
//
// Who dials has one file for it. The other family begins beside the first as soon
// as there is a second one in the budget.
func connectAny(ctx context.Context, addrs []netip.Addr, port uint16, deadline time.Time, connect connectFunc) (net.Conn, error) {
	first, second := byFamily(addrs)
	if len(second) == 0 {
		return connectInTurn(ctx, first, port, deadline, connect)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		family int
		conn   net.Conn
		err    error
	}
	families := [2][]netip.Addr{first, second}
	outcomes := make(chan outcome, len(families))
	race := func(family int) {
		conn, err := connectInTurn(ctx, families[family], port, deadline, connect)
		outcomes <- outcome{family, conn, err}
	}
	started, running := 0, 0
	start := func() { // the next family, if one is left
		if started < len(families) {
			go race(started) // waited for below, and ended by cancel once another has won
			started++
			running++
		}
	}
	start()
	beside := false // a file of the budget is held
	endBeside := func() {
		if beside {
			beside = false
			files.Process.Release(1)
		}
	}
	headStart := time.NewTimer(fallbackDelay)
	defer headStart.Stop()
	var won net.Conn
	var errs [len(families)]error
	for running > 0 {
		select {
		case <-headStart.C:
			switch {
			case started == len(families):
			case files.Process.AcquireGently(1):
				beside = true
				start()
			default:
				headStart.Reset(fallbackDelay)
			}
		case o := <-outcomes:
			running--
			switch {
			case o.err != nil:
				errs[o.family] = o.err
				endBeside()
				start()
			case won != nil:
				_ = o.conn.Close()
				endBeside()
			default:
				won, started = o.conn, len(families)
				cancel()
			}
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, moreTelling(errs[0], errs[1])
}

// connectInTurn tries one address after the other, each for its share of the
// time that is left.
func connectInTurn(ctx context.Context, addrs []netip.Addr, port uint16, deadline time.Time, connect connectFunc) (net.Conn, error) {
	var err error
	for i, a := range addrs {
		now := time.Now()
		share := deadline.Sub(now) / time.Duration(len(addrs)-i)
		conn, e := connect(ctx, netip.AddrPortFrom(a, port), now.Add(share))
		if e == nil {
			return conn, nil
		}
		err = moreTelling(err, e)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// moreTelling returns the first error, unless the second says more: the first
// may only say that this host has no such family; and that the dial was given
// up, or that there was no file for it, means that the two say nothing of the
// backend.
func moreTelling(first, second error) error {
	switch {
	case first == nil, errors.Is(second, context.Canceled), isAny(second, shortageErrnos):
		return second
	case second != nil && isAny(first, noAddressErrnos):
		return second
	}
	return first
}

// byFamily parts the addresses: those of the first one's family, and the rest.
func byFamily(addrs []netip.Addr) (first, second []netip.Addr) {
	for i, a := range addrs {
		if a.Is4() != addrs[0].Is4() {
			first = append(first, addrs[:i]...)
			for _, a := range addrs[i:] {
				if a.Is4() == addrs[0].Is4() {
					first = append(first, a)
				} else {
					second = append(second, a)
				}
			}
			return first, second
		}
	}
	return addrs, nil
}
