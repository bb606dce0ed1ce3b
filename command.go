package tcplb

// The command caddy tcp-lb, which asks the admin API.
import _ "github.com/caddy-tcp-lb/caddy-tcp-lb/internal/command"
