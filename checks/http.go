package checks

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
)

// HTTP asks by HTTP/1.1, one request a connection. With TLS it is HTTPS.
//
// The fields are those of reverse_proxy's active health checks.
type HTTP struct {
	// URI is the path to ask for, with a query if need be. Default: "/".
	URI string `json:"uri,omitempty"`
	// Method is the method. Default: GET.
	Method string `json:"method,omitempty"`
	// Headers are sent along; Host is the host's name, which without it is the
	// address. Global placeholders are resolved once, when the config is loaded.
	Headers http.Header `json:"headers,omitempty"`
	// ExpectStatus is the status to answer, 100–599, or its first digit for all
	// that begin with it. Default and 0: 2.
	ExpectStatus int `json:"expect_status,omitempty"`
	// ExpectBody is a regular expression that matches somewhere in the first 64 KB
	// of the body. Default: any body will do.
	ExpectBody string `json:"expect_body,omitempty"`
	// FollowRedirects asks again where an answer leads, up to 10 times, and always
	// the same backend. Default: a redirect is a status like others.
	FollowRedirects bool `json:"follow_redirects,omitempty"`

	uri  *url.URL
	body *regexp.Regexp
}

// CaddyModule returns the Caddy module information.
func (*HTTP) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  Namespace + ".http",
		New: func() caddy.Module { return new(HTTP) },
	}
}

// Provision fills in the defaults and refuses what is wrong.
func (h *HTTP) Provision(caddy.Context) error {
	if h.URI == "" {
		h.URI = "/"
	}
	if h.Method == "" {
		h.Method = http.MethodGet
	}
	if h.ExpectStatus == 0 {
		h.ExpectStatus = 2
	}
	if err := errors.Join(CheckURI(h.URI), CheckMethod(h.Method), CheckStatus(h.ExpectStatus), CheckHeaders(h.Headers), CheckPattern(h.ExpectBody)); err != nil {
		return err
	}
	if h.Method == http.MethodHead && h.ExpectBody != "" {
		return errors.New("a response to HEAD has no body to match: leave the pattern out, or ask by GET")
	}
	h.uri, _ = url.Parse(h.URI)
	if h.ExpectBody != "" {
		h.body = regexp.MustCompile(h.ExpectBody)
	}
	repl := caddy.NewReplacer()
	headers := make(http.Header, len(h.Headers))
	for name, values := range h.Headers {
		for _, v := range values {
			v, err := repl.ReplaceOrErr(v, true, false) // braces may be its own
			if err != nil {
				return fmt.Errorf("header %s: %w", name, err)
			}
			if strings.ContainsFunc(v, unicode.IsControl) {
				return fmt.Errorf("header %s: want printable characters", name) // which may be a secret
			}
			headers.Add(name, v)
		}
	}
	if headers["User-Agent"] == nil {
		headers.Set("User-Agent", "caddy-tcp-lb")
	}
	h.Headers = headers
	return nil
}

// CheckURI refuses what is no path with or without a query.
func CheckURI(uri string) error {
	u, err := url.Parse(uri)
	switch {
	case err != nil:
		return fmt.Errorf("%q: want a path such as /healthz: %w", uri, errors.Unwrap(err))
	case u.Host != "":
		return fmt.Errorf("%q: want a path without scheme and host: did you mean %s?", uri, u.RequestURI())
	case !strings.HasPrefix(uri, "/"):
		return fmt.Errorf("%q: want a path such as /healthz", uri)
	case !utf8.ValidString(uri):
		return fmt.Errorf("%q: want UTF-8, or bytes as %%NN", uri)
	case strings.ContainsAny(uri, " #"):
		return fmt.Errorf("%q: want a path, and a query at most", uri)
	}
	return nil
}

// CheckMethod refuses what is no method.
func CheckMethod(method string) error {
	if _, err := http.NewRequest(method, "/", nil); err != nil || method == http.MethodConnect {
		return fmt.Errorf("%q: want a method such as GET or HEAD", method)
	}
	return nil
}

// CheckStatus refuses what is neither a status nor the first digit of one.
func CheckStatus(status int) error {
	if status >= 1 && status <= 5 || status >= 100 && status <= 599 {
		return nil
	}
	return fmt.Errorf("%d: want a status from 100 to 599, or the first digit of one", status)
}

// CheckHeaders refuses what can't be sent.
func CheckHeaders(headers http.Header) error {
	for name, values := range headers {
		if name == "" || strings.ContainsFunc(name, notInToken) {
			return fmt.Errorf("header %q: want a name of letters, digits and -", name)
		}
		switch http.CanonicalHeaderKey(name) {
		case "Content-Length", "Transfer-Encoding", "Connection":
			return fmt.Errorf("header %s: it is the check's own to say", name)
		}
		for _, v := range values {
			if strings.ContainsFunc(v, unicode.IsControl) || !utf8.ValidString(v) {
				return fmt.Errorf("header %s: want printable characters in UTF-8, found %q", name, v)
			}
		}
	}
	return nil
}

func notInToken(c rune) bool {
	return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", c))
}

// CheckPattern refuses what is no regular expression.
func CheckPattern(pattern string) error {
	if _, err := regexp.Compile(pattern); err != nil {
		return fmt.Errorf("%q: want a regular expression: %w", pattern, err)
	}
	return nil
}

const maxRedirects = 10

// Check implements Check.
func (h *HTTP) Check(ctx context.Context, t Target) error {
	host := h.Headers.Get("Host")
	if host == "" {
		host = t.Address
		if t.Host == "" {
			host = "localhost"
		}
	}
	method, uri := h.Method, h.uri
	for range maxRedirects + 1 {
		conn, err := t.Dial(ctx)
		if err != nil {
			return err
		}
		resp, err := h.ask(conn, method, host, uri)
		if err != nil {
			return err
		}
		to := redirectTo(resp, uri)
		if to == nil || !h.FollowRedirects {
			return h.judge(conn, resp, to)
		}
		if _, secure := conn.(*tls.Conn); to.Scheme != "" && (to.Scheme == "https") != secure {
			return fmt.Errorf("HTTP %d to %s, which this check does not speak", resp.StatusCode, to)
		}
		if to.Host != "" && h.Headers.Get("Host") == "" {
			host = to.Host
		}
		if resp.StatusCode < 307 && method != http.MethodHead {
			method = http.MethodGet
		}
		uri = to
	}
	return fmt.Errorf("more than %d redirects", maxRedirects)
}

// ask sends a request, and reads the response up to its body.
func (h *HTTP) ask(conn net.Conn, method, host string, uri *url.URL) (*http.Response, error) {
	req := &http.Request{
		Method: method, Host: host, Header: h.Headers, Close: true,
		URL: &url.URL{Path: uri.Path, RawPath: uri.RawPath, RawQuery: uri.RawQuery},
	}
	var text bytes.Buffer // for one write, and without a buffer of 4 KB
	if err := req.Write(&text); err != nil {
		return nil, fmt.Errorf("making the HTTP request: %w", err)
	}
	if _, err := conn.Write(text.Bytes()); err != nil {
		return nil, fmt.Errorf("sending the HTTP request: %w", unsent(conn, err))
	}
	limited := &io.LimitedReader{R: conn, N: maxAnswer}
	r := bufio.NewReaderSize(limited, 2048)
	for {
		resp, err := http.ReadResponse(r, req)
		switch {
		case err != nil && limited.N <= 0:
			return nil, fmt.Errorf("no HTTP response within %d KB", maxAnswer>>10)
		case err != nil:
			return nil, fmt.Errorf("no HTTP response: %w", received(err))
		case resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols:
			limited.N = math.MaxInt64 // the body has a bound of its own, without what chunks take
			return resp, nil
		}
	}
}

// redirectTo returns where the response leads; nil = nowhere.
func redirectTo(resp *http.Response, from *url.URL) *url.URL {
	switch resp.StatusCode {
	case 301, 302, 303, 307, 308:
		if to, err := from.Parse(resp.Header.Get("Location")); err == nil && resp.Header.Get("Location") != "" {
			return to
		}
	}
	return nil
}

func (h *HTTP) judge(conn net.Conn, resp *http.Response, to *url.URL) error {
	if !h.wants(resp.StatusCode) {
		where := ""
		if to != nil {
			where = " to " + to.String()
		}
		return fmt.Errorf("HTTP %d%s, want %s", resp.StatusCode, where, statusText(h.ExpectStatus))
	}
	if h.body != nil {
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return fmt.Errorf("HTTP %d, reading the body: %w", resp.StatusCode, received(err))
		}
		if !h.body.Match(body) {
			return fmt.Errorf("HTTP %d, but the body does not match %q", resp.StatusCode, h.ExpectBody)
		}
	}
	if resp.Close { // as the request said
		awaitClose(conn, lingerTime)
	} else { // it may do so without a word
		awaitClose(conn, lingerTime/10)
	}
	return nil
}

func (h *HTTP) wants(status int) bool {
	return status == h.ExpectStatus || h.ExpectStatus < 100 && status/100 == h.ExpectStatus
}

func statusText(expected int) string {
	if expected < 100 {
		return fmt.Sprintf("%dxx", expected)
	}
	return fmt.Sprint(expected)
}

// Interface guards
var (
	_ Check             = (*HTTP)(nil)
	_ caddy.Provisioner = (*HTTP)(nil)
)
