//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	checkedBackends = 10_000
	checkInterval   = 10 * time.Second
	checkWarmUp     = 2 * checkInterval // until checks are spread over the interval
	checkTime       = 50 * time.Second  // with that, longer than ports are in TIME_WAIT
)

// checking is a balancer that has nothing to do but to check.
type checking struct {
	balancer, check, program string
	servers                  string // see runChecked
	config                   func(listen string, backends []string) string
	args                     []string
}

func checkings() []checking {
	caddyArgs := []string{"run", "--config", "FILE"}
	haproxyArgs := []string{"-db", "-f", "FILE"}
	return []checking{
		{"tcp_lb", "connect", *caddy, "close", tcpLBChecks(""), caddyArgs},
		{"tcp_lb", "HTTP", *caddy, "close", tcpLBChecks("/healthz"), caddyArgs},
		{"tcp_lb", "HTTP, kept alive", *caddy, "keep", tcpLBChecks("/healthz"), caddyArgs},
		{"HAProxy", "connect", "haproxy", "close", haproxyChecks(""), haproxyArgs},
		{"HAProxy", "HTTP", "haproxy", "close", haproxyChecks(haproxyAsks), haproxyArgs},
		{"HAProxy", "HTTP, kept alive", "haproxy", "keep", haproxyChecks(haproxyAsks), haproxyArgs},
		{baseline, "connect", *caddy, "close", caddyProxyChecks, caddyArgs},
	}
}

func tcpLBChecks(uri string) func(string, []string) string {
	return func(listen string, backends []string) string {
		return caddyConfig([]service{{"checked", listen, backends}}, "tcp_lb/", func(s service) map[string]any {
			var list []any
			for _, a := range s.backends {
				list = append(list, map[string]any{"address": a})
			}
			active := map[string]any{"interval": checkInterval.String()}
			if uri != "" {
				active["uri"] = uri
			}
			return map[string]any{"handler": "tcp_lb", "name": s.name, "backends": list, "health_checks": map[string]any{"active": active}}
		})
	}
}

func caddyProxyChecks(listen string, backends []string) string {
	return caddyProxy([]service{{"checked", listen, backends}})
}

const haproxyAsks = "\toption httpchk\n\thttp-check send meth GET uri /healthz ver HTTP/1.1 hdr Host backend.internal\n"

func haproxyChecks(asks string) func(string, []string) string {
	return func(listen string, backends []string) string {
		config := "global\n\tmaxconn 1000\ndefaults\n\tmode tcp\n\ttimeout connect 3s\n\ttimeout client 1h\n\ttimeout server 1h\n" +
			"listen checked\n\tbind " + listen + "\n" + asks
		for i, a := range backends {
			config += fmt.Sprintf("\tserver s%d %s check inter %s\n", i, a, checkInterval)
		}
		return config
	}
}

// checkCost is what checks cost, and leave.
type checkCost struct {
	Own, Theirs          float64 // µs of processor time for one, here and at the backends
	Seen                 float64 // by the backends, each second
	Most                 float64 // within a tenth of a second, but for one of a hundred
	OwnWaits, TheirWaits float64 // ports in TIME_WAIT
	Resident             float64 // MB of the balancer
}

var checkRows = []struct {
	name, format string
	value        func(checkCost) float64
}{
	{"check, µs of CPU of the balancer", "%.0f", func(c checkCost) float64 { return c.Own }},
	{"check, µs of CPU of the backends", "%.0f", func(c checkCost) float64 { return c.Theirs }},
	{"connections that the backends see, per second", "%.0f", func(c checkCost) float64 { return c.Seen }},
	{"of those within a tenth of a second, p99", "%.0f", func(c checkCost) float64 { return c.Most }},
	{"ports in TIME_WAIT at the balancer", "%.0f", func(c checkCost) float64 { return c.OwnWaits }},
	{"ports in TIME_WAIT at the backends", "%.0f", func(c checkCost) float64 { return c.TheirWaits }},
	{"MB resident", "%.0f", func(c checkCost) float64 { return c.Resident }},
}

// compareChecks measures what it costs to check 10,000 backends.
func compareChecks(dir string, wanted func(balancer string) bool, stop <-chan os.Signal) error {
	var names []string
	var costs []checkCost
	for _, c := range checkings() {
		if !wanted(c.balancer) {
			continue
		}
		if _, err := exec.LookPath(c.program); err != nil {
			fmt.Fprintf(os.Stderr, "%s is not installed, left out\n", c.balancer)
			continue
		}
		name := c.balancer + ", " + c.check
		fmt.Fprintln(os.Stderr, name)
		cost, err := c.measure(dir, stop)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		names, costs = append(names, name), append(costs, cost)
	}
	fmt.Printf("\n%d backends, checked every %s for %s, on %s:\n\n", checkedBackends, checkInterval, checkTime, machine())
	fmt.Print("| | ", strings.Join(names, " | "), " |\n|---|", strings.Repeat("---|", len(names)), "\n")
	for _, row := range checkRows {
		fmt.Printf("| %s |", row.name)
		for _, c := range costs {
			fmt.Printf(" "+row.format+" |", row.value(c))
		}
		fmt.Println()
	}
	return nil
}

func (c checking) measure(dir string, stop <-chan os.Signal) (cost checkCost, err error) {
	servers, err := startChecked(c.servers)
	if err != nil {
		return cost, fmt.Errorf("starting the backends: %w", err)
	}
	defer servers.stop()
	listen, file := freeAddress(), filepath.Join(dir, "checks")
	if err := os.WriteFile(file, []byte(c.config(listen, servers.addresses)), 0o644); err != nil {
		return cost, err
	}
	var args []string
	for _, a := range c.args {
		args = append(args, strings.Replace(a, "FILE", file, 1))
	}
	p, err := startProcess(command(c.program, args...))
	if err != nil {
		return cost, err
	}
	defer p.stop()
	if err := p.listens(listen); err != nil {
		return cost, err
	}
	if err := p.runFor(time.Duration(*scale*float64(checkWarmUp)), stop); err != nil {
		return cost, err
	}
	_, _ = servers.ask() // the first are not measured
	theirs, err := servers.cpu()
	if err != nil {
		return cost, err
	}
	length := time.Duration(*scale * float64(checkTime))
	own, err := p.during(func() { err = p.runFor(length, stop) })
	if err != nil {
		return cost, err
	}
	theirsAfter, err := servers.cpu()
	if err != nil {
		return cost, err
	}
	n, err := servers.ask()
	if err != nil {
		return cost, err
	}
	if n.Served == 0 && c.check != "connect" {
		return cost, fmt.Errorf("no check came")
	}
	cost.Seen, cost.Most = float64(n.Served)/length.Seconds(), float64(n.Most)
	// HAProxy ends a mere connect with a reset before the backend has the connection.
	checks := checkedBackends * length.Seconds() / checkInterval.Seconds()
	cost.Own, cost.Theirs = own*1e6/checks, float64((theirsAfter-theirs).Microseconds())/checks
	if cost.Resident, err = p.resident(); err != nil {
		return cost, err
	}
	cost.Resident /= 1 << 20
	cost.OwnWaits, cost.TheirWaits, err = timeWaits(servers.port)
	return cost, err
}

// runFor lets the process run for so long.
func (p *process) runFor(d time.Duration, stop <-chan os.Signal) error {
	select {
	case <-time.After(d):
		return nil
	case <-stop:
		return fmt.Errorf("interrupted")
	case <-p.done:
		return fmt.Errorf("it ended: %s\n%s", p.cmd.ProcessState, p.log.String())
	}
}

// timeWaits counts connections in TIME_WAIT: those that were closed first by who
// connected to the port, and by who listened there.
func timeWaits(port string) (here, there float64, err error) {
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0, 0, err
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil {
		return 0, 0, err
	}
	suffix := fmt.Sprintf(":%04X", n)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line) // sl, local address, remote address, state
		switch {
		case len(f) < 4 || f[3] != "06":
		case strings.HasSuffix(f[2], suffix):
			here++
		case strings.HasSuffix(f[1], suffix):
			there++
		}
	}
	return here, there, nil
}

// served is what backends have seen since they were asked before.
type served struct {
	Served int // connections that were closed
	Most   int // that were accepted within a tenth of a second, but for one of a hundred
}

// checkedServers is a process with all the backends that are checked.
type checkedServers struct {
	*process
	port      string
	addresses []string
	ask       func() (served, error)
}

// startChecked runs this program again, as the backends.
func startChecked(kind string) (*checkedServers, error) {
	_, port, err := net.SplitHostPort(freeAddress())
	if err != nil {
		return nil, err
	}
	cmd := command(os.Args[0], "checked", kind, port)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, err
	}
	s := &checkedServers{process: p, port: port}
	for i := range checkedBackends {
		s.addresses = append(s.addresses, fmt.Sprintf("127.1.%d.%d:%s", i/250, 1+i%250, port))
	}
	answers := json.NewDecoder(out)
	s.ask = func() (n served, err error) {
		if _, err := fmt.Fprintln(in); err != nil {
			return n, err
		}
		return n, answers.Decode(&n)
	}
	if _, err := s.ask(); err != nil { // it listens
		p.stop()
		return nil, fmt.Errorf("%w: %s", err, p.log.String())
	}
	return s, nil
}
