//go:build linux

package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// command prepares a program.
func command(name string, args ...string) *exec.Cmd {
	c := exec.Command(name, args...)
	// It ends with this process, whatever ends that.
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return c
}

// process is a running program and what it has cost.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	log  bytes.Buffer // to be read when done
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.Stderr = &p.log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		_ = cmd.Wait()
	}()
	return p, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// listens waits until the address accepts connections.
func (p *process) listens(address string) error {
	for range 1000 {
		if c, err := net.Dial("tcp", address); err == nil {
			return c.Close()
		}
		if p.ended() {
			return fmt.Errorf("it ended: %s\n%s", p.cmd.ProcessState, p.log.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("nobody listens on %s", address)
}

// cpu returns the processor time of the process so far, of all its threads.
func (p *process) cpu() (time.Duration, error) {
	var t unix.Timespec
	clock := int32(^p.cmd.Process.Pid<<3 | 2) // clock_getcpuclockid(3)
	if err := unix.ClockGettime(clock, &t); err != nil {
		return 0, fmt.Errorf("reading the processor time: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// resident returns the resident memory in bytes.
func (p *process) resident() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	pages, err := strconv.Atoi(strings.Fields(string(b))[1])
	return float64(pages * os.Getpagesize()), err
}

// files returns the number of open files.
func (p *process) files() (float64, error) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	return float64(len(list)), err
}
