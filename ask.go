package tcplb

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// inquiry is what the checks of a config ask of a backend.
type inquiry struct {
	check checks.Check // nil = a connect is enough
	wire  checks.Wire  // as the checks' options have it, see assignment.wire
	ofOwn bool         // those say whether there is TLS
	trust bool         // and who is trusted by it
}

// over returns the TLS of checks to the port of clients' connections, which have c:
// what the checks' options leave open is as those have it. Nil is no TLS.
func (i inquiry) over(c *tls.Config) *tls.Config {
	own := i.wire.TLS
	switch {
	case !i.ofOwn:
		return c
	case own == nil:
		return nil
	}
	merged := c.Clone()
	if own.ServerName != "" {
		merged.ServerName = own.ServerName
	}
	if i.trust {
		merged.RootCAs, merged.InsecureSkipVerify = own.RootCAs, own.InsecureSkipVerify
	}
	return merged
}

// assignment is what a checker works by.
type assignment struct {
	*generation
	port     uint16 // 0 = the backend's own
	approach *approach
}

// question is equal for two that ask the same. A verdict is about one question.
type question struct {
	asks   string
	port   uint16
	begins string
}

func (a *assignment) question() question {
	q := question{asks: a.checks.asks, port: a.port}
	if a.approach != nil {
		q.begins = a.approach.text
	}
	return q
}

// wire returns what stands between the checks and t. They follow clients'
// connections to the backend's own port: another one is as a rule another service's.
// A Unix socket has none, and is probed itself.
func (a *assignment) wire(t target) checks.Wire {
	w := a.inquiry.wire
	if follows := a.port == 0 || a.port == t.port || t.unix != ""; follows && a.approach != nil {
		setDefault(&w.Proxy, a.approach.proxy)
		if s := a.approach.security; s != nil {
			w.TLS = s.ofChecks
		}
	}
	if w.Proxy == proxyOff {
		w.Proxy = ""
	}
	return w
}

// checkPort returns the port to probe of the member; 0 = its own.
func (m member) checkPort(g *generation) uint16 {
	if m.healthPort != 0 {
		return m.healthPort
	}
	return g.checks.port
}

// ask checks the backend at t once, by more than a connect.
func (g *generation) ask(ctx context.Context, t target, check checks.Check, w checks.Wire) error {
	ctx, cancel := context.WithTimeout(ctx, g.checks.timeout)
	defer cancel()
	answer := make(chan error)
	// Waited for right here. What it takes of stack, several times that of a connect,
	// would stay with the backend's checker, of which there may be 10,000.
	go g.put(ctx, t, check, w, answer)
	err := <-answer
	var panicked *checks.Panic
	if errors.As(err, &panicked) {
		g.logger.Error("panic in a health check", zap.String("lb", g.name), zap.String("backend", t.String()),
			zap.Any("panic", panicked.Value), zap.ByteString("stack", panicked.Stack))
	}
	switch {
	case err == nil || !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return err
	case errors.Is(err, checks.ErrHandshakeLate): // as clients' connects have it
		return fmt.Errorf("%w within %s", err, g.checks.timeout)
	default:
		return fmt.Errorf("no verdict within %s: %w", g.checks.timeout, err)
	}
}

// errCheckGone is of a check that ended its goroutine.
var errCheckGone = errors.New("the check ended without a verdict")

// put puts the question, and sends the answer.
func (g *generation) put(ctx context.Context, t target, check checks.Check, w checks.Wire, answer chan<- error) {
	deadline, _ := ctx.Deadline()
	err := errCheckGone
	defer func() { answer <- err }()
	err = checks.Run(ctx, check, w, checks.Target{
		Address: t.String(),
		Host:    t.host,
		Dial: func(ctx context.Context) (net.Conn, error) {
			conn, err := g.dial(ctx, t, time.Until(deadline))
			if err != nil {
				return nil, err
			}
			return brief(conn)
		},
	})
}

// asks is equal for two settings that ask the same of a backend, whenever and
// however often they do.
func (a *ActiveHealthChecks) asks() (string, error) {
	timeless := *a
	timeless.Disabled, timeless.Interval, timeless.FastInterval, timeless.Timeout, timeless.Passes, timeless.Fails = false, 0, 0, 0, 0, 0
	timeless.Port, timeless.InitiallyUnhealthy = 0, false
	b, err := json.Marshal(timeless)
	return string(b), err
}

// text names the kind of check; empty for a bare connect. It tells nothing that
// may be secret.
func (a *ActiveHealthChecks) text() string {
	kind := ""
	switch {
	case a.URI != "":
		path, _, _ := strings.Cut(a.URI, "?")
		kind = "http " + path
	case len(a.Dialogue) > 0:
		kind = "dialogue"
	case len(a.CheckRaw) > 0:
		var module struct {
			Name string `json:"check"`
		}
		_ = json.Unmarshal(a.CheckRaw, &module)
		kind = module.Name
	}
	if a.TLS != nil && !a.TLS.Off {
		kind = strings.TrimSpace("tls " + kind)
	}
	return kind
}

// newInquiry makes the check of a checked handler.
func (h *Handler) newInquiry(ctx caddy.Context) (i inquiry, err error) {
	a := h.activeChecks()
	if i.check, err = h.newCheck(ctx); err != nil {
		return i, err
	}
	i.wire.Proxy = a.ProxyProtocol
	i.ofOwn = a.TLS != nil
	i.trust = i.ofOwn && (a.TLS.InsecureSkipVerify || len(a.TLS.CARaw) > 0) // loading takes the latter out
	if a.TLS != nil && !a.TLS.Off {
		if i.wire.TLS, err = a.TLS.Config(ctx); err != nil {
			return i, fmt.Errorf("health_checks.active.tls: %w", err)
		}
		setDefault(&i.check, checks.Check(checks.Connect{}))
	}
	return i, nil
}

// newCheck returns nil for what is a connect.
func (h *Handler) newCheck(ctx caddy.Context) (checks.Check, error) {
	a := h.activeChecks()
	switch {
	case a.URI != "":
		c := &checks.HTTP{
			URI: a.URI, Method: a.Method, Headers: a.Headers,
			ExpectStatus: a.ExpectStatus, ExpectBody: a.ExpectBody, FollowRedirects: a.FollowRedirects,
		}
		return c, c.Provision(ctx)
	case len(a.Dialogue) > 0:
		c := &checks.Dialogue{Steps: a.Dialogue}
		return c, c.Provision(ctx)
	case len(a.CheckRaw) == 0:
		return nil, nil
	}
	var named struct {
		Check string `json:"check"`
	}
	if json.Unmarshal(a.CheckRaw, &named) != nil || named.Check == "" {
		return nil, fmt.Errorf(`health_checks.active.check %s: want an object such as {"check":"http","uri":"/"}`, short(a.CheckRaw))
	}
	if err := checkModuleName("check", checks.Namespace, named.Check, nil); err != nil {
		return nil, fmt.Errorf("health_checks.active.check: %w", err)
	}
	module, err := ctx.LoadModule(a, "CheckRaw")
	if err != nil {
		return nil, fmt.Errorf("loading the check: %w", err)
	}
	check, ok := module.(checks.Check)
	if !ok {
		return nil, fmt.Errorf("module %T is not a check", module)
	}
	return check, nil
}

// conflict finds an option of checks that does not go with the others. Their names
// in the error are by call.
func (h *Handler) conflict(call func(option string) string) (option string, err error) {
	a := h.activeChecks()
	if a.URI == "" {
		for _, o := range []struct {
			name string
			set  bool
		}{
			{"health_method", a.Method != ""}, {"health_status", a.ExpectStatus != 0}, {"health_headers", len(a.Headers) > 0},
			{"health_body", a.ExpectBody != ""}, {"health_follow_redirects", a.FollowRedirects},
		} {
			if o.set {
				return o.name, fmt.Errorf("%s: it is of an HTTP check, for which %s is missing", call(o.name), call("health_uri"))
			}
		}
	}
	passive := h.HealthChecks.Passive
	t := h.checkTLS()
	unix := slices.IndexFunc(h.Backends, h.hasNoNameFor)
	switch {
	case passive != nil && passive.MaxFails > 0 && passive.FailDuration == 0:
		return "max_fails", fmt.Errorf("%s: it counts within a time, and %s is missing", call("max_fails"), call("fail_duration"))
	case a.InitiallyUnhealthy && a.Disabled:
		return "health_initially_unhealthy", fmt.Errorf("%s: without checks no backend would ever be up", call("health_initially_unhealthy"))
	case h.CloseIfUnhealthy != nil && a.Disabled:
		return "close_if_unhealthy", fmt.Errorf("%s: without checks no backend is ever found down", call("close_if_unhealthy"))
	case a.Method == http.MethodHead && a.ExpectBody != "":
		return "health_body", fmt.Errorf("%s: a response to HEAD has no body", call("health_body"))
	case a.URI != "" && len(a.Dialogue) > 0:
		return dialogueOption(a), fmt.Errorf("%s: a check is by HTTP or a dialogue, and %s is there, too", call(dialogueOption(a)), call("health_uri"))
	case len(a.CheckRaw) > 0 && a.URI != "":
		return "health_check", fmt.Errorf("%s: one check is enough, and %s is there, too", call("health_check"), call("health_uri"))
	case len(a.CheckRaw) > 0 && len(a.Dialogue) > 0:
		return "health_check", fmt.Errorf("%s: one check is enough, and %s is there, too", call("health_check"), call(dialogueOption(a)))
	case t.Off && (t.ServerName != "" || t.InsecureSkipVerify || len(t.CARaw) > 0):
		return "health_tls", fmt.Errorf("%s: it is off, the other options of its TLS would do nothing", call("health_tls"))
	case t.InsecureSkipVerify && len(t.CARaw) > 0:
		return "health_tls_insecure_skip_verify", fmt.Errorf("%s: nothing is verified with it, so that %s would do nothing: leave one of them out",
			call("health_tls_insecure_skip_verify"), call("health_tls_trust_pool"))
	case a.TLS != nil && !t.Off && unix >= 0:
		return "health_tls", fmt.Errorf("%s: backend %q has no host whose name a certificate could have: write one", call("health_tls"), h.Backends[unix].Address)
	}
	return "", nil
}

// hasNoNameFor reports whether b is at a Unix socket, and no option says which name
// a check by TLS wants in its certificate.
func (h *Handler) hasNoNameFor(b BackendConfig) bool {
	t := h.checkTLS()
	if !strings.HasPrefix(b.Address, "unix/") || t.ServerName != "" || t.InsecureSkipVerify {
		return false
	}
	clients := b.TLS.over(h.TLS)
	if clients == nil {
		return true
	}
	return clients.ServerName == "" && (!clients.InsecureSkipVerify || len(t.CARaw) > 0)
}

func dialogueOption(a *ActiveHealthChecks) string {
	if a.Dialogue[0].Send != "" {
		return "health_send"
	}
	return "health_expect"
}
