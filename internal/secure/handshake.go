package secure

import (
	"context"
	"crypto/tls"
	"net"
	"time"
)

// handshake is a gate's while that is being made. It has its place in line but
// for the time that the peer takes.
type handshake struct {
	ctx      context.Context
	turn     *Turn
	socket   net.Conn
	deadline time.Time // the peer's; zero = none
}

// shake makes the first handshake.
func (g *gate) shake(conn *tls.Conn, h *handshake) error {
	if err := h.resume(); err != nil {
		return err
	}
	defer h.turn.Give()
	g.shaking = h
	defer func() { g.shaking = nil }()
	return conn.Handshake()
}

// resume waits for a place. That is no time of the peer's.
func (h *handshake) resume() error {
	before := h.turn.Waited()
	if err := h.turn.Take(h.ctx); err != nil {
		return err
	}
	waited := h.turn.Waited() - before
	if waited == 0 || h.deadline.IsZero() {
		return nil
	}
	h.deadline = h.deadline.Add(waited)
	if err := h.socket.SetDeadline(h.deadline); err != nil {
		return err
	}
	if h.ctx.Err() != nil { // which may have set another one before
		return context.Cause(h.ctx)
	}
	return nil
}

func (h *handshake) read(b []byte) (int, error) {
	h.turn.Give()
	n, err := h.socket.Read(b)
	if err != nil {
		return n, err
	}
	return n, h.resume()
}

func (h *handshake) write(b []byte) (int, error) {
	h.turn.Give()
	return h.socket.Write(b)
}
