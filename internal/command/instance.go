package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
)

// instance is a running Caddy, by its admin endpoint. Caddy's own client for that
// waits for ever for one that doesn't answer, and makes a text of the status.
type instance struct {
	name   string // for messages
	url    string
	client http.Client
	unix   bool
	// timeout is for one request.
	timeout time.Duration
}

const (
	answerTimeout = 30 * time.Second
	maxAnswer     = 256 << 20
	defaultPort   = 2019
)

// findInstance finds the admin endpoint as caddy stop does.
func findInstance(address, configFile, adapter string) (*instance, error) {
	var config []byte
	if address == "" && configFile != "" {
		var err error
		if config, _, _, err = caddycmd.LoadConfig(configFile, adapter); err != nil {
			return nil, err
		}
		var c struct {
			Admin struct {
				Disabled bool `json:"disabled"`
			} `json:"admin"`
		}
		if err := json.Unmarshal(config, &c); err == nil && c.Admin.Disabled {
			return nil, fmt.Errorf("%s turns the admin endpoint off, without which nothing can be asked or changed", configFile)
		}
	}
	address, err := caddycmd.DetermineAdminAPIAddress(address, config, configFile, adapter)
	if err != nil {
		return nil, fmt.Errorf("finding the admin endpoint: %w", err)
	}
	return instanceAt(address)
}

func instanceAt(address string) (*instance, error) {
	resolved, err := caddy.NewReplacer().ReplaceOrErr(address, true, true)
	if err != nil {
		return nil, fmt.Errorf("admin endpoint %q: %w", address, err)
	}
	na, err := caddy.ParseNetworkAddressWithDefaults(resolved, "tcp", defaultPort)
	switch {
	case err != nil:
		return nil, fmt.Errorf("admin endpoint %q: %w", address, err)
	case na.PortRangeSize() > 1:
		return nil, fmt.Errorf("admin endpoint %q: want one port", address)
	case na.IsFdNetwork():
		return nil, fmt.Errorf("admin endpoint %q is a file of that process: give its address with --address", address)
	}
	i := &instance{name: na.String(), unix: na.IsUnixNetwork(), timeout: answerTimeout}
	network, dialed := na.Network, na.JoinHostPort(0)
	i.url = "http://" + dialed
	if i.unix {
		dialed, _, _ = strings.Cut(na.Host, "|") // its permissions may follow
		i.url = "http://127.0.0.1"               // Caddy wants some host
	}
	i.client.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, dialed)
		},
	}
	return i, nil
}

// noneMatched is that there is no such pool, backend or connection.
type noneMatched string

func (n noneMatched) Error() string { return string(n) }

// reply is an answer that is no error.
type reply struct {
	header http.Header
	body   []byte
}

// ask sends a request, and again where the endpoint gave way to that of another
// config in between, unless a second one could do more than the first.
func (i *instance) ask(ctx context.Context, method, path string, query url.Values, body any) (reply, error) {
	ctx, cancel := context.WithTimeout(ctx, i.timeout)
	defer cancel()
	for tries := 1; ; tries++ {
		r, err := i.askOnce(ctx, method, path, query, body)
		if tries == 3 || method == http.MethodDelete || !errors.Is(err, io.EOF) {
			return r, err
		}
	}
}

func (i *instance) askOnce(ctx context.Context, method, path string, query url.Values, body any) (reply, error) {
	var content []byte
	if body != nil {
		var err error
		if content, err = json.Marshal(body); err != nil {
			return reply{}, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, i.url+path+"?"+query.Encode(), bytes.NewReader(content))
	if err != nil {
		return reply{}, err
	}
	if !i.unix { // there Caddy allows none
		req.Header.Set("Origin", i.url)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := i.client.Do(req)
	if err != nil {
		return reply{}, i.unreachable(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return reply{}, i.unreachable(err)
	case len(answer) > maxAnswer:
		return reply{}, fmt.Errorf("the answer of %s is larger than %s", i.name, words.Size(maxAnswer))
	case resp.StatusCode >= http.StatusBadRequest:
		return reply{}, i.refusal(resp.StatusCode, answer)
	}
	return reply{resp.Header, answer}, nil
}

// away is the error of an endpoint that gave no answer, and may do so later.
type away struct{ error }

func (a away) Unwrap() error { return a.error }

func (i *instance) unreachable(err error) error {
	var inner *url.Error
	if errors.As(err, &inner) { // whose text has the whole request
		err = inner.Err
	}
	var op *net.OpError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return away{fmt.Errorf("no answer from the admin endpoint at %s: %w", i.name, err)}
	case errors.As(err, &op) && op.Op == "dial":
		return away{fmt.Errorf("no Caddy has its admin endpoint at %s, --address and --config say where it is: %w", i.name, err)}
	}
	return away{fmt.Errorf("asking the admin endpoint at %s: %w", i.name, err)}
}

// refusal is the error of an answer.
func (i *instance) refusal(status int, answer []byte) error {
	var said struct {
		Error string `json:"error"`
	}
	known := json.Unmarshal(answer, &said) == nil && said.Error != ""
	switch {
	case known && status == http.StatusNotFound:
		return noneMatched(said.Error)
	case known:
		return errors.New(said.Error)
	case status == http.StatusNotFound || status == http.StatusMethodNotAllowed:
		return fmt.Errorf("the Caddy at %s has no tcp_lb, or one of another version", i.name)
	}
	return fmt.Errorf("%s answers with status %d", i.name, status)
}

// decode reads the answer's list.
func decode[T any](i *instance, r reply) ([]T, error) {
	var list []T
	if err := json.Unmarshal(r.body, &list); err != nil {
		return nil, fmt.Errorf("%s answers what is no list, is it a Caddy? %w", i.name, err)
	}
	return list, nil
}

// askFor is ask for a list.
func askFor[T any](ctx context.Context, i *instance, method, path string, query url.Values, body any) (reply, []T, error) {
	r, err := i.ask(ctx, method, path, query, body)
	if err != nil {
		return r, nil, err
	}
	list, err := decode[T](i, r)
	return r, list, err
}
