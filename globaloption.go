package tcplb

import (
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("tcp_lb", parseGlobalOption)
}

// parseGlobalOption reads what holds for all tcp_lb handlers of a config:
//
//	tcp_lb {
//		handshake_timeout <duration>
//		shutdown_delay <duration>
//	}
//
// Every error names the option, its value, the file and the line.
func parseGlobalOption(d *caddyfile.Dispenser, existing any) (any, error) {
	d.Next() // option name
	if existing != nil {
		return nil, d.Errf("tcp_lb: the global option is set twice, put both blocks together")
	}
	if d.NextArg() {
		return nil, d.Errf("tcp_lb: the global option takes a block, found %q", d.Val())
	}
	app := new(App)
	p := newParser(d)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := p.globalOption(app); err != nil {
			return nil, err
		}
	}
	return httpcaddyfile.App{Name: "tcp_lb", Value: caddyconfig.JSON(app, nil)}, nil
}

// globalOption reads the option that the current token names.
func (p *parser) globalOption(a *App) error {
	name := p.Val()
	o := named(globalOptions, name)
	if o == nil {
		return p.Errf("tcp_lb: %s", unknown("global option", name, namesOf(globalOptions), meantGlobally(name)))
	}
	if !p.once(o.spec) {
		return p.Errf("tcp_lb: global option %s is set twice", name)
	}
	return readOption(p, o, a)
}

// meantGlobally has what is meant by a name that is no global option.
func meantGlobally(name string) map[string]string {
	name = plainName(name)
	if named(handlerOptions, name) != nil {
		return map[string]string{name: "it belongs to the handler: write it in the block of tcp_lb <address>... { } in a route"}
	}
	return map[string]string{"timeout": "handshake_timeout", "delay": "shutdown_delay", "grace_period": "it belongs to HTTP: write it in the global options, beside tcp_lb; for connections there is drain_timeout of the handler", "matching_timeout": "it belongs to a server: write it in the block of the listener, beside route"}
}

// Interface guard
var _ httpcaddyfile.UnmarshalGlobalFunc = parseGlobalOption
