package command

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
	"github.com/caddyserver/caddy/v2"
	"github.com/spf13/cobra"
)

// backend is what the API says of one, as far as it is shown.
type backend struct {
	LB               string  `json:"lb"`
	Address          string  `json:"address"`
	Configured       bool    `json:"configured"`
	State            string  `json:"state"`
	Weight           int64   `json:"weight"`
	EffectiveWeight  float64 `json:"effective_weight"`
	Backup           bool    `json:"backup"`
	MaxConnections   int64   `json:"max_connections"`
	EjectedUntil     *string `json:"ejected_until"`
	Health           string  `json:"health"`
	Active           uint64  `json:"active"`
	Connecting       uint64  `json:"connecting"`
	ConnectionsTotal uint64  `json:"connections_total"`
	ErrorsTotal      uint64  `json:"errors_total"`
	ReceivedBytes    uint64  `json:"received_bytes"`
	SentBytes        uint64  `json:"sent_bytes"`
	LastError        string  `json:"last_error"`
	LastConnectError string  `json:"last_connect_error"`
}

// pool is what the API says of one, as far as it is shown.
type pool struct {
	LB               string `json:"lb"`
	Backends         int    `json:"backends"`
	Available        int    `json:"available"`
	Active           uint64 `json:"active"`
	Waiting          int64  `json:"waiting"`
	ConnectionsTotal uint64 `json:"connections_total"`
	ErrorsTotal      uint64 `json:"errors_total"`
	RetriesTotal     uint64 `json:"retries_total"`
	NoBackend        uint64 `json:"no_backend"`
	MaxConnections   uint64 `json:"max_connections"`
	OverClientLimit  uint64 `json:"max_connections_per_client"`
	ReceivedBytes    uint64 `json:"received_bytes"`
	SentBytes        uint64 `json:"sent_bytes"`

	Sources []json.RawMessage `json:"sources"` // may find backends
}

func statusCommand() *cobra.Command {
	cmd := run(&cobra.Command{
		Use:   "status [--lb <pool>] [--json]",
		Short: "Shows pools and backends",
		Long: `
Shows each pool, and each backend with its health, state and weight, open and
finished connections, failed connects, bytes from and to clients, and the last
error of a check or a connect. A weight that was set by hand has the config's
behind it in parentheses. The state "left" is that of a backend that has left the
config, and of which connections are open; behind "ready" it says if the backend is
a backup, full, or out for a while since clients' connections failed.

With --json it is {"pools": [...], "backends": [...]}, the answers of
/tcp_lb/pools and /tcp_lb/backends.

The exit code is 5 if a pool has no available backend, and 4 if there is no
pool, or none of that name.
`,
		Args: cobra.NoArgs,
	}, status)
	addPoolFlag(cmd)
	return cmd
}

func status(c *call) (int, error) {
	query, err := c.filter("", false)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	poolsReply, pools, err := askFor[pool](c.ctx(), c.in, http.MethodGet, "/tcp_lb/pools", query, nil)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	backendsReply, backends, err := askFor[backend](c.ctx(), c.in, http.MethodGet, "/tcp_lb/backends", query, nil)
	if err != nil {
		return caddy.ExitCodeFailedStartup, err
	}
	both := reply{body: fmt.Appendf(nil, "{\"pools\":%s,\"backends\":%s}\n", trimmed(poolsReply), trimmed(backendsReply))}
	if done, err := c.asJSON(both); err != nil {
		return caddy.ExitCodeFailedStartup, err
	} else if !done && len(pools) > 0 {
		if err := errors.Join(writePools(c.out, pools), newLine(c.out), writeBackends(c.out, backends)); err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
	}
	return verdict(pools, query)
}

func trimmed(r reply) string { return strings.TrimSpace(string(r.body)) }

func newLine(w io.Writer) error {
	_, err := io.WriteString(w, "\n")
	return err
}

// verdict is the exit code for the pools, with its reason.
func verdict(pools []pool, query url.Values) (int, error) {
	if len(pools) == 0 && query.Has("lb") {
		return exitNoneMatched, noneMatched(fmt.Sprintf("there is no pool %q", query.Get("lb")))
	}
	if len(pools) == 0 {
		return exitNoneMatched, noneMatched("there is no pool: the config has no tcp_lb handler")
	}
	var without []string
	for _, p := range pools {
		inConfig := p.Backends > 0 || len(p.Sources) > 0 // else it left that and is being drained
		if p.Available == 0 && inConfig {
			without = append(without, p.LB)
		}
	}
	if len(without) > 0 {
		return exitNotReady, fmt.Errorf("no backend is available: %s", strings.Join(without, ", "))
	}
	return caddy.ExitCodeSuccess, nil
}

var poolColumns = []column{
	{title: "LB"}, {title: "AVAILABLE"}, {"OPEN", true}, {"WAITING", true}, {"TOTAL", true}, {"ERRORS", true}, {"RETRIES", true},
	{"TURNED AWAY", true}, {"RECEIVED", true}, {"SENT", true},
}

func writePools(w io.Writer, pools []pool) error {
	var rows [][]string
	for _, p := range pools {
		rows = append(rows, []string{
			p.LB, fmt.Sprintf("%d of %d", p.Available, p.Backends), words.Count(p.Active), words.Count(uint64(max(p.Waiting, 0))), words.Count(p.ConnectionsTotal),
			words.Count(p.ErrorsTotal), words.Count(p.RetriesTotal), words.Count(p.NoBackend + p.MaxConnections + p.OverClientLimit), words.Size(p.ReceivedBytes), words.Size(p.SentBytes),
		})
	}
	return writeTable(w, poolColumns, rows)
}

var backendColumns = []column{
	{title: "LB"}, {title: "BACKEND"}, {title: "HEALTH"}, {title: "STATE"}, {"WEIGHT", true}, {"OPEN", true}, {"TOTAL", true}, {"ERRORS", true},
	{"RECEIVED", true}, {"SENT", true}, {title: "LAST ERROR"},
}

func writeBackends(w io.Writer, backends []backend) error {
	var rows [][]string
	for _, b := range backends {
		rows = append(rows, []string{
			b.LB, b.Address, b.Health, b.state(), b.weight(), words.Count(b.Active), words.Count(b.ConnectionsTotal), words.Count(b.ErrorsTotal),
			words.Size(b.ReceivedBytes), words.Size(b.SentBytes), b.trouble(),
		})
	}
	return writeTable(w, backendColumns, rows)
}

// state is what was set by hand, of a backend that is in the config, and what else
// keeps clients from one that is ready.
func (b backend) state() string {
	switch {
	case !b.Configured:
		return "left"
	case b.State != "ready":
		return b.State
	case b.EjectedUntil != nil:
		return "ready, out"
	case b.MaxConnections > 0 && b.Active+b.Connecting >= uint64(b.MaxConnections):
		return "ready, full"
	case b.Backup:
		return "ready, backup"
	}
	return b.State
}

func (b backend) weight() string {
	if b.Configured && b.State == "ready" && b.EffectiveWeight != float64(b.Weight) {
		return fmt.Sprintf("%v (%d)", b.EffectiveWeight, b.Weight)
	}
	return fmt.Sprint(b.Weight)
}

// trouble is the last error that has not been followed by a success.
func (b backend) trouble() string {
	text := cmp.Or(b.LastError, b.LastConnectError)
	for _, network := range []string{"tcp", "unix"} { // which the row has
		text = strings.TrimPrefix(text, "dial "+network+" "+strings.TrimPrefix(b.Address, "unix/")+": ")
	}
	return words.Brief(text)
}
