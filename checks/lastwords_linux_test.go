package checks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// late has a check begin when its backend has reset the connection.
type late struct {
	check     Check
	t         *testing.T
	connected chan<- struct{} // what the backend waits for; nil = for nothing
}

func (l late) Check(ctx context.Context, target Target) error {
	dial := target.Dial
	target.Dial = func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		if l.connected != nil {
			l.connected <- struct{}{}
		}
		bare := conn
		if secure, ok := bare.(*tls.Conn); ok {
			bare = secure.NetConn()
		}
		raw, err := bare.(*line).Conn.(*net.TCPConn).SyscallConn()
		require.NoError(l.t, err)
		require.NoError(l.t, raw.Control(func(fd uintptr) {
			for {
				_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, int(hangTimeout.Milliseconds()))
				if err != unix.EINTR {
					require.NoError(l.t, err)
					return
				}
			}
		}))
		return conn, nil
	}
	return l.check.Check(ctx, target)
}

// What a backend says before it resets is told of, not that a write failed.
func TestLastWords(t *testing.T) {
	cert, caFile := certificate(t, "127.0.0.1")
	connected := make(chan struct{})
	resets := func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0) }
	text := serve(t, func(c net.Conn) {
		<-connected
		_, _ = c.Write([]byte("421 too many connections\r\n"))
		resets(c)
	})
	silent := serve(t, func(c net.Conn) {
		<-connected
		resets(c)
	})
	strict := serve(t, func(c net.Conn) {
		_ = tls.Server(c, &tls.Config{
			Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: x509.NewCertPool(),
		}).Handshake()
		resets(c)
	})
	dialogue := provisioned(t, &Dialogue{Steps: []Step{{Send: "PING\r\n"}, {Expect: "+PONG"}}})
	request := provisioned(t, &HTTP{URI: "/"})
	secure := Wire{TLS: config(t, TLS{CARaw: []byte(`{"provider":"file","pem_files":["` + caFile + `"]}`)})}
	for name, tc := range map[string]struct {
		server *server
		check  Check
		wire   Wire
		want   string
	}{
		"text":         {text, dialogue, Wire{}, `step 1, sending: got "421 too many connections\r\n": write: connection reset by peer`},
		"nothing":      {silent, dialogue, Wire{}, "step 1, sending: write: connection reset by peer"},
		"alert":        {strict, dialogue, secure, "step 1, sending: remote error: tls: certificate required"},
		"HTTP, text":   {text, request, Wire{}, `sending the HTTP request: got "421 too many connections\r\n": write: connection reset by peer`},
		"HTTPS, alert": {strict, request, secure, "sending the HTTP request: remote error: tls: certificate required"},
	} {
		t.Run(name, func(t *testing.T) {
			l := late{check: tc.check, t: t}
			if tc.server != strict {
				l.connected = connected
			}
			require.EqualError(t, tc.server.check(t, l, tc.wire), tc.want)
		})
	}
}
