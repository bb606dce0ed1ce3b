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

	"golang.org/x/sys/unix"
)

// held is what connections hold while nothing happens: for each, bytes and
// files of the balancer, and bytes of the kernel. Of all, it is how many answered
// in the end.
type held struct{ resident, kernel, files, answering float64 }

// mostHeld is how many connections can be held: each takes two files of the
// balancer, and the balancers set some aside.
func mostHeld() int {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return clients
	}
	return max(clients, int(min(limit.Max, 1<<20)/2)-100)
}

// idle opens n connections and has one message back on each, and another one
// when all of them have been held. The first quarter is not measured: it takes
// what the process had to spare since its start, which would hide what small
// connections cost.
func idle(p *process, address string, n int, failed *atomic.Int64) (held, error) {
	message := make([]byte, messageSize)
	answers := func(c net.Conn) bool {
		_ = c.SetDeadline(time.Now().Add(patience))
		if trip(c, message) != nil {
			failed.Add(1)
			return false
		}
		return true
	}
	return hold(p, address, n/4, n, func(c net.Conn) { answers(c) }, answers)
}

// stick opens n connections to a backend that sends all it can, and reads
// nothing of it. Of the kernel's memory, that at the clients' and the backends'
// ends is counted, too.
func stick(p *process, address string, n int) (held, error) {
	return hold(p, address, 0, n, func(net.Conn) {}, func(net.Conn) bool { return true })
}

// hold opens n connections, and measures what those after the first so many
// hold.
func hold(p *process, address string, first, n int, begin func(net.Conn), answers func(net.Conn) bool) (h held, err error) {
	var before held
	conns := make([]net.Conn, 0, n)
	for i := range n {
		if i == first {
			time.Sleep(settle)
			if before, err = p.holds(); err != nil {
				return held{}, err
			}
		}
		c, err := net.Dial("tcp", address)
		if err != nil {
			return held{}, fmt.Errorf("opening connections to hold: %w", err)
		}
		defer c.Close()
		begin(c)
		conns = append(conns, c)
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
	each := float64(n - first)
	h = held{
		resident: (after.resident - before.resident) / each,
		kernel:   (after.kernel - before.kernel) / each,
		files:    (after.files - before.files) / each,
	}
	for _, c := range conns {
		if answers(c) {
			h.answering++
		}
	}
	return h, err
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
