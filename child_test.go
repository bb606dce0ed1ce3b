package tcplb

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// childEnv makes the test binary a Caddy with this module, for tests that need
// a process of its own: signals, exit, file limits.
const childEnv = "TCPLB_TEST_CHILD"

// runChild is that Caddy; its arguments are Caddy's.
func runChild() { caddycmd.Main() }
