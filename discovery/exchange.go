package discovery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/miekg/dns"
)

// udpSize is what servers may send in one packet. Larger ones get lost in pieces
// on some paths: dnsflagday.net/2020.
const udpSize = 1232

var errTruncated = errors.New("the answer is truncated, also over TCP")

// exchange puts a question to a server: over UDP, and again over TCP where the
// answer doesn't fit a packet. Each way has its timeout.
func exchange(ctx context.Context, server string, question *dns.Msg, timeout time.Duration) (*dns.Msg, error) {
	answer, err := transfer(ctx, "udp", server, question, timeout)
	if err != nil || !answer.Truncated {
		return answer, err
	}
	answer, err = transfer(ctx, "tcp", server, question, timeout)
	switch {
	case err != nil:
		return nil, fmt.Errorf("over TCP, as the answer is too long for UDP: %w", err)
	case answer.Truncated:
		return nil, errTruncated
	}
	return answer, nil
}

// transfer is one way of exchange. The time limit is of the whole of it, so that
// a server that trickles gains nothing.
func transfer(ctx context.Context, network, server string, question *dns.Msg, timeout time.Duration) (*dns.Msg, error) {
	packed, err := question.Pack()
	if err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	answer, err := converse(limited, network, server, question, packed)
	if err == nil {
		return answer, nil
	}
	if limited.Err() != nil && ctx.Err() == nil {
		silent := &silentError{after: timeout}
		_ = errors.As(err, &silent.came)
		return nil, silent
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err // without this side's port, which is another one each time
	}
	return nil, err
}

// silentError is that of a server without an answer in time.
type silentError struct {
	after time.Duration
	came  noAnswer // what came last; empty = nothing
}

func (e *silentError) Error() string {
	if e.came != "" {
		return fmt.Sprintf("no answer within %s, what came is %s", e.after, e.came)
	}
	return fmt.Sprintf("no answer within %s", e.after)
}

// noAnswer says what a message is that is no answer to the question.
type noAnswer string

func (e noAnswer) Error() string { return string(e) }

func converse(ctx context.Context, network, server string, question *dns.Msg, packed []byte) (*dns.Msg, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if network == "tcp" {
		return converseStream(c, question, packed)
	}
	return conversePackets(c, question, packed)
}

// conversePackets waits for the packet that is the answer. Anyone can send
// others, so those end nothing.
func conversePackets(c net.Conn, question *dns.Msg, packed []byte) (*dns.Msg, error) {
	if _, err := c.Write(packed); err != nil {
		return nil, err
	}
	buf := make([]byte, dns.MaxMsgSize)
	var wrong error
	for {
		n, err := c.Read(buf)
		if err != nil {
			return nil, errors.Join(err, wrong)
		}
		answer, err := parseAnswer(question, buf[:n])
		if err == nil {
			return answer, nil
		}
		wrong = err
	}
}

func converseStream(c net.Conn, question *dns.Msg, packed []byte) (*dns.Msg, error) {
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(packed))), packed...)); err != nil {
		return nil, err
	}
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, buf); err != nil {
		return nil, err
	}
	return parseAnswer(question, buf)
}

// parseAnswer returns the message if it is the answer to the question.
func parseAnswer(question *dns.Msg, packed []byte) (*dns.Msg, error) {
	answer := new(dns.Msg)
	if answer.Unpack(packed) != nil {
		return nil, noAnswer("no DNS message")
	}
	switch asked := question.Question[0]; {
	case !answer.Response || answer.Opcode != dns.OpcodeQuery || answer.Id != question.Id:
		return nil, noAnswer("the answer to another question")
	case len(answer.Question) == 0 && !ofTheName(answer.Rcode):
		return answer, nil // it may not even have read the question
	case len(answer.Question) != 1 || answer.Question[0].Qtype != asked.Qtype || answer.Question[0].Qclass != asked.Qclass ||
		dns.CanonicalName(answer.Question[0].Name) != dns.CanonicalName(asked.Name):
		return nil, noAnswer("the answer to another question")
	}
	return answer, nil
}

// ofTheName is for codes that say something of the name, others do of the server.
func ofTheName(rcode int) bool {
	return rcode == dns.RcodeSuccess || rcode == dns.RcodeNameError
}
