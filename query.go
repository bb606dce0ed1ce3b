package tcplb

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// badRequest is an answer of the admin API to what is the caller's mistake.
func badRequest(format string, args ...any) error {
	return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: fmt.Errorf(format, args...)}
}

// noneMatched is the answer to a change of what is not there.
func noneMatched(what string) error {
	return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: fmt.Errorf("there is no such %s", what)}
}

// methodNotAllowed is the answer to a method that is not among those allowed.
func methodNotAllowed(w http.ResponseWriter, r *http.Request, allowed string) error {
	w.Header().Set("Allow", allowed)
	return caddy.APIError{
		HTTPStatus: http.StatusMethodNotAllowed,
		Err:        fmt.Errorf("method %s is not allowed, want one of %s", r.Method, allowed),
	}
}

func isRead(r *http.Request) bool {
	return r.Method == http.MethodGet || r.Method == http.MethodHead
}

// parameters returns those of the request's query, of which there may be each
// once. For a reader an empty one is none. A change must not take it so: it may
// be a script's variable that is not set, and would be a change of everything.
func parameters(r *http.Request, there ...string) (map[string]string, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("query %q: %w", r.URL.RawQuery, err)
	}
	set := make(map[string]string, len(values))
	for name, list := range values {
		switch known := unknownParameter(name, there); {
		case known != nil:
			return nil, known
		case len(list) > 1:
			return nil, badRequest("parameter %q is there %d times", name, len(list))
		case list[0] == "" && !isRead(r):
			return nil, badRequest("parameter %q is empty: leave it out for all", name)
		case list[0] != "":
			set[name] = list[0]
		}
	}
	return set, nil
}

func unknownParameter(name string, there []string) error {
	for _, t := range there {
		if t == name {
			return nil
		}
	}
	return badRequest("%s", unknown("parameter", name, there, nil))
}

// backendFilter says which backends are meant. What is empty is any.
type backendFilter struct{ lb, address string }

func parseBackendFilter(set map[string]string) (f backendFilter, err error) {
	f.lb = set["lb"]
	if text := set["address"]; text != "" {
		t, err := parseTarget(text)
		if err != nil {
			return f, badRequest("address %q: %w", text, err)
		}
		f.address = t.String() // as it is written everywhere
	}
	return f, nil
}

func (f backendFilter) matches(lb string, b *Backend) bool {
	return (f.lb == "" || f.lb == lb) && (f.address == "" || f.address == b.address)
}

// clientFilter says which clients are meant; zero is any.
type clientFilter struct {
	prefix netip.Prefix // without a zone
	port   uint16       // 0 = any
}

// parseClientFilter reads an IP address, one with a port, or a prefix.
func parseClientFilter(text string) (clientFilter, error) {
	if text == "" {
		return clientFilter{}, nil
	}
	if p, err := netip.ParsePrefix(text); err == nil {
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
		}
		return clientFilter{prefix: p.Masked()}, nil
	}
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")); err == nil {
		return clientFilter{prefix: onlyAddr(a)}, nil
	}
	ap, err := netip.ParseAddrPort(text)
	if err != nil || ap.Port() == 0 {
		return clientFilter{}, badRequest("client %q: want an IP address, one with a port, or a prefix such as 10.0.0.0/8", text)
	}
	return clientFilter{prefix: onlyAddr(ap.Addr()), port: ap.Port()}, nil
}

func onlyAddr(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	return netip.PrefixFrom(a, a.BitLen())
}

func (f clientFilter) matches(client net.Addr) bool {
	if !f.prefix.IsValid() {
		return true
	}
	ap := addrPortOf(client)
	return ap.IsValid() && f.prefix.Contains(ap.Addr().Unmap().WithZone("")) && (f.port == 0 || f.port == ap.Port())
}

// addrPortOf returns the zero AddrPort of what has no IP address.
func addrPortOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case nil:
		return netip.AddrPort{}
	case compactAddr:
		return netip.AddrPort(a)
	case *net.TCPAddr:
		return a.AddrPort()
	}
	ap, _ := netip.ParseAddrPort(a.String())
	return ap
}

// parseLimit reads how many are wanted; 0 = all.
func parseLimit(text string, none int) (int, error) {
	if text == "" {
		return none, nil
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, badRequest("limit %q: want a number, 0 for all", text)
	}
	return int(n), nil
}
