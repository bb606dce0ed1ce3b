package relay

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
)

// loadEnv has this binary be the clients and backends of a benchmark, so that the
// processor time of this process is the relays' alone: kind, connections, and the
// two addresses.
const loadEnv = "RELAY_TEST_LOAD"

// runLoad makes load until its input ends, and prints how many units it moved.
func runLoad(spec string) {
	f := strings.Fields(spec)
	n, _ := strconv.Atoi(f[1])
	var units atomic.Uint64
	for range n {
		client, err := net.Dial("tcp", f[2])
		if err != nil {
			panic(err)
		}
		backend, err := net.Dial("tcp", f[3])
		if err != nil {
			panic(err)
		}
		switch f[0] {
		case "roundtrip":
			go func() { _, _ = io.Copy(backend, struct{ io.Reader }{backend}) }()
			go func() {
				message := make([]byte, 64)
				for err := error(nil); err == nil; units.Add(1) {
					_, _ = client.Write(message)
					_, err = io.ReadFull(client, message)
				}
			}()
		case "bulk":
			go func() {
				zeros := make([]byte, 1<<20)
				for err := error(nil); err == nil; {
					_, err = backend.Write(zeros)
				}
			}()
			go func() {
				buf := make([]byte, 256<<10)
				for err := error(nil); err == nil; {
					var m int
					m, err = client.Read(buf)
					units.Add(uint64(m))
				}
			}()
		}
	}
	var line string
	for {
		if _, err := fmt.Scanln(&line); err != nil {
			return
		}
		fmt.Println(units.Load())
	}
}
