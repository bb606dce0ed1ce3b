package tcplb_test

import (
	"fmt"
	"hash/fnv"
	"io"
	"net"

	"github.com/caddyserver/caddy/v2"
	_ "github.com/mholt/caddy-l4"

	tcplb "github.com/caddy-tcp-lb/caddy-tcp-lb"
)

// SameNetwork sends all clients of one network to the same backend, the first one
// behind it in the list that can be taken.
type SameNetwork struct {
	// Bits is the length of an IPv4 network's prefix. Default: 24.
	Bits int `json:"bits,omitempty"`
}

func init() { caddy.RegisterModule(SameNetwork{}) }

func (SameNetwork) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.same_network",
		New: func() caddy.Module { return new(SameNetwork) },
	}
}

// Provision fills in the default.
func (p *SameNetwork) Provision(caddy.Context) error {
	if p.Bits == 0 {
		p.Bits = 24
	}
	return nil
}

// NewPicker implements tcplb.SelectionPolicy.
func (p *SameNetwork) NewPicker(available []tcplb.Candidate, _ tcplb.Picker) tcplb.Picker {
	return &sameNetwork{bits: p.Bits, candidates: available}
}

type sameNetwork struct {
	bits       int
	candidates []tcplb.Candidate
}

// Pick implements tcplb.Picker.
func (p *sameNetwork) Pick(r *tcplb.Request) *tcplb.Backend {
	h := fnv.New32a()
	if network, err := r.Client().Addr().Prefix(p.bits); err == nil {
		fmt.Fprint(h, network)
	}
	n := len(p.candidates)
	for i := range n {
		b := p.candidates[(int(h.Sum32()%uint32(n))+i)%n].Backend
		if r.Take(b) {
			return b
		}
	}
	return nil
}

// A policy of one's own is a module in the namespace
// layer4.tcp_lb.selection_policies. Built in, it is chosen by its name.
func ExampleSelectionPolicy() {
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer backend.Close()
	go func() {
		for c, err := backend.Accept(); err == nil; c, err = backend.Accept() {
			_, _ = io.WriteString(c, "hello from the backend\n")
			_ = c.Close()
		}
	}()
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	listen := front.Addr().String()
	_ = front.Close()

	config := fmt.Sprintf(`{
		"admin": {"disabled": true, "config": {"persist": false}},
		"logging": {"logs": {"default": {"level": "ERROR"}}},
		"apps": {"layer4": {"servers": {"example": {"listen": [%q], "routes": [{"handle": [{
			"handler": "tcp_lb",
			"name": "example",
			"backends": [{"address": %q}],
			"health_checks": {"active": {"disabled": true}},
			"load_balancing": {"selection_policy": {"policy": "same_network", "bits": 16}}
		}]}]}}}}
	}`, listen, backend.Addr())
	if err := caddy.Load([]byte(config), true); err != nil {
		panic(err)
	}
	defer caddy.Stop()

	client, err := net.Dial("tcp", listen)
	if err != nil {
		panic(err)
	}
	defer client.Close()
	said, _ := io.ReadAll(client)
	fmt.Print(string(said))
	// Output: hello from the backend
}

// Interface guards
var (
	_ tcplb.SelectionPolicy = (*SameNetwork)(nil)
	_ caddy.Provisioner     = (*SameNetwork)(nil)
)
