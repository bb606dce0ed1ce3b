//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// atOnce is how many connections the client keeps open at saturation.
const atOnce = 64

// rated is what was measured with connections at the highest rate and at a fixed
// one.
type rated struct {
	most               float64 // connections per second
	own, others        float64 // processor time at that, of what there is, in percent
	p50, p99           float64 // milliseconds, at the fixed rate
	failed             int
	ownFixed, atClient float64 // processor time at the fixed rate, in percent
}

// rateFor says at what rate all balancers are to be compared: half of the
// highest of the slowest, in round numbers.
func rateFor(results []*result, b *backends) (float64, error) {
	least := math.Inf(1)
	for _, r := range results {
		at, err := r.balancer.rated(b, 0)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", r.name, err)
		}
		least = min(least, at.most)
	}
	return max(100, math.Floor(least/200)*100), nil
}

// rated starts the balancer on a processor of its own, in front of a client and
// backends on the others, and measures how many short connections it can
// serve; with a rate, also how long they take at that rate.
func (b balancer) rated(servers *backends, rate float64) (r rated, err error) {
	all, mine, rest, err := processors()
	if err != nil {
		return r, err
	}
	var p *process
	onCPUs(mine, func() { p, err = b.start() })
	if err != nil {
		return r, err
	}
	defer p.stop()
	if err := servers.move(rest); err != nil {
		return r, err
	}
	defer func() { _ = servers.move(all) }()

	length := time.Duration(max(.2, 5**scale) * float64(time.Second))
	a, own, others, err := p.load(servers, rest, b.echo, 0, atOnce, length)
	if err != nil {
		return r, err
	}
	r.most, r.failed = float64(a.Connections-a.Failed)/a.Seconds, a.Failed
	r.own, r.others = own/float64(mine.Count()), others/float64(rest.Count())
	if rate == 0 {
		return r, nil
	}
	time.Sleep(settle)
	if a, own, others, err = p.load(servers, rest, b.echo, rate, atOnce, 2*length); err != nil {
		return r, err
	}
	r.p50, r.p99 = a.P50, a.P99
	r.failed += a.Failed
	r.ownFixed, r.atClient = own/float64(mine.Count()), others/float64(rest.Count())
	return r, nil
}

// load runs a client on the processors, and returns what it found, and in
// percent of one processor what the balancer took meanwhile, and what client and
// backends.
func (p *process) load(servers *backends, cpus *unix.CPUSet, address string, rate float64, atOnce int, length time.Duration) (a answers, own, others float64, err error) {
	cmd := command(os.Args[0], "client", address, strconv.FormatFloat(rate, 'f', -1, 64), strconv.Itoa(atOnce), length.String())
	cmd.Stderr = os.Stderr
	ownBefore, err := p.cpu()
	if err != nil {
		return a, 0, 0, err
	}
	theirsBefore, err := servers.cpu()
	if err != nil {
		return a, 0, 0, err
	}
	var out []byte
	onCPUs(cpus, func() { out, err = cmd.Output() })
	if err != nil {
		return a, 0, 0, fmt.Errorf("the client: %w", err)
	}
	if err := json.Unmarshal(out, &a); err != nil {
		return a, 0, 0, fmt.Errorf("what the client says: %w", err)
	}
	if p.ended() {
		return a, 0, 0, fmt.Errorf("it ended: %s\n%s", p.cmd.ProcessState, p.log.String())
	}
	ownAfter, err := p.cpu()
	if err != nil {
		return a, 0, 0, err
	}
	theirsAfter, err := servers.cpu()
	theirs := theirsAfter - theirsBefore + cpuOf(cmd)
	return a, (ownAfter - ownBefore).Seconds() / a.Seconds * 100, theirs.Seconds() / a.Seconds * 100, err
}

// cpuOf is the processor time of a program that has ended.
func cpuOf(cmd *exec.Cmd) time.Duration {
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
}

// processors are all that this program may use, the first of them, and the rest.
// Where there is only one, each is that.
func processors() (all, first, rest *unix.CPUSet, err error) {
	all, first, rest = new(unix.CPUSet), new(unix.CPUSet), new(unix.CPUSet)
	if err := unix.SchedGetaffinity(0, all); err != nil {
		return nil, nil, nil, fmt.Errorf("asking for processors: %w", err)
	}
	if all.Count() < 2 {
		return all, all, all, nil
	}
	cpu := 0
	for !all.IsSet(cpu) {
		cpu++
	}
	first.Set(cpu)
	*rest = *all
	rest.Clear(cpu)
	return all, first, rest, nil
}

// onCPUs calls f so that programs it starts run on these processors only.
func onCPUs(cpus *unix.CPUSet, f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.CPUSet
	if unix.SchedGetaffinity(0, &before) == nil && unix.SchedSetaffinity(0, cpus) == nil {
		defer func() { _ = unix.SchedSetaffinity(0, &before) }()
	}
	f()
}

// move lets all threads of the process run on these processors only.
func (p *process) move(cpus *unix.CPUSet) error {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.cmd.Process.Pid))
	if err != nil {
		return err
	}
	for _, t := range threads {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(id, cpus); err != nil && err != unix.ESRCH {
			return fmt.Errorf("moving a thread of the backends: %w", err)
		}
	}
	return nil
}
