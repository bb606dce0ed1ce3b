package tcplb

import (
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

func init() {
	caddy.RegisterModule(First{})
}

// First picks the first available backend in the config's order, and the next
// one where that is full. Weights decide nothing but that 0 takes none.
type First struct{}

// CaddyModule returns the Caddy module information.
func (First) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "layer4.tcp_lb.selection_policies.first",
		New: func() caddy.Module { return new(First) },
	}
}

// UnmarshalCaddyfile reads the policy's name; it has no options.
func (First) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { return onlyName(d) }

// NewPicker implements SelectionPolicy.
func (First) NewPicker(available []Candidate, _ Picker) Picker {
	return inOrder(slices.Clone(available))
}

// inOrder are candidates, the first choice first.
type inOrder []Candidate

// Pick implements Picker.
func (o inOrder) Pick(r *Request) *Backend {
	for _, c := range o {
		if r.Take(c.Backend) {
			return c.Backend
		}
	}
	return nil
}

// onlyName reads the name of a policy that has no options.
func onlyName(d *caddyfile.Dispenser) error {
	d.Next() // policy name
	if d.NextArg() {
		return d.Errf("takes no arguments, found %q", d.Val())
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("takes no block, found %q", d.Val())
	}
	return nil
}

// Interface guards
var (
	_ SelectionPolicy       = (*First)(nil)
	_ caddyfile.Unmarshaler = (*First)(nil)
)
