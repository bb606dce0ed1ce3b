//go:build linux

package main

import (
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	clients     = 32 // of short connections and of round trips
	streams     = 4  // of bulk transfers
	messageSize = 64 // bytes
	settle      = 300 * time.Millisecond
)

func scaled(n int) int { return max(clients, int(float64(n)**scale)) }

// chosen reports whether the kind of work is to be done.
func chosen(kind string) bool {
	return *kinds == "" || slices.Contains(strings.Split(*kinds, ","), kind)
}

// workAll does all kinds of work through the balancer and returns the metrics.
func workAll(p *process, b balancer, at rated) ([]float64, error) {
	var failed atomic.Int64
	failed.Store(int64(at.failed))
	short(b.echo, clients, &failed) // what is needed once is not measured

	connections, trips, volume := 0, 0, int64(0)
	var shortTimes, tripTimes, besideTimes []time.Duration
	var shortCPU, tripCPU, downCPU, upCPU, slowCPU float64
	var resting, stuck held
	var err error
	if chosen("idle") {
		if resting, err = idle(p, b.echo, min(scaled(9_900), b.holds), &failed); err != nil {
			return nil, err
		}
	}
	if chosen("stuck") {
		if stuck, err = stick(p, b.source, scaled(1_000)); err != nil {
			return nil, err
		}
	}
	if chosen("short") {
		connections = scaled(20_000)
		if shortCPU, err = p.during(func() { shortTimes = short(b.echo, connections, &failed) }); err != nil {
			return nil, err
		}
	}
	if chosen("trips") {
		trips = scaled(200_000)
		if tripCPU, err = p.during(func() { tripTimes = roundTrips(b.echo, clients, trips, &failed) }); err != nil {
			return nil, err
		}
	}
	if chosen("bulk") {
		volume = int64(2e9 * *scale)
		if downCPU, err = p.during(func() { down(b.source, volume, &failed) }); err != nil {
			return nil, err
		}
		if upCPU, err = p.during(func() { up(b.sink, volume, &failed) }); err != nil {
			return nil, err
		}
	}
	slowVolume := int64(0)
	if chosen("slow") {
		slowVolume = int64(1e9 * *scale)
		if slowCPU, err = p.during(func() { slow(b.source, slowVolume, &failed) }); err != nil {
			return nil, err
		}
	}
	if chosen("beside") {
		if besideTimes, err = beside(b, scaled(4_000), &failed); err != nil {
			return nil, err
		}
	}
	return []float64{
		shortCPU * 1e6 / float64(max(1, connections)),
		tripCPU * 1e6 / float64(max(1, trips)),
		downCPU * 1e9 / float64(max(1, volume)),
		upCPU * 1e9 / float64(max(1, volume)),
		slowCPU * 1e9 / float64(max(1, slowVolume)),
		resting.resident / 1024, resting.files, resting.answering,
		stuck.resident / 1024, stuck.kernel / 1024, stuck.files,
		at.most, at.own, at.others, at.p50, at.p99, at.ownFixed, at.atClient,
		percentile(shortTimes, 50), percentile(shortTimes, 99),
		percentile(tripTimes, 50), percentile(tripTimes, 99),
		percentile(besideTimes, 50), percentile(besideTimes, 99),
		float64(failed.Load()),
	}, nil
}

// during returns the seconds of processor time that the process used meanwhile,
// and for what it had yet to do then.
func (p *process) during(work func()) (float64, error) {
	before, err := p.cpu()
	if err != nil {
		return 0, err
	}
	work()
	time.Sleep(settle)
	after, err := p.cpu()
	return (after - before).Seconds(), err
}

// percentile returns it in milliseconds, and sorts the times.
func percentile(times []time.Duration, p int) float64 {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[(len(times)-1)*p/100].Seconds() * 1000
}

// share has so many workers do n pieces of work, and returns the time that each
// piece took.
func share(workers, n int, worker func(do func(func() error))) []time.Duration {
	var next atomic.Int64
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			times := make([]time.Duration, 0, 2*n/workers)
			worker(func(piece func() error) {
				for next.Add(1) <= int64(n) {
					began := time.Now()
					if piece() != nil {
						return
					}
					times = append(times, time.Since(began))
				}
			})
			mu.Lock()
			defer mu.Unlock()
			all = append(all, times...)
		})
	}
	wg.Wait()
	return all
}

// short makes n connections: connect, a message and back, close.
func short(address string, n int, failed *atomic.Int64) []time.Duration {
	return share(clients, n, func(do func(func() error)) {
		message := make([]byte, messageSize)
		do(func() error {
			c, err := net.Dial("tcp", address)
			if err == nil {
				err = trip(c, message)
				_ = c.Close()
			}
			if err != nil {
				failed.Add(1)
			}
			return nil
		})
	})
}

// roundTrips sends n messages and has them back, on connections that are kept.
func roundTrips(address string, connections, n int, failed *atomic.Int64) []time.Duration {
	return share(connections, n, func(do func(func() error)) {
		message := make([]byte, messageSize)
		c, err := net.Dial("tcp", address)
		if err != nil {
			failed.Add(1)
			return
		}
		defer c.Close()
		do(func() error {
			err := trip(c, message)
			if err != nil {
				failed.Add(1)
			}
			return err
		})
	})
}

func trip(c net.Conn, message []byte) error {
	if _, err := c.Write(message); err != nil {
		return err
	}
	_, err := io.ReadFull(c, message)
	return err
}

// beside makes round trips while another process reads all it can through the
// balancer.
func beside(b balancer, n int, failed *atomic.Int64) ([]time.Duration, error) {
	reader, err := startProcess(command(os.Args[0], "reader", b.source))
	if err != nil {
		return nil, err
	}
	defer reader.stop()
	time.Sleep(settle)
	times := roundTrips(b.echo, clients/4, n, failed)
	if reader.ended() {
		return nil, fmt.Errorf("the process that reads ended: %s", reader.log.String())
	}
	return times, nil
}

// runReader reads from an address over several connections until it is killed.
func runReader(address string) {
	var failed atomic.Int64
	down(address, math.MaxInt64, &failed)
	fmt.Fprintln(os.Stderr, "the connections have ended")
	os.Exit(1)
}

// down reads so many bytes over several connections.
func down(address string, volume int64, failed *atomic.Int64) {
	transfer(address, failed, func(c *net.TCPConn) error {
		buf := make([]byte, 256<<10)
		for left := volume / streams; left > 0; {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			left -= int64(n)
		}
		return nil
	})
}

// up writes so many bytes over several connections, until they have arrived.
func up(address string, volume int64, failed *atomic.Int64) {
	transfer(address, failed, func(c *net.TCPConn) error {
		buf := make([]byte, 256<<10)
		for left := volume / streams; left > 0; left -= int64(len(buf)) {
			if _, err := c.Write(buf); err != nil {
				return err
			}
		}
		if err := c.CloseWrite(); err != nil {
			return err
		}
		_, err := io.ReadFull(c, buf[:1])
		return err
	})
}

func transfer(address string, failed *atomic.Int64, stream func(*net.TCPConn) error) {
	var wg sync.WaitGroup
	for range streams {
		wg.Go(func() {
			c, err := net.Dial("tcp", address)
			if err == nil {
				err = stream(c.(*net.TCPConn))
				_ = c.Close()
			}
			if err != nil {
				failed.Add(1)
			}
		})
	}
	wg.Wait()
}
