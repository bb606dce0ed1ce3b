//go:build linux

package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
)

// backends is the process with all of the servers behind the balancers.
type backends struct {
	*process
	echo, source, sink []string
}

// startBackends runs this program again, as the servers.
func startBackends() (*backends, error) {
	cmd := command(os.Args[0], "backend")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.stop()
		return nil, err
	}
	a := strings.Fields(line)
	return &backends{process: p, echo: a[:2], source: a[2:4], sink: a[4:6]}, nil
}

// runBackend serves two servers of each kind until it is killed, and says where.
func runBackend() {
	var addresses []any
	listen := func() *net.TCPListener {
		ln, err := net.Listen("tcp", freeAddress())
		check(err)
		addresses = append(addresses, ln.Addr())
		return ln.(*net.TCPListener)
	}
	serving := []func(net.Conn){source, source, sink, sink}
	if os.Getenv(secureEnv) == "" {
		go echoes(listen(), listen())
	} else {
		serving = append([]func(net.Conn){echoSecurely, echoSecurely}, serving...)
	}
	for _, serve := range serving {
		ln := secured(listen())
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					serve(c)
				}()
			}
		}()
	}
	fmt.Println(addresses...)
	select {}
}

// source sends for as long as the client reads.
func source(c net.Conn) {
	buf := make([]byte, 256<<10)
	for err := error(nil); err == nil; {
		_, err = c.Write(buf)
	}
}

// sink reads to the end and acknowledges it with a byte.
func sink(c net.Conn) {
	buf := make([]byte, 256<<10)
	for {
		if _, err := c.Read(buf); err != nil {
			if err == io.EOF {
				_, _ = c.Write([]byte("."))
			}
			return
		}
	}
}
