package tcplb

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/statuspage"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

func init() {
	caddy.RegisterModule(new(StatusHandler))
	httpcaddyfile.RegisterHandlerDirective("tcp_lb_status", parseStatusHandler)
	// Behind tcp_lb_health: without a matcher it answers whatever is left.
	httpcaddyfile.RegisterDirectiveOrder("tcp_lb_status", httpcaddyfile.Before, "respond")
}

const (
	defaultRefresh = 5 * time.Second
	minRefresh     = time.Second
	maxRefresh     = time.Hour
)

// StatusHandler is an HTTP handler that shows people how the pools and their
// backends are: what is wrong and since when, connections, rates, limits, and the
// last twenty minutes. It only reads, and needs no script. It tells addresses, so
// it belongs where only operators come.
type StatusHandler struct {
	// Pools are the names of those to show. Default: all of the process, those that
	// have left the config and have connections among them.
	Pools []string `json:"pools,omitempty"`
	// Refresh is how often the page is fetched anew, 1s at least. Default: 5s; 0 =
	// only when the reader does that.
	Refresh *caddy.Duration `json:"refresh,omitempty"`

	pages *pageMaker
}

// CaddyModule returns the Caddy module information.
func (*StatusHandler) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.tcp_lb_status",
		New: func() caddy.Module { return new(StatusHandler) },
	}
}

// Provision resolves placeholders and has histories recorded as long as the config
// runs. Whether there are pools of those names shows in App.Start.
func (h *StatusHandler) Provision(ctx caddy.Context) error {
	module, err := ctx.App("tcp_lb")
	if err != nil {
		return err
	}
	app := module.(*App)
	if h.Refresh == nil {
		h.Refresh = new(caddy.Duration(defaultRefresh))
	}
	if err := checkRefresh(time.Duration(*h.Refresh)); err != nil {
		return fmt.Errorf("tcp_lb_status: %w", err)
	}
	if h.Pools, err = resolvePools(h.Pools); err != nil {
		return fmt.Errorf("tcp_lb_status: %w", err)
	}
	app.ask("tcp_lb_status", h.Pools)
	app.records = true
	h.pages = newPageMaker(h.Pools, time.Duration(*h.Refresh))
	return nil
}

func checkRefresh(d time.Duration) error {
	if d == 0 || d >= minRefresh && d <= maxRefresh {
		return nil
	}
	return fmt.Errorf("refresh %s: want a duration from %s to %s, or 0 for never", d, minRefresh, maxRefresh)
}

// ServeHTTP implements caddyhttp.MiddlewareHandler; it ends the chain.
func (h *StatusHandler) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Security-Policy", statuspage.SecurityPolicy)
	header.Set("X-Frame-Options", "DENY")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	if !isRead(r) {
		header.Set("Allow", "GET, HEAD")
		header.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusMethodNotAllowed)
		_, err := fmt.Fprintln(w, "this page only reads: want GET or HEAD")
		return err
	}
	status, body, err := h.pages.get(r.Context(), statuspage.ParseView(r.URL.Query()))
	if err != nil {
		return caddyhttp.Error(http.StatusServiceUnavailable, err)
	}
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(body)
	return err
}

const (
	// pageAge is for how long a page serves whoever asks for it: many readers make
	// no more work than a few.
	pageAge = 250 * time.Millisecond
	// maxPages is how many views are kept for so long.
	maxPages = 8
)

// pageMaker makes pages, one at a time, and keeps each for a moment. While a reader
// takes its time it has the bytes and nothing else.
type pageMaker struct {
	pools []string
	every time.Duration
	turn  chan struct{} // capacity 1; who has put something in has what follows
	page  *statuspage.Page
	made  map[statuspage.View][]byte
}

func newPageMaker(pools []string, every time.Duration) *pageMaker {
	return &pageMaker{pools: pools, every: every, turn: make(chan struct{}, 1)}
}

// get returns the view and its status.
func (m *pageMaker) get(ctx context.Context, v statuspage.View) (status int, body []byte, err error) {
	select {
	case m.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, nil, ctx.Err()
	}
	defer func() { <-m.turn }()
	if m.page == nil || time.Since(m.page.At) >= pageAge {
		m.page, m.made = statusPage(m.pools, m.every), make(map[statuspage.View][]byte)
	}
	if v.LB != "" && !m.page.Has(v.LB) {
		body, err = m.page.Render(v)
		return http.StatusNotFound, body, err
	}
	if body = m.made[v]; body != nil {
		return http.StatusOK, body, nil
	}
	if body, err = m.page.Render(v); err == nil && len(m.made) < maxPages {
		m.made[v] = body
	}
	return http.StatusOK, body, err
}

func parseStatusHandler(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	var handler StatusHandler
	return &handler, handler.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile reads the directive:
//
//	tcp_lb_status [<matcher>] {
//		refresh <duration>|off
//		pools   <pool>...
//	}
//
// As everywhere in Caddy a first argument that begins with /, * or @ is the
// matcher.
func (h *StatusHandler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // directive name
	if d.NextArg() {
		return d.Errf("tcp_lb_status: unexpected %q: pools are named in the block, pools %s", d.Val(), d.Val())
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		option := d.Val()
		values := d.RemainingArgs()
		var err error
		switch option {
		case "refresh":
			err = h.readRefresh(values)
		case "pools":
			err = h.readPools(values)
		default:
			err = fmt.Errorf("%s", unknown("option", option, []string{"pools", "refresh"}, nil))
		}
		if err != nil {
			return d.Errf("tcp_lb_status: %v", err)
		}
		if d.NextBlock(nesting + 1) {
			return d.Errf("tcp_lb_status: %s takes no block", option)
		}
	}
	return nil
}

func (h *StatusHandler) readRefresh(values []string) error {
	switch {
	case h.Refresh != nil:
		return fmt.Errorf("refresh is there twice")
	case len(values) != 1:
		return fmt.Errorf("refresh: want one duration such as 5s, or off")
	case values[0] == "off":
		h.Refresh = new(caddy.Duration)
		return nil
	}
	every, err := caddy.ParseDuration(values[0])
	if err != nil {
		return fmt.Errorf("refresh %q: want a duration such as 5s, or off", values[0])
	}
	h.Refresh = (*caddy.Duration)(&every)
	return checkRefresh(every)
}

func (h *StatusHandler) readPools(values []string) error {
	switch {
	case h.Pools != nil:
		return fmt.Errorf("pools is there twice")
	case len(values) == 0 || slices.Contains(values, ""):
		return fmt.Errorf("pools: want names of pools")
	}
	h.Pools = values
	return nil
}

// Interface guards
var (
	_ caddyhttp.MiddlewareHandler = (*StatusHandler)(nil)
	_ caddyfile.Unmarshaler       = (*StatusHandler)(nil)
	_ caddy.Provisioner           = (*StatusHandler)(nil)
)
