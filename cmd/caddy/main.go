// Command caddy is Caddy with its standard modules, all of caddy-l4, and the
// tcp_lb load balancer with demo backends to try it on.
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	_ "github.com/caddy-tcp-lb/caddy-tcp-lb"
	_ "github.com/caddy-tcp-lb/caddy-tcp-lb/internal/demo"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	_ "github.com/mholt/caddy-l4"
)

func main() {
	caddycmd.Main()
}
