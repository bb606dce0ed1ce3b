// Package demo is a backend to try a load balancer on, in the same Caddy: a
// layer4 handler that answers HTTP requests with its name, and sends everything
// else back as it came.
package demo

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/mholt/caddy-l4/layer4"
)

func init() {
	caddy.RegisterModule(new(Backend))
}

// Backend is the handler.
type Backend struct {
	// Name is the answer to every HTTP request. Default: "backend".
	Name string `json:"name,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Backend) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.handlers.demo_backend",
		New: func() caddy.Module { return new(Backend) },
	}
}

// Provision fills in the default.
func (b *Backend) Provision(caddy.Context) error {
	if b.Name == "" {
		b.Name = "backend"
	}
	return nil
}

// Handle serves one connection. What the client does to it is no error.
func (b *Backend) Handle(cx *layer4.Connection, _ layer4.Handler) error {
	in := bufio.NewReader(cx)
	line, err := peekLine(in)
	if err == nil && isRequestLine(line) {
		b.serveHTTP(in, cx)
		return nil
	}
	_, _ = io.Copy(cx, in)
	return nil
}

// peekLine waits for a line and leaves it to be read; where none ends within
// the reader's buffer or the stream, the error says so.
func peekLine(in *bufio.Reader) (string, error) {
	for n := 1; ; n = in.Buffered() + 1 {
		if _, err := in.Peek(n); err != nil {
			return "", err
		}
		b, _ := in.Peek(in.Buffered())
		if line, _, ok := strings.Cut(string(b), "\n"); ok {
			return line, nil
		}
		if !couldBeRequest(b) {
			return "", nil
		}
	}
}

// couldBeRequest reports whether b may be the beginning of an HTTP request:
// a method in capital letters, or a part of it.
func couldBeRequest(b []byte) bool {
	method, _, _ := strings.Cut(string(b), " ")
	return len(method) <= len(http.MethodConnect) && strings.ToUpper(method) == method
}

func isRequestLine(line string) bool {
	fields := strings.Fields(line)
	return len(fields) == 3 && strings.HasPrefix(fields[2], "HTTP/1.")
}

func (b *Backend) serveHTTP(in *bufio.Reader, out net.Conn) {
	body := b.Name + "\n"
	for {
		r, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		connection := "keep-alive"
		if r.Close {
			connection = "close"
		}
		_, err = fmt.Fprintf(out, "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n", len(body), connection)
		if err == nil && r.Method != http.MethodHead {
			_, err = io.WriteString(out, body)
		}
		if err != nil || r.Close {
			return
		}
	}
}

// UnmarshalCaddyfile reads
//
//	demo_backend [<name>]
func (b *Backend) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // handler name
	if d.NextArg() {
		b.Name = d.Val()
	}
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("demo_backend: takes no block, found %q", d.Val())
	}
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner     = (*Backend)(nil)
	_ layer4.NextHandler    = (*Backend)(nil)
	_ caddyfile.Unmarshaler = (*Backend)(nil)
)
