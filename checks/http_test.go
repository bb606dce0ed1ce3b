package checks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// serveHTTP is Go's server, as many services have it.
func serveHTTP(t testing.TB, handler http.HandlerFunc) *server {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &http.Server{Handler: handler}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return &server{address: ln.Addr().String()}
}

func TestHTTPVerdicts(t *testing.T) {
	s := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			fmt.Fprintf(w, "role: primary %s %s %s", r.Method, r.URL.RawQuery, r.Host)
		case "/created":
			w.WriteHeader(http.StatusCreated)
		case "/down":
			w.WriteHeader(http.StatusServiceUnavailable)
		case "/hint":
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusNoContent)
		case "/moved":
			http.Redirect(w, r, "/ok?moved", http.StatusFound)
		case "/elsewhere":
			http.Redirect(w, r, "http://elsewhere.example/ok", http.StatusPermanentRedirect)
		case "/secure":
			http.Redirect(w, r, "https://elsewhere.example/ok", http.StatusFound)
		case "/round":
			http.Redirect(w, r, "/round", http.StatusSeeOther)
		case "/headers":
			w.Header().Set("X", "y")
			fmt.Fprintf(w, "%s|%s|%s|%v", r.Host, r.Header.Values("X-Check"), r.Header.Get("User-Agent"), r.Close)
		case "/long":
			_, _ = io.WriteString(w, strings.Repeat("x", maxAnswer)+"late")
		case "/endless":
			for _, err := io.WriteString(w, "x"); err == nil && r.Context().Err() == nil; _, err = io.WriteString(w, strings.Repeat("x", 1024)) {
			}
		}
	})
	for _, c := range []struct {
		name  string
		check HTTP
		want  string // empty = well
	}{
		{"200", HTTP{URI: "/ok"}, ""},
		{"default path", HTTP{}, ""},
		{"201 is 2xx", HTTP{URI: "/created"}, ""},
		{"204 after 103", HTTP{URI: "/hint", ExpectStatus: 204}, ""},
		{"503", HTTP{URI: "/down"}, "HTTP 503, want 2xx"},
		{"503 as wanted", HTTP{URI: "/down", ExpectStatus: 503}, ""},
		{"5xx as wanted", HTTP{URI: "/down", ExpectStatus: 5}, ""},
		{"201 for 200", HTTP{URI: "/created", ExpectStatus: 200}, "HTTP 201, want 200"},
		{"body", HTTP{URI: "/ok?lag=1", ExpectBody: `^role: primary GET lag=1 127`}, ""},
		{"other body", HTTP{URI: "/ok", ExpectBody: "replica"}, `HTTP 200, but the body does not match "replica"`},
		{"HEAD", HTTP{URI: "/ok", Method: "HEAD"}, ""},
		{"POST", HTTP{URI: "/ok", Method: "POST", ExpectBody: "primary POST"}, ""},
		{"redirect", HTTP{URI: "/moved"}, "HTTP 302 to /ok?moved, want 2xx"},
		{"redirect as wanted", HTTP{URI: "/moved", ExpectStatus: 302}, ""},
		{"redirect that is followed", HTTP{URI: "/moved", FollowRedirects: true, ExpectBody: "GET moved 127"}, ""},
		{"redirect to the same backend by another name", HTTP{URI: "/elsewhere", FollowRedirects: true, ExpectBody: "GET  elsewhere.example$"}, ""},
		{"redirect to HTTPS", HTTP{URI: "/secure", FollowRedirects: true}, "HTTP 302 to https://elsewhere.example/ok, which this check does not speak"},
		{"redirects without end", HTTP{URI: "/round", FollowRedirects: true}, "more than 10 redirects"},
		{"headers", HTTP{URI: "/headers", Headers: http.Header{"host": {"db.internal"}, "X-Check": {"a", "b"}}, ExpectBody: `^db.internal\|\[a b\]\|caddy-tcp-lb\|true$`}, ""},
		{"user agent", HTTP{URI: "/headers", Headers: http.Header{"User-Agent": {"me"}}, ExpectBody: `\|me\|`}, ""},
		{"64 KB of the body", HTTP{URI: "/long", ExpectBody: "x$"}, ""},
		{"no more of it", HTTP{URI: "/long", ExpectBody: "late"}, "HTTP 200, but the body does not match"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := s.check(t, provisioned(t, &c.check), Wire{})
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
		})
	}
	t.Run("endless body", func(t *testing.T) {
		lingerTime = time.Millisecond
		defer func() { lingerTime = hangTimeout }()
		require.NoError(t, s.check(t, provisioned(t, &HTTP{URI: "/endless", ExpectBody: "x"}), Wire{}))
	})
}

// What is no HTTP server is told as what it is, in bounds.
func TestHTTPOfWhatIsNone(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		want   string
	}{
		"says nothing":    {"", "no HTTP response: the backend closed the connection"},
		"a mail server":   {"220 mail.example ESMTP\r\n", "no HTTP response: malformed HTTP"},
		"half a response": {"HTTP/1.1 200", "no HTTP response: the backend closed the connection"},
		"half a body":     {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "HTTP 200, reading the body: the backend closed the connection"},
		"endless headers": {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", maxAnswer/6+1), "no HTTP response within 64 KB"},
		"only interim":    {strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", maxAnswer/25+1), "no HTTP response within 64 KB"},
		"one long line":   {strings.Repeat("\x00", 4000) + "\r\n", "no HTTP response: malformed HTTP"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(conn net.Conn) {
				_, _ = http.ReadRequest(bufio.NewReader(conn))
				_, _ = io.WriteString(conn, c.answer)
			})
			err := s.check(t, provisioned(t, &HTTP{ExpectBody: "abc"}), Wire{})
			require.ErrorContains(t, err, c.want)
			require.Less(t, len(err.Error()), maxText+10)
		})
	}
}

// The backend closes first, so that no port of this side is in TIME_WAIT.
func TestHTTPLeavesTheCloseToTheBackend(t *testing.T) {
	waits := make(chan struct{})
	first := make(chan bool, 1)
	s := serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		_, _ = http.ReadRequest(r)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			_, _ = r.ReadByte()
		}()
		select {
		case <-waits:
			first <- true
		case <-closed:
			first <- false
		}
		_ = c.Close()
		<-closed
	})
	target := s.target()
	dial := target.Dial
	target.Dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		return &secondRead{Conn: c, began: waits}, err
	}
	require.NoError(t, Run(t.Context(), provisioned(t, new(HTTP)), Wire{}, target))
	require.True(t, <-first)
}

// secondRead tells of its second read: the first gets the response.
type secondRead struct {
	net.Conn
	n     int
	began chan struct{}
}

func (c *secondRead) Read(b []byte) (int, error) {
	if c.n++; c.n == 2 {
		close(c.began)
	}
	return c.Conn.Read(b)
}

// It does not wait for long.
func TestHTTPOfABackendThatDoesNotClose(t *testing.T) {
	lingerTime = time.Millisecond
	defer func() { lingerTime = hangTimeout }()
	s := serve(t, func(c net.Conn) {
		r := bufio.NewReader(c)
		_, _ = http.ReadRequest(r)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		_, err := r.ReadByte()
		require.ErrorIs(t, err, io.EOF, "by a FIN: a reset would be in the backend's log")
	})
	require.NoError(t, s.check(t, provisioned(t, new(HTTP)), Wire{}))
}

// Who closes first is who said so. Of a backend that says nothing of it, it is
// awaited for a moment only: 10,000 of them would have all files of checks. One
// that has closed needs no farewell.
func TestHTTPGoesByWhatTheBackendSaysOfTheClose(t *testing.T) {
	for name, c := range map[string]struct {
		header    string
		waits     time.Duration
		farewells int
	}{
		"closes": {"Connection: close\r\n", lingerTime, 0},
		"stays":  {"", lingerTime / 10, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(conn net.Conn) {
				r := bufio.NewReader(conn)
				_, _ = http.ReadRequest(r)
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"+c.header+"\r\n")
				if c.farewells > 0 {
					_, _ = r.ReadByte()
				}
			})
			target := s.target()
			dial := target.Dial
			var told *patient
			target.Dial = func(ctx context.Context) (net.Conn, error) {
				conn, err := dial(ctx)
				told = &patient{TCPConn: conn.(*net.TCPConn)}
				return told, err
			}
			require.NoError(t, Run(t.Context(), provisioned(t, new(HTTP)), Wire{}, target))
			require.InDelta(t, c.waits, told.waits, float64(c.waits)/2)
			require.Equal(t, c.farewells, told.farewells)
		})
	}
}

// patient tells how long somebody was to wait for the other side, and whether he
// took his leave. He never waits for longer than it takes to see that nothing comes.
type patient struct {
	*net.TCPConn
	waits     time.Duration
	farewells int
}

func (p *patient) SetReadDeadline(at time.Time) error {
	p.waits = time.Until(at)
	if p.waits < lingerTime/2 {
		at = time.Now()
	}
	return p.TCPConn.SetReadDeadline(at)
}

func (p *patient) CloseWrite() error {
	p.farewells++
	return errors.Join(p.TCPConn.SetReadDeadline(time.Time{}), p.TCPConn.CloseWrite())
}

// A body is looked at up to 64 KB, whatever its chunks take besides and however
// long it is.
func TestHTTPOfALongBody(t *testing.T) {
	for name, chunk := range map[string]int{"large chunks": 40 << 10, "small chunks": 4} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(c net.Conn) {
				_, _ = http.ReadRequest(bufio.NewReader(c))
				w := bufio.NewWriterSize(c, 2<<10)
				_, _ = io.WriteString(w, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
				_ = w.Flush() // a segment of its own
				_, _ = io.WriteString(w, "5\r\nready\r\n")
				for range (100 << 10) / chunk {
					_, _ = fmt.Fprintf(w, "%x\r\n%s\r\n", chunk, strings.Repeat("x", chunk))
				}
				_, _ = io.WriteString(w, "0\r\n\r\n")
				_ = w.Flush()
			})
			require.NoError(t, s.check(t, provisioned(t, &HTTP{ExpectBody: "^ready"}), Wire{}))
		})
	}
}

// One that trickles has the time of the check, and no more.
func TestHTTPOfABackendThatTrickles(t *testing.T) {
	s := serve(t, func(c net.Conn) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(c, "X-%d: y\r\n", i); err != nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	err := s.checkWithin(t, 50*time.Millisecond, provisioned(t, new(HTTP)), Wire{})
	require.ErrorContains(t, err, "no HTTP response: i/o timeout")
}

func TestHTTPRefuses(t *testing.T) {
	for want, c := range map[string]HTTP{
		"did you mean /x?":                   {URI: "http://a/x"},
		"want a path without scheme":         {URI: "//a/x"},
		"want a path such as /healthz":       {URI: "healthz"},
		"want a path, and a query at most":   {URI: "/a#b"},
		"want a method such as":              {Method: "GE T"},
		"want a status from":                 {ExpectStatus: 99},
		"want a name of letters":             {Headers: http.Header{"A:": nil}},
		"it is the check's own to say":       {Headers: http.Header{"content-length": {"1"}}},
		"want printable characters in UTF-8": {Headers: http.Header{"A": {"b\r\nC: d"}}},
		"want a regular expression":          {ExpectBody: "["},
		"a response to HEAD has no body":     {Method: "HEAD", ExpectBody: "x"},
	} {
		require.ErrorContains(t, c.Provision(caddy.Context{}), want)
	}
}
