package command

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/spf13/cobra"
)

func readyCommand() *cobra.Command {
	return stateCommand("ready", "Gives a backend new connections again, as its checks say", `
Ends what 'drain' or 'maint' began. After 'maint' the first check decides whether
the backend is up. A weight that was set by hand stays.
`, false)
}

func drainCommand() *cobra.Command {
	return stateCommand("drain", "Gives a backend no new connections", `
The backend gets no new connections. Those that are open go on, and so do health
checks. It lasts until 'caddy tcp-lb ready', over reloads.

With --wait the command returns once no connection is left, for example to
restart the server then. If some are left after that time, they go on and the
backend stays drained, and the exit code is 5.
`, true)
}

func maintCommand() *cobra.Command {
	return stateCommand("maint", "Takes a backend out of work", `
As if the backend had left the config: it gets no new connections and no health
checks, and open connections get drain_timeout to end. It lasts until 'caddy
tcp-lb ready', over reloads.

With --wait the command returns once no connection is left. If some are left
after that time, the exit code is 5.
`, true)
}

func stateCommand(state, short, long string, waits bool) *cobra.Command {
	usage := state + " [<backend>] [--lb <pool>] [--json]"
	if waits {
		usage = state + " [<backend>] [--lb <pool>] [--wait <duration>] [--json]"
	}
	cmd := run(&cobra.Command{
		Use:   usage,
		Short: short,
		Long: long + `
A backend, --lb, or both are needed: the backend in all pools, all backends of the
pool, or that one of that one. The exit code is 4 if there is none.
`,
		Args: cobra.MaximumNArgs(1),
	}, func(c *call) (int, error) { return setState(c, state, waits) })
	addPoolFlag(cmd)
	if waits {
		cmd.Flags().StringP("wait", "", "", "Return once no connection is left, after this time at most")
		completeFlag(cmd, "wait", cobra.NoFileCompletions)
	}
	cmd.ValidArgsFunction = completeBackends
	return cmd
}

func setState(c *call, state string, waits bool) (int, error) {
	var patience time.Duration
	if waits && c.cmd.Flag("wait").Changed {
		d, err := caddy.ParseDuration(text(c.cmd, "wait"))
		if err != nil || d <= 0 {
			return caddy.ExitCodeFailedStartup, fmt.Errorf("--wait %s: want a duration such as 5m", text(c.cmd, "wait"))
		}
		patience = d
	}
	var address string
	if len(c.args) > 0 {
		address = c.args[0]
	}
	return c.change(address, len(c.args) > 0, map[string]any{"state": state}, patience)
}

func weightCommand() *cobra.Command {
	cmd := run(&cobra.Command{
		Use:   "weight [<backend>] <number>|config [--lb <pool>] [--json]",
		Short: "Sets a backend's weight",
		Long: `
The weight, from 0 to 256, holds in place of the config's until it is given back
to that with 'config', over reloads. With 0 the backend gets no new connections,
and those that are open go on.

A backend, --lb, or both are needed. The exit code is 4 if there is none.
`,
		Example: `  $ caddy tcp-lb weight 10.0.0.1:5432 3
  $ caddy tcp-lb weight 10.0.0.1:5432 config`,
		Args: cobra.RangeArgs(1, 2),
	}, setWeight)
	addPoolFlag(cmd)
	cmd.ValidArgsFunction = completeWeight
	return cmd
}

func setWeight(c *call) (int, error) {
	last := c.args[len(c.args)-1]
	var weight any // null is the config's
	if last != "config" {
		n, err := strconv.ParseUint(last, 10, 16)
		if err != nil || n > 256 {
			return caddy.ExitCodeFailedStartup, fmt.Errorf("weight %q: want a number from 0 to 256, or config", last)
		}
		weight = n
	}
	return c.change(c.args[0], len(c.args) > 1, map[string]any{"weight": weight}, 0)
}

// change has the backends changed, and shows them. With patience it waits for their
// connections to end first.
func (c *call) change(address string, named bool, to map[string]any, patience time.Duration) (int, error) {
	query, err := c.filter(address, named)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if len(query) == 0 {
		return caddy.ExitCodeFailedStartup, errors.New("which backend? Give its address, --lb or both")
	}
	r, changed, err := askFor[backend](c.ctx(), c.in, http.MethodPatch, "/tcp_lb/backends", query, to)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	code, left := caddy.ExitCodeSuccess, error(nil)
	if patience > 0 {
		w := wait{call: c, query: query, reply: r, backends: changed, patience: patience}
		code, left = w.run()
		r, changed = w.reply, w.backends
	}
	done, err := c.asJSON(r)
	if !done {
		err = writeBackends(c.out, changed)
	}
	if left != nil {
		return code, left
	}
	return code, err
}
