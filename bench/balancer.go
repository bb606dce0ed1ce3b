//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// baseline is the balancer to which ratios are given.
const baseline = "caddy-l4 proxy"

// balancer is a program to compare, with a listener for each kind of backend.
type balancer struct {
	name    string
	echo    string // addresses that it listens on
	source  string
	sink    string
	program string
	args    []string
	holds   int // connections at most, as it is configured
}

// service is what a balancer has to balance: a name, where to listen, and the
// backends.
type service struct {
	name, listen string
	backends     []string
}

// balancers writes the configurations, into dir, of those that can run here.
// All of them check their backends, where they can, and limit connections.
func balancers(dir string, b *backends) []balancer {
	var list []balancer
	add := func(name, program, file string, holds int, config func([]service) string, args ...string) {
		path, err := exec.LookPath(program)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s is not installed, left out\n", name)
			return
		}
		services := []service{
			{"echo", freeAddress(), b.echo},
			{"source", freeAddress(), b.source},
			{"sink", freeAddress(), b.sink},
		}
		file = filepath.Join(dir, file)
		if err := os.WriteFile(file, []byte(config(services)), 0o644); err != nil {
			panic(err) // the temporary directory is ours
		}
		for i := range args {
			if args[i] == "FILE" {
				args[i] = file
			}
		}
		list = append(list, balancer{
			name: name, program: path, args: args, holds: holds,
			echo: services[0].listen, source: services[1].listen, sink: services[2].listen,
		})
	}
	most := mostHeld()
	add("tcp_lb", *caddy, "tcp_lb.json", most, tcpLB("tcp_lb/", trusted), "run", "--config", "FILE")
	if certFile != "" {
		add("tcp_lb by x25519", *caddy, "tcp_lb-x25519.json", most, tcpLB("tcp_lb/", trustedByX25519), "run", "--config", "FILE")
	}
	add("tcp_lb on :port", *caddy, "tcp_lb-plain.json", most, tcpLB("", trusted), "run", "--config", "FILE")
	add(baseline, *caddy, "proxy.json", most, caddyProxy, "run", "--config", "FILE")
	add("HAProxy", "haproxy", "haproxy.cfg", most, haproxy(most, ""), "-db", "-f", "FILE")
	less := most * 3 / 5 // it sets files aside for pipes
	add("HAProxy splice", "haproxy", "haproxy-splice.cfg", less, haproxy(less, "option splice-auto"), "-db", "-f", "FILE")
	add("nginx", "nginx", "nginx.conf", most, nginx(dir), "-p", dir, "-c", "FILE")
	return list
}

// caddyConfig makes a config with a layer4 server for each service, and with
// metrics collected as on a production system.
func caddyConfig(services []service, network string, handler func(service) map[string]any) string {
	servers := make(map[string]any)
	for _, s := range services {
		servers[s.name] = map[string]any{
			"listen": []string{network + s.listen},
			"routes": []any{map[string]any{"handle": []any{handler(s)}}},
		}
	}
	config, err := json.Marshal(map[string]any{
		"admin": map[string]any{"disabled": true, "config": map[string]any{"persist": false}},
		"apps": map[string]any{
			"layer4": map[string]any{"servers": servers},
			"http": map[string]any{"servers": map[string]any{"metrics": map[string]any{
				"listen": []string{freeAddress()},
				"routes": []any{map[string]any{"handle": []any{map[string]any{"handler": "metrics"}}}},
			}}},
		},
	})
	if err != nil {
		panic(err) // only maps and strings
	}
	return string(config)
}

func tcpLB(network string, secured func() map[string]any) func([]service) string {
	return func(services []service) string {
		return caddyConfig(services, network, func(s service) map[string]any {
			var list []any
			for _, a := range s.backends {
				list = append(list, map[string]any{"address": a})
			}
			h := map[string]any{"handler": "tcp_lb", "name": s.name, "backends": list, "dial_timeout": connectTimeout.String()}
			if certFile != "" {
				h["tls"] = secured()
			}
			return h
		})
	}
}

func caddyProxy(services []service) string {
	return caddyConfig(services, "", func(s service) map[string]any {
		var list []any
		for _, a := range s.backends {
			upstream := map[string]any{"dial": []string{a}}
			if certFile != "" {
				upstream["tls"] = trusted()
			}
			list = append(list, upstream)
		}
		return map[string]any{
			"handler": "proxy", "upstreams": list,
			"load_balancing": map[string]any{"selection": map[string]any{"policy": "round_robin"}},
			"health_checks":  map[string]any{"active": map[string]any{"interval": "10s"}},
		}
	})
}

func haproxy(most int, option string) func([]service) string {
	return func(services []service) string {
		config := fmt.Sprintf("global\n\tmaxconn %d\ndefaults\n\tmode tcp\n\t%s\n", most+50, option) +
			"\ttimeout connect " + connectTimeout.String() + "\n\ttimeout client 1h\n\ttimeout server 1h\n"
		for _, s := range services {
			config += fmt.Sprintf("listen %s\n\tbind %s\n\tbalance roundrobin\n", s.name, s.listen)
			for i, a := range s.backends {
				config += fmt.Sprintf("\tserver s%d %s check inter 10s", i, a)
				if certFile != "" {
					config += " ssl verify required ca-file " + certFile
				}
				config += "\n"
			}
		}
		return config
	}
}

func nginx(dir string) func([]service) string {
	return func(services []service) string {
		config := "daemon off;\nmaster_process off;\npid " + dir + "/nginx.pid;\nerror_log /dev/null;\n"
		if _, err := os.Stat("/usr/lib/nginx/modules/ngx_stream_module.so"); err == nil {
			config += "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
		}
		config += "" + fmt.Sprintf("events { worker_connections %d; }\n", 2*mostHeld()+100) + "stream {\n\tproxy_timeout 1h;\n\tproxy_connect_timeout " + fmt.Sprint(connectTimeout.Milliseconds()) + "ms;\n\tproxy_half_close on;\n"
		for _, s := range services {
			config += "\tupstream " + s.name + " {\n"
			for _, a := range s.backends {
				config += "\t\tserver " + a + ";\n"
			}
			config += "\t}\n\tserver { listen " + s.listen + "; proxy_pass " + s.name + ";"
			if certFile != "" {
				config += " proxy_ssl on; proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_ssl_verify on; proxy_ssl_name backend.test; proxy_ssl_session_reuse on; proxy_ssl_trusted_certificate " + certFile + ";"
			}
			config += " }\n"
		}
		return config + "}\n"
	}
}

// start runs the balancer until it listens.
func (b balancer) start() (*process, error) {
	p, err := startProcess(command(b.program, b.args...))
	if err != nil {
		return nil, err
	}
	for _, address := range []string{b.echo, b.source, b.sink} {
		if err := p.listens(address); err != nil {
			p.stop()
			return nil, err
		}
	}
	return p, nil
}

// freeAddress returns a loopback address nobody listens on, outside of the
// range of ports that connections get.
func freeAddress() string {
	for {
		nextPort++
		address := fmt.Sprintf("127.0.0.1:%d", nextPort)
		if ln, err := net.Listen("tcp", address); err == nil {
			_ = ln.Close()
			return address
		}
	}
}

var nextPort = 21_000 + time.Now().Nanosecond()%5_000
