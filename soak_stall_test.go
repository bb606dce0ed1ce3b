package tcplb

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/relay"
)

// The clients that stall have a pool of their own, whose idle timeout is within
// the time for which they do.
const (
	stallPool    = "stalls"
	stallTimeout = 300 * time.Millisecond
	stallSize    = 16 << 20 // more than all the buffers on the way
)

// Some of them reach their age before that.
var stallOptions = fmt.Sprintf(`"idle_timeout":%q,"max_lifetime":"400ms","max_lifetime_spread":50,`, stallTimeout)

// stallCounts is what became of them.
type stallCounts struct {
	completed, cut, silent atomic.Int64
	early                  atomic.Int64 // cut ahead of the handler
}

func (n *stallCounts) total() int {
	return int(n.completed.Load() + n.cut.Load() + n.silent.Load())
}

func (n *stallCounts) log(t testing.TB) {
	t.Logf("of those who stalled, %d went on to the end and %d were cut, as were %d who said nothing, and %d who said too little to reach a pool",
		n.completed.Load(), n.cut.Load(), n.silent.Load(), n.early.Load())
}

// stall makes one connection that has to end all the same: by its idle timeout,
// with a reset, or in order if whoever stalled goes on in time.
func (s *soak) stall(rnd *rand.Rand) {
	c := &soakClient{rnd: rnd}
	conn, err := net.DialTimeout("tcp", s.stalls, hangTimeout)
	if relay.IsReset(err) { // with its backend, before the client came to know that it was connected
		s.stalled.cut.Add(1)
		return
	}
	if err != nil {
		s.add("connecting: %v", err)
		return
	}
	defer conn.Close()
	arrive(conn)
	c.conn = conn.(*net.TCPConn)
	_ = conn.SetDeadline(time.Now().Add(hangTimeout))
	kind, count := "a download nobody reads", &s.stalled.completed
	switch rnd.IntN(3) {
	case 0:
		err = c.stalledDownload()
	case 1:
		kind, err = "an upload nobody reads", c.stalledUpload()
	default:
		kind, count = "silence", &s.stalled.silent
		if _, err = io.ReadFull(c.conn, make([]byte, 1)); relay.IsReset(err) {
			err = nil
		}
	}
	if relay.IsReset(err) && !errors.Is(err, io.ErrUnexpectedEOF) {
		count, err = &s.stalled.cut, nil
	}
	count.Add(1)
	if err != nil {
		s.add("%s: %v", kind, err)
	}
}

// stalledDownload reads nothing for a while, and then all.
func (c *soakClient) stalledDownload() error {
	if err := c.write(binary.BigEndian.AppendUint32([]byte{soakBulk}, stallSize)); err != nil {
		return err
	}
	pause(rand.N(2*stallTimeout), nil)
	id, err := c.read(1)
	if err != nil {
		return err
	}
	body, err := c.read(stallSize)
	if err != nil {
		return err
	}
	var got, want hashing
	_, _ = got.Write(body)
	_, _ = io.CopyN(&want, &pattern{seed: id[0]}, stallSize)
	if got != want {
		return errors.New("got something else")
	}
	return c.end(reasonBackendClosed)
}

// stalledUpload sends what the backend will not read for a while.
func (c *soakClient) stalledUpload() error {
	if err := c.write([]byte{soakUpload}); err != nil {
		return err
	}
	seed := byte(c.rnd.Uint32())
	if _, err := io.CopyN(c.conn, &pattern{seed: seed}, stallSize); err != nil {
		return err
	}
	_ = c.conn.CloseWrite() // if it can't, read says why
	if _, err := c.read(1); err != nil {
		return err
	}
	sum, err := c.read(4)
	if err != nil {
		return err
	}
	var want hashing
	_, _ = io.CopyN(&want, &pattern{seed: seed}, stallSize)
	if binary.BigEndian.Uint32(sum) != want.sum {
		return errors.New("the backend got something else")
	}
	return c.end(reasonClientClosed)
}

// beSilent connects to a port that wants to know first what the client speaks,
// and says nothing or the least that is no answer to that.
func (s *soak) beSilent(rnd *rand.Rand) {
	conn, err := net.DialTimeout("tcp", s.silences, hangTimeout)
	if relay.IsReset(err) {
		s.stalled.early.Add(1)
		return
	}
	if err != nil {
		s.add("connecting: %v", err)
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(hangTimeout))
	if rnd.IntN(2) == 0 {
		_, err = conn.Write([]byte{22}) // of a TLS hello
	}
	s.stalled.early.Add(1)
	if err == nil { // else it has been told of the reset, once for all
		_, err = io.ReadFull(conn, make([]byte, 1))
	}
	if !relay.IsReset(err) {
		s.add("silence ahead of the handler: %v", err)
	}
}
