package tcplb

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// tlsRelayed is a client whose connection has got to a backend that speaks TLS.
func tlsRelayed(t *testing.T, options string, config *tls.Config, handle func(*tls.Conn)) (client *net.TCPConn, s *server) {
	t.Helper()
	watchLeftovers(t)
	a := newIssuer(t)
	s = a.server(t, config, handle)
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, fmt.Sprintf(`{%s,%s,%s%s}`, backendsJSON(s.address), a.trusted(""), uncheckedJSON, options)))
	return dialClient(t, lb), s
}

func socketOf(c *tls.Conn) *net.TCPConn { return c.NetConn().(*net.TCPConn) }

// Either side's end is passed on, and the other way goes on.
func TestTLSHalfClose(t *testing.T) {
	t.Run("of the client", func(t *testing.T) {
		var err error
		c, s := tlsRelayed(t, "", nil, func(c *tls.Conn) {
			var b []byte
			if b, err = io.ReadAll(c); err == nil {
				_, err = socketOf(c).Read(make([]byte, 1)) // TCP's own end is there, too
				_, _ = fmt.Fprintf(c, "got %s", b)
				_ = c.CloseWrite()
			}
		})
		write(t, c, "question")
		require.NoError(t, c.CloseWrite())
		got, readErr := io.ReadAll(c)
		require.NoError(t, readErr)
		require.Equal(t, "got question", string(got))
		require.Equal(t, io.EOF, err)
		requireBooksBalance(t, 1)
		require.EqualValues(t, 1, closedFor(t, s, reasonClientClosed))
	})
	t.Run("of the backend", func(t *testing.T) {
		said := make(chan string, 1)
		c, s := tlsRelayed(t, "", nil, func(c *tls.Conn) {
			_, _ = io.WriteString(c, "all there is")
			_ = c.CloseWrite() // the alert alone, not TCP's end
			b, _ := io.ReadAll(c)
			said <- string(b)
		})
		got, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, "all there is", string(got))
		write(t, c, "still talking")
		require.NoError(t, c.CloseWrite())
		require.Equal(t, "still talking", <-said)
		requireBooksBalance(t, 1)
		require.EqualValues(t, 1, closedFor(t, s, reasonBackendClosed))
	})
}

// How a backend's stream ends, and what the client is told.
func TestTLSEndsOfTheBackend(t *testing.T) {
	const answer = "an answer"
	for name, c := range map[string]struct {
		end  func(*tls.Conn)
		why  reason
		lost bool // the client sees a reset
	}{
		"an alert and a reset": {func(c *tls.Conn) {
			_ = c.CloseWrite()
			_ = socketOf(c).SetLinger(0)
		}, reasonBackendClosed, false},
		"no alert, between two records": {func(c *tls.Conn) { _ = socketOf(c).Close() }, reasonBackendClosed, false},
		"within a record": {func(c *tls.Conn) {
			_, _ = socketOf(c).Write([]byte{23, 3, 3, 1, 0, 42})
			_ = socketOf(c).Close()
		}, reasonBackendReset, true},
		"a reset": {func(c *tls.Conn) {
			_ = socketOf(c).SetLinger(0)
			_ = socketOf(c).Close()
		}, reasonBackendReset, true},
		"nonsense": {func(c *tls.Conn) {
			_, _ = socketOf(c).Write([]byte("no TLS any more, though it began well"))
			_, _ = io.Copy(io.Discard, socketOf(c))
		}, reasonError, true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				got := make(chan bool)
				client, s := tlsRelayed(t, "", &tls.Config{MaxVersion: version}, func(conn *tls.Conn) {
					_, _ = io.WriteString(conn, answer)
					<-got
					c.end(conn)
				})
				expect(t, client, answer)
				close(got)
				if c.lost {
					expectReset(t, client)
				} else {
					expectEOF(t, client)
				}
				_ = client.Close()
				requireBooksBalance(t, 1)
				require.EqualValues(t, 1, closedFor(t, s, c.why))
				require.NoError(t, caddy.Stop())
			}
		})
	}
}

// A reset says nothing of TLS: the backend is not checked for it, nor is it an error.
func TestTLSResetsAreTCPs(t *testing.T) {
	watchLeftovers(t)
	a := newIssuer(t)
	var came atomic.Int64
	config := &tls.Config{Certificates: []tls.Certificate{a.issue(nil)}, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		if came.Add(1) > 2 {
			return nil, errors.New("one check and one client are all there is to come")
		}
		return nil, nil
	}}
	s := a.server(t, config, func(c *tls.Conn) {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return // the check
		}
		_, _ = io.WriteString(c, "an answer")
		_, _ = c.Read(make([]byte, 1)) // the client has it
		_ = socketOf(c).SetLinger(0)
		_ = socketOf(c).Close()
	})
	lb := freeAddress(t)
	runCaddy(t, lbConfig("tcp_lb/"+lb, fmt.Sprintf(`{%s,%s,"health_checks":{"active":{"interval":"1h","fast_interval":"1h"}}}`, backendsJSON(s.address), a.trusted(""))))
	checked(t)
	c := dialClient(t, lb)
	write(t, c, "x")
	expect(t, c, "an answer")
	write(t, c, "y")
	expectReset(t, c)
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, closedFor(t, s, reasonBackendReset))
	require.Empty(t, backendStatuses(t)[s.address].LastError)
}

// A client's reset must not look like an end to the backend.
func TestTLSResetOfTheClient(t *testing.T) {
	ended := make(chan error, 1)
	c, s := tlsRelayed(t, "", nil, func(c *tls.Conn) {
		_, err := io.ReadAll(c)
		ended <- err
	})
	write(t, c, "half a quest")
	eventually(t, func() bool { return metric(t, "received_bytes_total", nil) > 0 }, "it is relayed")
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	require.ErrorContains(t, <-ended, "reset")
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, closedFor(t, s, reasonClientReset))
}

// A backend that takes nothing holds back its client, and neither a cut nor an exit.
func TestTLSCutDoesNotWait(t *testing.T) {
	over := make(chan bool)
	c, _ := tlsRelayed(t, `,"drain_timeout":"0s"`, nil, func(*tls.Conn) { <-over })
	flood(t, c)
	sent := metric(t, "received_bytes_total", nil)
	require.Less(t, sent, float64(64<<20))
	require.NoError(t, caddy.Stop())
	expectReset(t, c)
	eventually(t, func() bool { return open.n.Load() == 0 }, "the end of it, while the backend still takes nothing")
	close(over)
}

// What a slow backend has yet to take is not cut short by the end of the stream.
func TestTLSEndWaitsForRoom(t *testing.T) {
	const size = 16 << 20
	begin, got := make(chan bool), make(chan int64, 1)
	c, s := tlsRelayed(t, "", nil, func(c *tls.Conn) {
		<-begin
		n, err := io.Copy(io.Discard, c)
		if err != nil {
			n = -1
		}
		got <- n
	})
	sent := make(chan bool)
	go func() { // ends with what it writes
		defer close(sent)
		_, _ = c.Write(make([]byte, size))
		_ = c.CloseWrite()
	}()
	close(begin)
	require.EqualValues(t, size, <-got)
	<-sent
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, closedFor(t, s, reasonClientClosed))
}

// A session ticket is no byte of a client's, and nothing else comes.
func TestTLSIdleTimeout(t *testing.T) {
	c, s := tlsRelayed(t, `,"idle_timeout":"50ms"`, nil, func(c *tls.Conn) { _, _ = io.Copy(io.Discard, c) })
	_, err := io.ReadAll(c)
	require.Error(t, err)
	requireBooksBalance(t, 1)
	require.EqualValues(t, 1, closedFor(t, s, reasonIdleTimeout))
}
