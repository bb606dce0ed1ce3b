package tcplb

import (
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/mholt/caddy-l4/layer4"
	"go.uber.org/zap"
)

// layer4Server is a server of the layer4 app, as far as it matters here.
type layer4Server struct {
	name      string
	addresses []caddy.NetworkAddress
	serves    bool // a route leads to tcp_lb
	covered   bool // every connection reaches tcp_lb soon, or ends
}

// layer4Servers describes the servers of an app that is being provisioned, by
// name. caddy-l4 drops a route's JSON once its handlers are loaded, so what is
// gone when the first tcp_lb handler asks has none of these in it.
func layer4Servers(app *layer4.App) []*layer4Server {
	list := []*layer4Server{}
	repl := caddy.NewReplacer()
	for name, s := range app.Servers {
		server := &layer4Server{name: name, covered: true}
		for _, listen := range s.Listen {
			// What can't be parsed caddy-l4 refuses.
			if a, err := caddy.ParseNetworkAddress(repl.ReplaceAll(listen, "")); err == nil {
				server.addresses = append(server.addresses, a)
			}
		}
		for _, r := range s.Routes {
			server.serves = server.serves || slices.ContainsFunc(r.HandlersRaw, mentionsTCPLB)
			// A route before the first with tcp_lb in it may or may not be gone.
			server.covered = server.covered && server.serves && leadToTCPLB(r.HandlersRaw)
		}
		server.covered = server.covered && server.serves
		list = append(list, server)
	}
	slices.SortFunc(list, func(a, b *layer4Server) int { return cmp.Compare(a.name, b.name) })
	return list
}

// handlerJSON is what a handler says of where it leads.
type handlerJSON struct {
	Handler string `json:"handler"`
	Routes  []struct {
		Handle []json.RawMessage `json:"handle"`
	} `json:"routes"`
}

// passing are handlers of caddy-l4 after which a connection goes on, and can be
// known again. What others do, and wrap it in, can't be told: it may stay there.
var passing = map[string]bool{
	"tls": true, "proxy_protocol": true, "throttle": true, "tee": true, "vars": true, "postgres_tls": true,
}

// leadToTCPLB reports whether connections that enter a route's handlers reach
// tcp_lb, end, or go on to the next route.
func leadToTCPLB(handlers []json.RawMessage) bool {
	for _, raw := range handlers {
		var h handlerJSON
		if json.Unmarshal(raw, &h) != nil {
			return false
		}
		switch {
		case h.Handler == "tcp_lb", h.Handler == "close", passing[h.Handler]:
		case h.Handler == "subroute":
			for _, r := range h.Routes {
				if !leadToTCPLB(r.Handle) {
					return false
				}
			}
		default:
			return false
		}
	}
	return true
}

// mentionsTCPLB reports whether a tcp_lb handler is somewhere in the JSON.
func mentionsTCPLB(raw json.RawMessage) bool {
	var h handlerJSON
	if json.Unmarshal(raw, &h) == nil && h.Handler == "tcp_lb" {
		return true // and needn't be searched, large as it may be
	}
	var v any
	return json.Unmarshal(raw, &v) == nil && searchTCPLB(v)
}

func searchTCPLB(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		if v["handler"] == "tcp_lb" {
			return true
		}
		for _, inner := range v {
			if searchTCPLB(inner) {
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(v, searchTCPLB)
	}
	return false
}

// claim is a server's claim to an address. It matters here if the server leads
// to tcp_lb or the listener is this package's.
type claim struct {
	server  *layer4Server
	matters bool
}

func (s *layer4Server) claimTo(a caddy.NetworkAddress) claim {
	return claim{s, s.serves || a.Network == networkName}
}

// checkServers refuses listeners that tcp_lb can't serve, and servers that would
// share their connections with another at random.
func checkServers(servers []*layer4Server) error {
	taken := make(map[string]claim)
	for _, s := range servers {
		for _, a := range s.addresses {
			if s.serves && !isStream(a.Network) {
				return fmt.Errorf("layer4 server %q listens on %s: tcp_lb serves TCP connections only", s.name, a)
			}
			mine := s.claimTo(a)
			for key, address := range listenAddresses(a) {
				other := taken[key]
				if other.server != nil && other.server != s && (mine.matters || other.matters) {
					return fmt.Errorf("layer4 servers %q and %q both listen on %s, and each would get connections at random: put the routes of both into one", other.server.name, s.name, address)
				}
				if other.server == nil || mine.matters {
					taken[key] = mine
				}
			}
		}
	}
	return nil
}

// checkHTTPServers does so for HTTP servers beside those of layer4.
func checkHTTPServers(servers []*layer4Server, app *caddyhttp.App) error {
	taken := make(map[string]claim)
	for _, s := range servers {
		for _, a := range s.addresses {
			for key := range listenAddresses(a) {
				if c := s.claimTo(a); c.matters {
					taken[key] = c
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(app.Servers)) {
		for i, listen := range app.Servers[name].Listen {
			a, err := caddy.ParseNetworkAddress(listen)
			if err != nil || !acceptsStreams(app.Servers[name], i) {
				continue
			}
			for key, address := range listenAddresses(a) {
				if other, ok := taken[key]; ok {
					return fmt.Errorf("layer4 server %q and HTTP server %q both listen on %s, and each would get connections at random: give one another port", other.server.name, name, address)
				}
			}
		}
	}
	return nil
}

// coversAddress reports whether a listener of the network tcp_lb on the address
// is one of a server all of whose connections lead to tcp_lb.
func coversAddress(servers []*layer4Server, address string) bool {
	for _, s := range servers {
		for _, a := range s.addresses {
			for offset := range a.PortRangeSize() {
				if a.Network == networkName && a.JoinHostPort(offset) == address {
					return s.covered
				}
			}
		}
	}
	return false
}

// acceptsStreams reports whether an HTTP server's listener is for more than
// HTTP/3, which is on UDP.
func acceptsStreams(s *caddyhttp.Server, i int) bool {
	protocols := s.Protocols
	if i < len(s.ListenProtocols) && s.ListenProtocols[i] != nil {
		protocols = s.ListenProtocols[i]
	}
	return len(protocols) == 0 || slices.ContainsFunc(protocols, func(p string) bool { return p != "h3" })
}

// isStream reports whether tcp_lb can serve the connections of a network. One
// that another module brings may be of any kind.
func isStream(network string) bool {
	switch network {
	case "unixpacket", "unixgram", "fdgram":
		return false
	}
	return !strings.HasPrefix(network, "udp") && !strings.HasPrefix(network, "ip")
}

// listenAddresses yields each single address of a range: a key that is equal
// for addresses with one and the same socket, however they are spelled, and a
// name for people.
func listenAddresses(a caddy.NetworkAddress) iter.Seq2[string, string] {
	return func(yield func(key, name string) bool) {
		for offset := range a.PortRangeSize() {
			one := a.At(offset)
			key := one.Network + "/" + one.JoinHostPort(0)
			switch one.Network {
			case "tcp", "tcp4", "tcp6", networkName:
				if one.StartPort == 0 {
					return // the kernel chooses a free one
				}
				key = net.JoinHostPort(canonicalHost(one), strconv.Itoa(int(one.StartPort)))
			case "unix":
				path, _, _ := strings.Cut(one.Host, "|") // the rest is its permissions
				key = "unix/" + path
			}
			if !yield(key, one.String()) {
				return
			}
		}
	}
}

// canonicalHost is equal for hosts that mean the same to listen(2).
func canonicalHost(a caddy.NetworkAddress) string {
	ip, err := netip.ParseAddr(a.Host)
	switch {
	case a.Host == "" || err == nil && ip.IsUnspecified():
		return strings.TrimPrefix(strings.TrimPrefix(a.Network, networkName), "tcp") // of one family, or both
	case err == nil:
		return ip.Unmap().String()
	case strings.EqualFold(a.Host, "localhost"):
		return "127.0.0.1"
	}
	return strings.ToLower(a.Host)
}

// advised are the listeners about which adviseOfListeners has spoken.
var advised sync.Map

// adviseOfListeners says which listeners could be tcp_lb/ and are not, once each
// for as long as the process runs.
func adviseOfListeners(servers []*layer4Server, to *zap.Logger) {
	if runtime.GOOS != "linux" {
		return // there the network tcp_lb is Caddy's listener
	}
	for _, s := range servers {
		for _, a := range s.addresses {
			if !s.serves || a.Network != "tcp" {
				continue
			}
			if _, said := advised.LoadOrStore(a.String(), true); said {
				continue
			}
			better := a
			better.Network = networkName
			to.Warn("write "+better.String()+" for this listener: as it is, a flood of connections can keep it from accepting for good, a reload loses those that wait, and each takes twice the memory",
				zap.String("server", s.name), zap.String("listener", a.String()))
		}
	}
}
