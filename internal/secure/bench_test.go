package secure

import (
	"crypto/tls"
	"io"
	"runtime"
	"testing"
)

// BenchmarkIdleConn is what there is to give back of a connection that has received
// a record of 16 KB and is idle.
func BenchmarkIdleConn(b *testing.B) {
	const many = 200
	record := make([]byte, 16<<10)
	var kept float64
	for b.Loop() {
		var conns []*Conn
		for range many {
			c, server := connected(b, new(tls.Config), false)
			if _, err := server.Write(record); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, len(record))); err != nil {
				b.Fatal(err)
			}
			conns = append(conns, c)
		}
		before := heapAlloc()
		for _, c := range conns {
			c.Shed()
		}
		kept += float64(before-heapAlloc()) / many / 1024
		for _, c := range conns {
			_ = c.Close()
		}
	}
	b.ReportMetric(kept/float64(b.N), "KB-given-back/conn")
	b.ReportMetric(0, "ns/op")
}

func heapAlloc() uint64 {
	runtime.GC()
	runtime.GC() // what pools had
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
