//go:build linux

package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// held is what connections hold while nothing happens: for each, bytes and
// files of the balancer, and bytes of the kernel.
type held struct{ resident, kernel, files float64 }

// idle opens n connections and has one message back on each.
func idle(p *process, address string, n int, failed *atomic.Int64) (held, error) {
	message := make([]byte, messageSize)
	return hold(p, address, n, func(c net.Conn) {
		if trip(c, message) != nil {
			failed.Add(1)
		}
	})
}

// stick opens n connections to a backend that sends all it can, and reads
// nothing of it. Of the kernel's memory, that at the clients' and the backends'
// ends is counted, too.
func stick(p *process, address string, n int) (held, error) {
	return hold(p, address, n, func(net.Conn) {})
}

func hold(p *process, address string, n int, begin func(net.Conn)) (held, error) {
	time.Sleep(settle)
	before, err := p.holds()
	if err != nil {
		return held{}, err
	}
	for range n {
		c, err := net.Dial("tcp", address)
		if err != nil {
			return held{}, fmt.Errorf("opening connections to hold: %w", err)
		}
		defer c.Close()
		begin(c)
	}
	after, err := p.holds()
	for range 100 { // until no more moves
		if err != nil {
			return held{}, err
		}
		last := after
		time.Sleep(settle)
		if after, err = p.holds(); after.kernel == last.kernel {
			break
		}
	}
	each := float64(n)
	return held{
		(after.resident - before.resident) / each,
		(after.kernel - before.kernel) / each,
		(after.files - before.files) / each,
	}, err
}

// holds returns what all of the process holds.
func (p *process) holds() (h held, err error) {
	if h.resident, err = p.resident(); err != nil {
		return h, err
	}
	if h.kernel, err = kernelMemory(); err != nil {
		return h, err
	}
	h.files, err = p.files()
	return h, err
}

// kernelMemory returns what TCP sockets of this network namespace hold, in bytes.
func kernelMemory() (float64, error) {
	b, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) > 0 && fields[0] == "TCP:" {
			pages, err := strconv.Atoi(fields[len(fields)-1])
			return float64(pages * os.Getpagesize()), err
		}
	}
	return 0, fmt.Errorf("no TCP in /proc/net/sockstat")
}

// slow reads so many bytes over many connections, each of them in pieces with
// pauses, as over a network that is slower than the backend's.
func slow(address string, volume int64, failed *atomic.Int64) {
	const connections, piece, pace = 64, 64 << 10, 20 * time.Millisecond
	_ = share(connections, connections, func(do func(func() error)) {
		buf := make([]byte, piece)
		do(func() error {
			c, err := net.Dial("tcp", address)
			if err != nil {
				failed.Add(1)
				return err
			}
			defer c.Close()
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for left := volume / connections; left > 0; left -= piece {
				if _, err := io.ReadFull(c, buf); err != nil {
					failed.Add(1)
					return err
				}
				<-tick.C
			}
			return nil
		})
	})
}
