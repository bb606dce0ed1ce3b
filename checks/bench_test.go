package checks

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkCheck is one check, with the backend's side of it, on loopback.
func BenchmarkCheck(b *testing.B) {
	for name, c := range map[string]struct {
		check  Check
		answer func(net.Conn)
	}{
		"connect": {Connect{}, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }},
		"http": {provisioned(b, &HTTP{URI: "/primary", ExpectBody: "ok"}), func(c net.Conn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		}},
		"dialogue": {provisioned(b, &Dialogue{Steps: steps(`PING\r\n`, "<+PONG")}), func(c net.Conn) {
			if _, err := bufio.NewReader(c).ReadString('\n'); err == nil {
				_, _ = io.WriteString(c, "+PONG\r\n")
			}
		}},
	} {
		b.Run(name, func(b *testing.B) {
			s := serve(b, c.answer)
			b.ReportAllocs()
			for b.Loop() {
				require.NoError(b, s.check(b, c.check, Wire{}))
			}
		})
	}
}
