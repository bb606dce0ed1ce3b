package relay

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// benchLoad reports the processor time of this process for each unit that
// another process moves through its relays.
func benchLoad(b *testing.B, load string, connections int, unit float64, metric string) {
	benchEach(b, func(b *testing.B, k kind) {
		clients, backends := listen(b), listen(b)
		defer clients.Close()
		defer backends.Close()
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), loadEnv+"="+fmt.Sprintf("%s %d %s %s", load, connections, clients.Addr(), backends.Addr()))
		in, err := c.StdinPipe()
		require.NoError(b, err)
		out, err := c.StdoutPipe()
		require.NoError(b, err)
		require.NoError(b, c.Start())
		var ended sync.WaitGroup
		for range connections {
			client, err := clients.Accept()
			require.NoError(b, err)
			backend, err := backends.Accept()
			require.NoError(b, err)
			var r relayed
			k.between(b, &r, client, backend, time.Hour)
			ended.Add(1)
			r.relay.Start(func() {
				if r.pair != nil {
					_ = client.Close()
					_ = backend.Close()
				}
				ended.Done()
			})
		}
		moved := func() (n float64) {
			_, _ = fmt.Fprintln(in, "?")
			_, err := fmt.Fscan(out, &n)
			require.NoError(b, err)
			return n / unit
		}
		time.Sleep(300 * time.Millisecond) // to warm up
		before, cpu, began := moved(), processorTime(), time.Now()
		for b.Loop() {
			time.Sleep(time.Millisecond) // the work is done meanwhile
		}
		units := moved() - before
		b.ReportMetric(float64(processorTime()-cpu)/units, "cpu-ns/"+metric)
		b.ReportMetric(units/time.Since(began).Seconds(), metric+"s/s")
		b.ReportMetric(0, "ns/op")
		_ = in.Close()
		require.NoError(b, c.Wait())
		ended.Wait()
	})
}

func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkLoadRoundTrips(b *testing.B) { benchLoad(b, "roundtrip", 32, 1, "trip") }

func BenchmarkLoadBulk(b *testing.B) { benchLoad(b, "bulk", 4, 1<<20, "MB") }
