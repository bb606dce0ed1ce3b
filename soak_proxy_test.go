package tcplb

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"sync"

	"github.com/pires/go-proxyproto"
)

// soakHeaders are how connections of the main pool may begin; those of the clients
// that stall all begin with a PROXY header.
var soakHeaders = []string{"off", "v1", "v2"}

const stallHeader = `"proxy_protocol":"v2",`

// soakArrivals has who has connected, and where to.
var soakArrivals sync.Map

// arrive notes a client, before it says anything.
func arrive(c net.Conn) {
	soakArrivals.Store(arrival{c.LocalAddr().String(), c.RemoteAddr().String()}, true)
}

type arrival struct{ client, to string }

// greet reads the kind of a connection, and before it the PROXY header, if there is
// one, and a TLS handshake, if the backend speaks that. It reads no byte more, and
// returns what to go on with; nil where there is no kind.
func (b *soakBackend) greet(socket net.Conn) (kind byte, c net.Conn) {
	raw := make([]byte, 1)
	if _, err := io.ReadFull(socket, raw); err != nil {
		return 0, nil
	}
	var header *proxyproto.Header
	c = &unread{Conn: socket, first: raw}
	if version := map[byte]byte{'P': 1, '\r': 2}[raw[0]]; version != 0 {
		whole, err := readHeader(socket, raw, version)
		if err != nil {
			return 0, nil // the backend was killed
		}
		if header, err = proxyproto.Read(bufio.NewReader(bytes.NewReader(whole))); err != nil {
			b.findings.add("backend %d: PROXY header %q: %v", b.id, whole, err)
			return 0, nil
		}
		c = socket
	}
	if b.secure != nil {
		c = tls.Server(c, b.secure)
	}
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		return 0, nil // as that of a check, or of a client that has nothing to say
	}
	b.requireHeader(first[0], header)
	if u, ok := c.(*unread); ok {
		c = u.Conn // the byte has been read
	}
	return first[0], c
}

// unread is a connection of which some bytes were read.
type unread struct {
	net.Conn
	first []byte
}

func (u *unread) Read(b []byte) (int, error) {
	if len(u.first) > 0 {
		n := copy(b, u.first)
		u.first = u.first[n:]
		return n, nil
	}
	return u.Conn.Read(b)
}

// readHeader reads the rest of a header that begins with raw.
func readHeader(c net.Conn, raw []byte, version byte) ([]byte, error) {
	more := func(n int) error {
		part := make([]byte, n)
		_, err := io.ReadFull(c, part)
		raw = append(raw, part...)
		return err
	}
	if version == 1 {
		for raw[len(raw)-1] != '\n' {
			if err := more(1); err != nil {
				return nil, err
			}
		}
		return raw, nil
	}
	if err := more(15); err != nil {
		return nil, err
	}
	err := more(int(binary.BigEndian.Uint16(raw[14:])))
	return raw, err
}

// requireHeader checks that the header, nil if there was none, is of a client that
// has come, to where the balancer says.
func (b *soakBackend) requireHeader(kind byte, h *proxyproto.Header) {
	stalls := kind == soakBulk || kind == soakUpload
	switch {
	case h == nil && stalls:
		b.findings.add("backend %d: a connection of kind %c without a PROXY header", b.id, kind)
	case h == nil: // the config may have it so
	case h.SourceAddr == nil || h.DestinationAddr == nil:
		b.findings.add("backend %d: a PROXY header without a client, before a byte of one", b.id)
	default:
		who := arrival{h.SourceAddr.String(), h.DestinationAddr.String()}
		if _, ok := soakArrivals.Load(who); !ok {
			b.findings.add("backend %d: a PROXY header of %s at %s, who has not come", b.id, who.client, who.to)
		}
	}
}
