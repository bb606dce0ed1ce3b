package tcplb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// The kinds of connections in the soak; the byte is a client's first. A backend
// answers it with its number before all else.
const (
	soakShort    = 'n' // answered and closed
	soakStream   = 's' // everything is sent back
	soakRequest  = 'h' // read to its end, then answered with its sum
	soakDownload = 'd' // a size, then so much back
	soakReset    = 'r' // answered and reset
	soakAbort    = 'a' // a stream that the client resets
	soakLeave    = 'l' // says nothing and is gone

	// At the port for those who stall.
	soakBulk   = 'D' // a download
	soakUpload = 'u' // not read for a while, then to its end, and answered with its sum
)

var soakKinds = []byte{soakShort, soakShort, soakShort, soakStream, soakRequest, soakDownload, soakReset, soakAbort, soakLeave}

// soakClient is one connection from the client's side.
type soakClient struct {
	rnd     *rand.Rand
	kind    byte
	backend int // its number; -1 = not known yet
	conn    *net.TCPConn
	record  soakRecord
}

// run makes the connection and checks all it gets. An end of file that comes too
// early is an io.ErrUnexpectedEOF.
func (c *soakClient) run(lb string) error {
	conn, err := net.DialTimeout("tcp", lb, hangTimeout)
	if err != nil {
		return fmt.Errorf("connecting: %w", err)
	}
	defer conn.Close()
	c.conn = conn.(*net.TCPConn)
	arrive(conn)
	c.record = soakRecord{client: conn.LocalAddr().String()}
	_ = conn.SetDeadline(time.Now().Add(hangTimeout))
	if c.kind == soakLeave {
		return c.leave()
	}
	if err := c.write([]byte{c.kind}); err != nil {
		return err
	}
	id, err := c.read(1)
	if err != nil {
		return err
	}
	c.backend = int(id[0])
	switch c.kind {
	case soakShort:
		return c.short()
	case soakStream:
		return c.stream()
	case soakRequest:
		return c.request()
	case soakDownload:
		return c.download()
	case soakReset:
		return c.untilReset()
	default:
		return c.abort()
	}
}

func (c *soakClient) write(p []byte) error {
	n, err := c.conn.Write(p)
	c.record.received += uint64(n)
	return err
}

func (c *soakClient) read(n int) ([]byte, error) {
	p := make([]byte, n)
	n, err := io.ReadFull(c.conn, p)
	c.record.sent += uint64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

// end checks that the stream ends here.
func (c *soakClient) end(why reason) error {
	c.record.why = why
	n, err := io.Copy(io.Discard, c.conn)
	if err == nil && n > 0 {
		return fmt.Errorf("%d bytes too many", n)
	}
	return err
}

func (c *soakClient) short() error {
	text, err := c.read(2)
	if err != nil {
		return err
	}
	if string(text) != "ok" {
		return fmt.Errorf("got %q", text)
	}
	return c.end(reasonBackendClosed)
}

// exchange sends some random bytes, a little or a lot, and has them back.
func (c *soakClient) exchange() error {
	p := make([]byte, 1+c.rnd.IntN(1<<(1+c.rnd.IntN(17))))
	source := &pattern{seed: byte(c.rnd.Uint32())}
	_, _ = source.Read(p)
	if err := c.write(p); err != nil {
		return err
	}
	back, err := c.read(len(p))
	if err == nil && string(back) != string(p) {
		err = errors.New("what came back is not what was sent")
	}
	return err
}

func (c *soakClient) stream() error {
	for range c.rnd.IntN(20) {
		if err := c.exchange(); err != nil {
			return err
		}
		if c.rnd.IntN(4) == 0 {
			time.Sleep(time.Duration(c.rnd.IntN(50)) * time.Millisecond)
		}
	}
	_ = c.conn.CloseWrite() // if it can't, end or read says why
	return c.end(reasonClientClosed)
}

func (c *soakClient) request() error {
	size := int64(c.rnd.IntN(1 << 20))
	seed := byte(c.rnd.Uint32())
	n, err := io.CopyN(c.conn, &pattern{seed: seed}, size)
	c.record.received += uint64(n)
	if err != nil {
		return err
	}
	_ = c.conn.CloseWrite() // if it can't, end or read says why
	var want hashing
	_, _ = io.CopyN(&want, &pattern{seed: seed}, size)
	sum, err := c.read(4)
	if err != nil {
		return err
	}
	if binary.BigEndian.Uint32(sum) != want.sum {
		return errors.New("the backend got something else")
	}
	return c.end(reasonClientClosed)
}

func (c *soakClient) download() error {
	size := uint32(c.rnd.IntN(1 << 20))
	if err := c.write(binary.BigEndian.AppendUint32(nil, size)); err != nil {
		return err
	}
	body, err := c.read(int(size))
	if err != nil {
		return err
	}
	var got, want hashing
	_, _ = got.Write(body)
	_, _ = io.CopyN(&want, &pattern{seed: byte(c.backend)}, int64(size))
	if got != want {
		return errors.New("got something else")
	}
	return c.end(reasonBackendClosed)
}

// untilReset expects the reset after the bytes that came before it.
func (c *soakClient) untilReset() error {
	text, err := c.read(3)
	if err != nil {
		return err
	}
	if string(text) != "bye" {
		return fmt.Errorf("got %q", text)
	}
	switch err := c.end(reasonBackendReset); {
	case err == nil:
		return fmt.Errorf("no reset: %w", io.ErrUnexpectedEOF)
	case relay.IsReset(err):
		return nil
	default:
		return err
	}
}

// leave is gone before anything is said, in order or not.
func (c *soakClient) leave() error {
	c.record.aborted = true
	pause(time.Duration(c.rnd.IntN(10))*time.Millisecond, nil)
	if c.rnd.IntN(2) == 0 {
		return c.conn.SetLinger(0)
	}
	return nil
}

func (c *soakClient) abort() error {
	for range c.rnd.IntN(3) {
		if err := c.exchange(); err != nil {
			return err
		}
	}
	if err := c.write(make([]byte, c.rnd.IntN(1<<17))); err != nil {
		return err
	}
	c.record.aborted = true
	return c.conn.SetLinger(0)
}
