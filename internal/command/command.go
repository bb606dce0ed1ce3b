// Package command is caddy tcp-lb: what the admin API of a running Caddy shows and
// does, from a shell. It knows of tcp_lb what that API says, and nothing else.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

// Exit codes beside Caddy's own: 0 for done, 1 for what failed.
const (
	exitNoneMatched = 4 // no such pool, backend or connection
	exitNotReady    = 5 // a pool without an available backend, or connections that outlast --wait
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "tcp-lb",
		Usage: "<command>",
		Short: "Shows and steers the TCP load balancer of the running Caddy instance",
		Long: `
Shows the pools, backends and connections of the running Caddy instance's tcp_lb
handlers, takes backends out of work and brings them back, and cuts connections.

What is changed here is kept until it is changed again: over reloads, and while
a backend is away, but not over the end of the process.

The admin endpoint is found as by 'caddy stop': it is that of --address if
specified; otherwise it is loaded from the given config file; otherwise the
default is assumed.

A backend is named by its address, as 'caddy tcp-lb status' shows it, and means
that address in all pools unless --lb names one.

The exit code is 0 if all is done, 1 if something failed, 4 if no such pool,
backend or connection is there, and 5 if a pool has no available backend
(status), or connections are still open (--wait).
`,
		CobraFunc: setUp,
	})
}

// call is one run of a subcommand.
type call struct {
	cmd  *cobra.Command
	args []string
	in   *instance
	out  io.Writer
	note io.Writer // what is not the answer
}

func (c *call) ctx() context.Context {
	if ctx := c.cmd.Context(); ctx != nil {
		return ctx
	}
	return context.Background()
}

// setUp makes cmd the parent of the subcommands.
func setUp(cmd *cobra.Command) {
	cmd.Example = `  $ caddy tcp-lb status
  $ caddy tcp-lb drain 10.0.0.1:5432 --wait 5m && ssh 10.0.0.1 reboot
  $ caddy tcp-lb ready 10.0.0.1:5432
  $ caddy tcp-lb kill --client 192.0.2.7`
	flags := cmd.PersistentFlags()
	flags.StringP("config", "c", "", "Configuration file that says where the admin endpoint is")
	flags.StringP("adapter", "a", "", "Name of config adapter to apply")
	flags.StringP("address", "", "", "Address of the administration listener, if different from config")
	flags.BoolP("json", "", false, "Print the admin endpoint's answer as it is")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		hint := ""
		if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
			hint = ": did you mean " + strings.Join(like, " or ") + "?"
		}
		return fmt.Errorf("unknown command %q for %q%s", args[0], cmd.CommandPath(), hint)
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	cmd.AddCommand(statusCommand(), connectionsCommand(), killCommand(), readyCommand(), drainCommand(), maintCommand(), weightCommand())
}

// run makes f the command's function. Errors go where those of Caddy's other
// commands go.
func run(cmd *cobra.Command, f func(*call) (int, error)) *cobra.Command {
	cmd.DisableFlagsInUseLine = true // Use has them
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) {
			in, err := instanceOf(cmd)
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			code, err := f(&call{cmd: cmd, args: args, in: in, out: cmd.OutOrStdout(), note: cmd.ErrOrStderr()})
			var none noneMatched
			switch {
			case errors.As(err, &none):
				code = exitNoneMatched
			case err != nil && code == caddy.ExitCodeSuccess:
				code = caddy.ExitCodeFailedStartup
			}
			return code, err
		})(cmd, args)
	}
	return cmd
}

func instanceOf(cmd *cobra.Command) (*instance, error) {
	return findInstance(text(cmd, "address"), text(cmd, "config"), text(cmd, "adapter"))
}

// text returns a flag's value.
func text(cmd *cobra.Command, flag string) string { return cmd.Flag(flag).Value.String() }

// asJSON reports whether the answer is wanted as it is, and if so writes it.
func (c *call) asJSON(r reply) (bool, error) {
	if text(c.cmd, "json") != "true" {
		return false, nil
	}
	_, err := c.out.Write(r.body)
	return true, err
}

// filter returns what --lb and the backend's address say. Empty ones are a
// script's variables that are not set, and would mean everything.
func (c *call) filter(address string, named bool) (url.Values, error) {
	query := make(url.Values)
	if named {
		if address == "" {
			return nil, errors.New("the backend's address is empty: leave it out for all")
		}
		query.Set("address", address)
	}
	return query, c.addFlags(query, "lb")
}

// addFlags adds those flags that are set.
func (c *call) addFlags(query url.Values, names ...string) error {
	for _, name := range names {
		flag := c.cmd.Flag(name)
		if !flag.Changed {
			continue
		}
		if flag.Value.String() == "" {
			return fmt.Errorf("--%s is empty: leave it out for all", name)
		}
		query.Set(name, flag.Value.String())
	}
	return nil
}

// backendOf is filter of a command whose only argument is a backend.
func (c *call) backendOf() (url.Values, error) {
	if len(c.args) == 0 {
		return c.filter("", false)
	}
	return c.filter(c.args[0], true)
}
