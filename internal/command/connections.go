package command

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
	"github.com/caddyserver/caddy/v2"
	"github.com/spf13/cobra"
)

// connection is what the API says of one.
type connection struct {
	LB            string  `json:"lb"`
	Client        string  `json:"client"`
	Backend       string  `json:"backend"`
	Age           float64 `json:"age"`
	Idle          float64 `json:"idle"`
	ReceivedBytes uint64  `json:"received_bytes"`
	SentBytes     uint64  `json:"sent_bytes"`
}

func connectionsCommand() *cobra.Command {
	cmd := run(&cobra.Command{
		Use:   "connections [<backend>] [--lb <pool>] [--client <address>] [--sort age|bytes|idle] [--limit <number>] [--json]",
		Short: "Shows open connections",
		Long: `
Shows who is connected to which backend, since when, how long there was no byte
either way, and the bytes from and to the client.

The first are those that are open longest or, with --sort, moved most bytes or
rest longest. A client is an IP address, one with its port, or a prefix such as
192.0.2.0/24.
`,
		Example: `  $ caddy tcp-lb connections 10.0.0.1:5432 --sort idle
  $ caddy tcp-lb connections --client 192.0.2.0/24 --limit 0`,
		Args: cobra.MaximumNArgs(1),
	}, connections)
	addConnectionFlags(cmd, "100", "Show this many at most; 0 = all")
	return cmd
}

func killCommand() *cobra.Command {
	cmd := run(&cobra.Command{
		Use:   "kill [<backend>] [--lb <pool>] [--client <address>] [--sort age|bytes|idle] [--limit <number>] [--json]",
		Short: "Cuts open connections",
		Long: `
Cuts the open connections of a backend, a pool or a client, and shows which. Both
sides see a reset. Nothing keeps the client from coming back, see 'caddy tcp-lb
drain' for that.

At least one of backend, --lb and --client is needed. With --limit only so many
are cut, those that are open longest or, with --sort, moved most bytes or rest
longest.

The exit code is 4 if there is no such connection.
`,
		Example: `  $ caddy tcp-lb kill --client 192.0.2.7
  $ caddy tcp-lb kill 10.0.0.1:5432 --sort idle --limit 10`,
		Args: cobra.MaximumNArgs(1),
	}, kill)
	addConnectionFlags(cmd, "0", "Cut this many at most; 0 = all")
	return cmd
}

func addConnectionFlags(cmd *cobra.Command, limit, limitHelp string) {
	addPoolFlag(cmd)
	cmd.Flags().StringP("client", "", "", "Only those of this client: an IP address, one with its port, or a prefix")
	cmd.Flags().StringP("sort", "", "age", "Which are first: age, bytes or idle")
	cmd.Flags().StringP("limit", "", limit, limitHelp)
	completeFlag(cmd, "sort", cobra.FixedCompletions([]string{"age", "bytes", "idle"}, cobra.ShellCompDirectiveNoFileComp))
	completeFlag(cmd, "client", cobra.NoFileCompletions)
	completeFlag(cmd, "limit", cobra.NoFileCompletions)
	cmd.ValidArgsFunction = completeBackends
}

func (c *call) connectionQuery() (url.Values, error) {
	query, err := c.backendOf()
	if err == nil {
		err = c.addFlags(query, "client", "sort", "limit")
	}
	return query, err
}

func connections(c *call) (int, error) {
	query, err := c.connectionQuery()
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	r, list, err := askFor[connection](c.ctx(), c.in, http.MethodGet, "/tcp_lb/connections", query, nil)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if done, err := c.asJSON(r); done {
		return caddy.ExitCodeSuccess, err
	}
	if len(list) == 0 {
		if code, err := c.isThere(query); err != nil {
			return code, err
		}
	}
	err = writeConnections(c.out, list)
	if total, bad := strconv.Atoi(r.header.Get("X-Total-Count")); bad == nil && total > len(list) {
		_, noteErr := fmt.Fprintf(c.out, "%d of %d, --limit 0 shows all\n", len(list), total)
		err = errors.Join(err, noteErr)
	}
	return caddy.ExitCodeSuccess, err
}

func kill(c *call) (int, error) {
	query, err := c.connectionQuery()
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if !query.Has("address") && !query.Has("lb") && !query.Has("client") {
		return caddy.ExitCodeFailedStartup, errors.New("which connections? Give a backend, --lb or --client")
	}
	r, list, err := askFor[connection](c.ctx(), c.in, http.MethodDelete, "/tcp_lb/connections", query, nil)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	if done, err := c.asJSON(r); done {
		return caddy.ExitCodeSuccess, err
	}
	err = writeConnections(c.out, list)
	_, noteErr := fmt.Fprintf(c.out, "%s cut\n", words.Plural(uint64(len(list)), "connection is", "connections are"))
	return caddy.ExitCodeSuccess, errors.Join(err, noteErr)
}

var connectionColumns = []column{
	{title: "LB"}, {title: "CLIENT"}, {title: "BACKEND"}, {"AGE", true}, {"IDLE", true}, {"RECEIVED", true}, {"SENT", true},
}

func writeConnections(w io.Writer, list []connection) error {
	var rows [][]string
	for _, c := range list {
		rows = append(rows, []string{
			c.LB, c.Client, c.Backend, words.Span(c.Age), words.Span(c.Idle), words.Size(c.ReceivedBytes), words.Size(c.SentBytes),
		})
	}
	return writeTable(w, connectionColumns, rows)
}

// isThere returns an error if there is no such pool or backend, which may be a
// slip of the pen: without it all is quiet there, it seems.
func (c *call) isThere(query url.Values) (int, error) {
	which := url.Values{}
	for _, key := range []string{"lb", "address"} {
		if query.Has(key) {
			which.Set(key, query.Get(key))
		}
	}
	if len(which) == 0 {
		return caddy.ExitCodeSuccess, nil
	}
	_, backends, err := askFor[backend](c.ctx(), c.in, http.MethodGet, "/tcp_lb/backends", which, nil)
	if err != nil || len(backends) > 0 {
		return caddy.ExitCodeFailedStartup, err
	}
	return exitNoneMatched, noneMatched("there is no such pool or backend")
}
