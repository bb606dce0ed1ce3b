package tcplb

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// fallbackDelay is the head start of the first address's family.
const fallbackDelay = 300 * time.Millisecond

// connectFunc connects to one address, by the deadline.
type connectFunc func(ctx context.Context, to netip.AddrPort, deadline time.Time) (net.Conn, error)

func connectTCP(ctx context.Context, to netip.AddrPort, deadline time.Time) (net.Conn, error) {
	d := net.Dialer{Deadline: deadline, KeepAlive: -1} // see keepAliveAfter
	return d.DialContext(ctx, "tcp", to.String())
}

// connectAny connects to one of the addresses: those of the first one's family
// in turn and, after fallbackDelay or as soon as all of them have failed, those
// of the other family beside them. The first connection wins. This is the
// variant of RFC 8305 that Go's own dialer has, with each address's share of the
// time cut so that none is left out. The error is of the first address, unless
// another says more.
func connectAny(ctx context.Context, addrs []netip.Addr, port uint16, deadline time.Time, connect connectFunc) (net.Conn, error) {
	first, second := byFamily(addrs)
	if len(second) == 0 {
		return connectInTurn(ctx, first, port, deadline, connect)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		conn   net.Conn
		err    error
		second bool
	}
	outcomes := make(chan outcome, 2)
	race := func(addrs []netip.Addr, isSecond bool) {
		conn, err := connectInTurn(ctx, addrs, port, deadline, connect)
		outcomes <- outcome{conn, err, isSecond}
	}
	go race(first, false) // connectAny waits for it, and ends it if it lost
	running, started := 1, false
	startSecond := func() {
		if !started {
			started = true
			running++
			go race(second, true) // as the first
		}
	}
	headStart := time.NewTimer(fallbackDelay)
	defer headStart.Stop()
	var won net.Conn
	var errs [2]error
	for running > 0 {
		select {
		case <-headStart.C:
			startSecond()
		case o := <-outcomes:
			running--
			switch {
			case o.err == nil && won == nil:
				won = o.conn
				started = true // the second has no more to do
				cancel()
			case o.err == nil:
				_ = o.conn.Close()
			case o.second:
				errs[1] = o.err
			default:
				errs[0] = o.err
				startSecond()
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
// may only say that this host has no such family, the second that there was no
// file for a connect, so that the two say nothing of the backend.
func moreTelling(first, second error) error {
	if first == nil || isAny(second, shortageErrnos) || second != nil && isAny(first, noAddressErrnos) {
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
