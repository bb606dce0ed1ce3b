package secure

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// hangTimeout bounds every wait of the tests. It is no measure of speed.
const hangTimeout = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func certificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// tcpPair returns both ends of a loopback connection.
func tcpPair(t testing.TB) (one, other *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	b, err := ln.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// connected returns a Conn and the server's end of it, whose socket is behind a
// trickle if there is to be one.
func connected(t testing.TB, config *tls.Config, trickles bool) (*Conn, *tls.Conn) {
	t.Helper()
	socket, far := tcpPair(t)
	var under net.Conn = far
	if trickles {
		under = trickle{far}
	}
	server := tls.Server(under, &tls.Config{Certificates: []tls.Certificate{certificate(t)}, DynamicRecordSizingDisabled: true})
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	config.InsecureSkipVerify = true
	c, err := Client(context.Background(), socket, config, time.Now().Add(hangTimeout), NewLine(one).Join())
	require.NoError(t, err)
	require.NoError(t, <-done)
	require.NoError(t, socket.SetDeadline(time.Now().Add(hangTimeout)))
	require.NoError(t, far.SetDeadline(time.Now().Add(hangTimeout)))
	return c, server
}

// trickle writes byte by byte.
type trickle struct{ net.Conn }

func (c trickle) Write(b []byte) (n int, err error) {
	for i := range b {
		if _, err := c.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

func expect(t testing.TB, r io.Reader, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := io.ReadFull(r, got)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

// Whatever way the bytes come in, they are all there; also where a renegotiation,
// which is never, could need to wait.
func TestConnReads(t *testing.T) {
	for name, config := range map[string]*tls.Config{"lazily": {}, "as it may have to wait": {Renegotiation: tls.RenegotiateOnceAsClient}} {
		for _, trickles := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				c, server := connected(t, config, trickles)
				data := make([]byte, 100<<10)
				_, _ = rand.Read(data)
				go func() { // ends with what it writes
					_, _ = server.Write(data)
					_ = server.CloseWrite()
				}()
				expect(t, c, data)
				_, err := c.Read(make([]byte, 1))
				require.Equal(t, io.EOF, err)
				require.True(t, c.Complete())
				require.NoError(t, c.Failure())
				require.NoError(t, c.CloseWrite())
				_, err = server.Read(make([]byte, 1))
				require.Equal(t, io.EOF, err)
				require.NoError(t, c.Close())
			})
		}
	}
}

// kept is how much crypto/tls has room for.
func kept(c *Conn) int {
	at := unsafe.Pointer(c.tls)
	return (*bytes.Buffer)(unsafe.Add(at, rawInput)).Cap() + (*bytes.Buffer)(unsafe.Add(at, hand)).Cap()
}

// awaiting runs f while c is waited for by another goroutine.
func awaiting(t *testing.T, c *Conn, f func()) {
	t.Helper()
	for {
		n, err := c.ReadReady(make([]byte, 1))
		require.NoError(t, err)
		require.Zero(t, n)
		if !c.mayHave {
			break
		}
	}
	waited := make(chan error, 1)
	go func() { waited <- c.Await() }()
	f()
	require.NoError(t, <-waited)
}

func TestIdleConnKeepsNothing(t *testing.T) {
	require.True(t, canShed, "this Go keeps its buffers elsewhere")
	if !canWait {
		t.Skip("reads wait with a buffer in hand here")
	}
	c, server := connected(t, new(tls.Config), false)
	record := make([]byte, 16<<10)
	_, err := server.Write(record)
	require.NoError(t, err)
	expect(t, c, record)
	require.Greater(t, kept(c), len(record), "or there is nothing to give back")
	awaiting(t, c, func() {
		c.Shed()
		require.Zero(t, kept(c))
		_, err := server.Write(record)
		require.NoError(t, err)
	})
	expect(t, c, record)
}

// A record of which a part has come is waited for as it is.
func TestShedAmidARecord(t *testing.T) {
	if !canWait {
		t.Skip("reads wait with a buffer in hand here")
	}
	c, server := connected(t, new(tls.Config), false)
	far := server.NetConn().(*net.TCPConn)
	record := sealed(t, server, []byte("a record in two parts"))
	_, err := far.Write(record[:len(record)/2])
	require.NoError(t, err)
	require.NoError(t, c.Await())
	awaiting(t, c, func() {
		c.Shed()
		_, err := far.Write(record[len(record)/2:])
		require.NoError(t, err)
	})
	expect(t, c, []byte("a record in two parts"))
}

// sealed returns what the server would write. Its socket is swapped for the time.
func sealed(t *testing.T, server *tls.Conn, text []byte) []byte {
	t.Helper()
	field := (*net.Conn)(unsafe.Pointer(server)) // the first of a tls.Conn
	real, caught := *field, &caught{Conn: *field}
	*field = caught
	_, err := server.Write(text)
	*field = real
	require.NoError(t, err)
	return caught.Bytes()
}

type caught struct {
	net.Conn
	bytes.Buffer
}

func (c *caught) Write(b []byte) (int, error) { return c.Buffer.Write(b) }
func (c *caught) Read(b []byte) (int, error)  { return c.Conn.Read(b) }

func TestHandshakeEnds(t *testing.T) {
	t.Run("at its deadline", func(t *testing.T) {
		socket, _ := tcpPair(t)
		_, err := Client(context.Background(), socket, &tls.Config{InsecureSkipVerify: true}, time.Now().Add(time.Millisecond), NewLine(one).Join())
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	})
	t.Run("with its context", func(t *testing.T) {
		socket, _ := tcpPair(t)
		ctx, cancel := context.WithCancelCause(context.Background())
		why := errors.New("enough")
		time.AfterFunc(time.Millisecond, func() { cancel(why) })
		_, err := Client(ctx, socket, &tls.Config{InsecureSkipVerify: true}, time.Time{}, NewLine(one).Join())
		require.ErrorIs(t, err, why)
	})
}

// A peer whose buffers are full can't hold back who closes.
func TestCloseDoesNotWait(t *testing.T) {
	c, _ := connected(t, new(tls.Config), false)
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(50*time.Millisecond)))
	_, err := c.NetConn().Write(make([]byte, 64<<20)) // past crypto/tls, which would not write again
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, c.SetWriteDeadline(time.Time{}))
	began := time.Now()
	_ = c.Close()
	require.Less(t, time.Since(began), 4*time.Second, "crypto/tls would wait for 5")
}
