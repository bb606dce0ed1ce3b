package command

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
	"github.com/caddyserver/caddy/v2"
)

const (
	// Looks are ever rarer while there are connections: Caddy logs each.
	firstPause, lastPause = 250 * time.Millisecond, 2 * time.Second
	// A connect that had picked the backend just before shows a moment later, so
	// one look alone doesn't tell.
	looksWithout = 2
	// The admin endpoint may be away for a moment, as on a reload.
	awayLimit = 10 * time.Second
	noteEvery = 10 * time.Second
)

// wait is for backends that get no new connections to have none.
type wait struct {
	*call
	query    url.Values
	patience time.Duration
	// What the last look has shown.
	reply    reply
	backends []backend

	noted time.Time
}

func (w *wait) run() (int, error) {
	began := time.Now()
	ctx, cancel := context.WithDeadline(w.ctx(), began.Add(w.patience))
	defer cancel()
	waitedFor := make(map[string]bool)
	for _, b := range w.backends {
		waitedFor[b.key()] = true
	}
	seen, without, pause := began, 0, firstPause
	for {
		left, err := w.look(ctx, waitedFor)
		switch {
		case ctx.Err() != nil: // the look may have failed of that
		case err != nil && !errors.As(err, new(away)):
			return caddy.ExitCodeFailedStartup, err
		case err != nil && time.Since(seen) > awayLimit:
			return caddy.ExitCodeFailedStartup, fmt.Errorf("waiting for connections to end: %w", err)
		case err != nil:
			without = 0
		case left > 0:
			seen, without = time.Now(), 0
			pause = min(2*pause, lastPause, max(w.patience/20, firstPause))
			w.tell(left, time.Until(began.Add(w.patience)))
		default:
			seen, pause = time.Now(), firstPause
			if without++; without == looksWithout {
				return caddy.ExitCodeSuccess, nil
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return w.over()
		}
	}
}

// over says what is left when the time is.
func (w *wait) over() (int, error) {
	if w.ctx().Err() != nil {
		return caddy.ExitCodeFailedStartup, w.ctx().Err()
	}
	n := open(w.backends)
	if n == 0 {
		return exitNotReady, errors.New("the time is over before it is sure that no connection is left")
	}
	return exitNotReady, fmt.Errorf("after %s %s still open, and there will be no new ones", w.patience, words.Plural(n, "connection is", "connections are"))
}

// look returns how many connections the backends have.
func (w *wait) look(ctx context.Context, waitedFor map[string]bool) (left uint64, err error) {
	r, list, err := askFor[backend](ctx, w.in, http.MethodGet, "/tcp_lb/backends", w.query, nil)
	if err != nil {
		return 0, err
	}
	w.reply, w.backends = r, nil
	for _, b := range list { // one that is not there any more has none
		if !waitedFor[b.key()] {
			continue
		}
		w.backends = append(w.backends, b)
		if b.State == "ready" {
			return 0, fmt.Errorf("%s of %s was set to ready meanwhile", b.Address, b.LB)
		}
	}
	return open(w.backends), nil
}

func (b backend) key() string { return b.LB + " " + b.Address }

// open counts connections, and connects under way.
func open(backends []backend) (n uint64) {
	for _, b := range backends {
		n += b.Active + b.Connecting
	}
	return n
}

// tell shows now and then that it goes on.
func (w *wait) tell(open uint64, left time.Duration) {
	if time.Since(w.noted) < noteEvery {
		return
	}
	w.noted = time.Now()
	_, _ = fmt.Fprintf(w.note, "waiting for %s to end, for %s at most\n", words.Plural(open, "connection", "connections"), left.Round(time.Second))
}
