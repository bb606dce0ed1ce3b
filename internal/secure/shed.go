package secure

import (
	"bytes"
	"crypto/tls"
	"reflect"
	"unsafe"
)

// crypto/tls keeps the buffer of its largest record for as long as the connection
// lives, 17 KB after one of full size, and has no way to tell it that it is idle.
// Its buffers are found by name and type here; where a Go has others, they stay.
var (
	rawInput, hasRawInput = fieldOf[bytes.Buffer]("rawInput") // records as received
	input, hasInput       = fieldOf[bytes.Reader]("input")    // plain text, in rawInput's memory
	hand, hasHand         = fieldOf[bytes.Buffer]("hand")     // messages of a handshake

	canShed = hasRawInput && hasInput && hasHand
)

func fieldOf[T any](name string) (offset uintptr, ok bool) {
	f, ok := reflect.TypeFor[tls.Conn]().FieldByName(name)
	return f.Offset, ok && f.Type == reflect.TypeFor[T]()
}

// shed drops the buffers that are empty. Nobody may be reading.
func (c *Conn) shed() {
	if !canShed {
		return
	}
	at := unsafe.Pointer(c.tls)
	raw, plain := (*bytes.Buffer)(unsafe.Add(at, rawInput)), (*bytes.Reader)(unsafe.Add(at, input))
	if raw.Len() == 0 && plain.Len() == 0 {
		*raw = bytes.Buffer{}
		plain.Reset(nil)
	}
	if messages := (*bytes.Buffer)(unsafe.Add(at, hand)); messages.Len() == 0 {
		*messages = bytes.Buffer{}
	}
}
