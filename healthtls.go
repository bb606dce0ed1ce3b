package tcplb

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/literal"
)

// checkTLS returns the TLS of checks to read; see setCheckTLS.
func (h *Handler) checkTLS() checks.TLS {
	if t := h.activeChecks().TLS; t != nil {
		return *t
	}
	return checks.TLS{}
}

// setCheckTLS returns it to write, which turns it on.
func (h *Handler) setCheckTLS() *checks.TLS {
	setDefault(&h.activeChecks().TLS, new(checks.TLS))
	return h.activeChecks().TLS
}

func tlsText(h *Handler) string {
	switch t := h.activeChecks().TLS; {
	case t == nil:
		return notSet
	case t.Off:
		return "off"
	case t.ServerName == "":
		return "on"
	default:
		return strconv.Quote(t.ServerName)
	}
}

// meantByHealthTLS has what is meant by words that are no server's name.
var meantByHealthTLS = map[string]string{
	"on": meantOn, "yes": meantOn, "true": meantOn, "enable": meantOn, "enabled": meantOn,
	"of": meantOff, "no": meantOff, "false": meantOff, "none": meantOff, "never": meantOff, "disable": meantOff, "disabled": meantOff, "off": meantOff,
}

const (
	meantOn  = "write health_tls without a value, or a server's name"
	meantOff = "did you mean off?"
)

func (p *parser) healthTLS(s spec, h *Handler) error {
	t := h.setCheckTLS()
	if !p.NextArg() {
		return nil
	}
	t.ServerName = p.Val()
	if hint := meantByHealthTLS[strings.ToLower(t.ServerName)]; hint != "" && t.ServerName != "off" {
		return p.Errf("%s %s: %s", s.name, t.ServerName, hint)
	}
	if t.ServerName == "off" {
		t.ServerName, t.Off = "", true
	} else if err := checkHealthName(t.ServerName); err != nil {
		return p.Errf("%s %v", s.name, err)
	}
	if value := p.Val(); p.NextArg() {
		return p.Errf("%s %s: one value is enough, found %q", s.name, value, p.Val())
	}
	return nil
}

// checkHealthName refuses what is no name to find in a certificate.
func checkHealthName(name string) error {
	if hasPlaceholder(name) { // it is looked at again when that is resolved
		return nil
	}
	if name == "" || strings.ContainsAny(name, ":/ ") || checkText(name) != nil {
		return fmt.Errorf("%q: want a server's name, or nothing for the backend's host", name)
	}
	if err := literal.Check(name); err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	return nil
}

// resolveHealthTLS resolves placeholders, once.
func (h *Handler) resolveHealthTLS(repl *caddy.Replacer) error {
	t := h.activeChecks().TLS
	if t == nil {
		return nil
	}
	if err := resolveText(repl, &t.ServerName); err != nil {
		return fmt.Errorf("%s: %w", named(handlerOptions, "health_tls").path, err)
	}
	return nil
}

func checkHealthTLS(path string, h *Handler) error {
	name := h.checkTLS().ServerName
	if _, err := netip.ParseAddr(name); name == "" || err == nil {
		return nil
	}
	if err := checkHealthName(name); err != nil {
		return fmt.Errorf("%s %w", path, err)
	}
	return nil
}

func (p *parser) healthTLSInsecure(s spec, h *Handler) error {
	h.setCheckTLS().InsecureSkipVerify = true
	if p.NextArg() {
		return p.Errf("%s: takes no value, found %q: it is off unless it is there", s.name, p.Val())
	}
	return nil
}

func (p *parser) healthTrustPool(s spec, h *Handler) error {
	raw, err := p.trustPool(s)
	if err != nil {
		return err
	}
	h.setCheckTLS().CARaw = raw
	return nil
}
