//go:build linux

// Command bench compares what this balancer and others cost: processor time of
// the balancer's process for each unit of work, memory and files for each idle
// connection, and, less telling on a shared machine, latency.
//
//	go run ./bench
//	go run ./bench -tls full -work idle,short,bulk # with TLS to the backends
//	go run ./bench -tls full -work storm -connect 500ms # thousands of clients at once
//
// Each balancer runs in a process of its own, in front of the same backends,
// with the same client, one at a time and in turns for several rounds. HAProxy
// and nginx take part if they are installed. The table has medians over the
// rounds, and ratios to caddy-l4's own proxy.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	rounds = flag.Int("rounds", 5, "how often each balancer has its turn")
	scale  = flag.Float64("scale", 1, "factor on the amount of work")
	only   = flag.String("only", "", "comma-separated balancers to run, all if empty")
	kinds  = flag.String("work", "", "comma-separated kinds of work, of rate, idle, stuck, short, trips, bulk, slow and beside, all if empty; or checks, once; or storm")
	caddy  = flag.String("caddy", "", "Caddy binary with this module; built from this checkout if empty")
)

func main() {
	switch { // this program started again
	case len(os.Args) == 2 && os.Args[1] == "backend":
		runBackend()
		return
	case len(os.Args) == 4 && os.Args[1] == "checked":
		runChecked(os.Args[2], os.Args[3])
		return
	case len(os.Args) == 3 && os.Args[1] == "reader":
		runReader(os.Args[2])
		return
	case len(os.Args) == 6 && os.Args[1] == "client":
		exitOn(runClient(os.Args[2], os.Args[3], os.Args[4], os.Args[5]))
		return
	}
	flag.Parse()
	exitOn(run())
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if *caddy == "" {
		*caddy = filepath.Join(dir, "caddy")
		fmt.Fprintln(os.Stderr, "building Caddy")
		if out, err := command("go", "build", "-o", *caddy, "./cmd/caddy").CombinedOutput(); err != nil {
			return fmt.Errorf("building cmd/caddy: %w\n%s", err, out)
		}
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	wanted := func(balancer string) bool {
		return *only == "" || slices.Contains(strings.Split(*only, ","), balancer)
	}
	if *kinds == "checks" {
		return compareChecks(dir, wanted, stop)
	}
	if err := secureBackends(dir); err != nil {
		return err
	}
	backends, err := startBackends()
	if err != nil {
		return fmt.Errorf("starting the backends: %w", err)
	}
	defer backends.stop()
	// Bulk has a process of its own, which is fair to the round trips beside it.
	streams, err := startBackends()
	if err != nil {
		return fmt.Errorf("starting the backends: %w", err)
	}
	defer streams.stop()
	backends.source, backends.sink = streams.source, streams.sink

	var results []*result
	for _, b := range balancers(dir, backends) {
		if wanted(b.name) {
			results = append(results, &result{name: b.name, balancer: b})
		}
	}
	if *kinds == "storm" {
		return storms(results, backends)
	}
	rate := 0.0
	if chosen("rate") && len(results) > 0 {
		fmt.Fprintln(os.Stderr, "looking for a rate that all can serve")
		if rate, err = rateFor(results, backends); err != nil {
			return err
		}
	}
	for round := range *rounds {
		for _, r := range results {
			select {
			case <-stop:
				return fmt.Errorf("interrupted")
			default:
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, *rounds, r.name)
			if err := r.measure(backends, rate); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
		}
	}
	printTables(results, rate)
	return nil
}

// A metric is a row of the table.
type metric struct {
	name   string
	format string
}

var metrics = []metric{
	{"short connection, µs of CPU", "%.1f"},
	{"round trip of 64 bytes, µs of CPU", "%.2f"},
	{"GB down, s of CPU", "%.3f"},
	{"GB up, s of CPU", "%.3f"},
	{"GB down to slow clients, s of CPU", "%.3f"},
	{"idle connection, KB resident", "%.1f"},
	{"idle connection, files", "%.2f"},
	{"idle connections held that answer", "%.0f"},
	{"stuck download, KB resident", "%.1f"},
	{"stuck download, KB of all sockets", "%.0f"},
	{"stuck download, files", "%.2f"},
	{"connections per second at most", "%.0f"},
	{"at most, % of the balancer's CPU", "%.0f"},
	{"at most, % of the others' CPU", "%.0f"},
	{"at the fixed rate, p50 in ms", "%.2f"},
	{"at the fixed rate, p99 in ms", "%.2f"},
	{"at the fixed rate, % of the balancer's CPU", "%.0f"},
	{"at the fixed rate, % of the others' CPU", "%.0f"},
	{"short connection, p50 in ms", "%.2f"},
	{"short connection, p99 in ms", "%.2f"},
	{"round trip, p50 in ms", "%.3f"},
	{"round trip, p99 in ms", "%.3f"},
	{"round trip beside bulk, p50 in ms", "%.2f"},
	{"round trip beside bulk, p99 in ms", "%.2f"},
	{"errors", "%.0f"},
}

// result is what was measured of one balancer: a value for each metric and
// round.
type result struct {
	name     string
	balancer balancer
	values   [][]float64 // by round, then metric
}

// measure gives the balancer its turn, in new processes.
func (r *result) measure(servers *backends, rate float64) error {
	var at rated
	if rate > 0 {
		var err error
		if at, err = r.balancer.rated(servers, rate); err != nil {
			return err
		}
	}
	p, err := r.balancer.start()
	if err != nil {
		return err
	}
	defer p.stop()
	values, err := workAll(p, r.balancer, at)
	if err != nil {
		return err
	}
	r.values = append(r.values, values)
	return nil
}

func (r *result) median(metric int) float64 {
	var column []float64
	for _, v := range r.values {
		column = append(column, v[metric])
	}
	slices.Sort(column)
	n := len(column)
	return (column[(n-1)/2] + column[n/2]) / 2
}

func printTables(results []*result, rate float64) {
	base := slices.IndexFunc(results, func(r *result) bool { return r.name == baseline })
	fmt.Printf("\nMedians of %d rounds, on %s%s:\n\n", *rounds, machine(), atRate(rate))
	printTable(results, func(r *result, m int) string { return fmt.Sprintf(metrics[m].format, r.median(m)) })
	if base < 0 {
		return
	}
	fmt.Printf("\nThe same, divided by those of %s:\n\n", baseline)
	printTable(results, func(r *result, m int) string {
		if of := results[base].median(m); of != 0 {
			return fmt.Sprintf("%.2f", r.median(m)/of)
		}
		return ""
	})
}

func atRate(rate float64) string {
	if rate == 0 {
		return ""
	}
	return fmt.Sprintf("; the fixed rate is %.0f connections per second, half of the slowest one's most", rate)
}

// machine says what the numbers depend on. Congestion control is of it: where
// that paces, as BBR does, bulk costs more through any balancer.
func machine() string {
	kernel := "an unknown kernel"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = "Linux " + unix.ByteSliceToString(u.Release[:])
	}
	congestion, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
	if err != nil {
		congestion = []byte("unknown")
	}
	return fmt.Sprintf("%s with %d CPUs and %s congestion control", kernel, runtime.NumCPU(), strings.TrimSpace(string(congestion)))
}

func printTable(results []*result, cell func(r *result, metric int) string) {
	fmt.Print("| per |")
	for _, r := range results {
		fmt.Printf(" %s |", r.name)
	}
	fmt.Print("\n|---|", strings.Repeat("---|", len(results)), "\n")
	for m := range metrics {
		fmt.Printf("| %s |", metrics[m].name)
		for _, r := range results {
			fmt.Printf(" %s |", cell(r, m))
		}
		fmt.Println()
	}
}
