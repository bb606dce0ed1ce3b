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
	addresses []listenAddress
	pools     []string // to which routes lead
	serves    bool     // to any
	covered   bool     // every connection reaches tcp_lb soon, or ends
}

// listenAddress is an address on which a server listens, and how the config has it.
type listenAddress struct {
	caddy.NetworkAddress
	text string
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
				server.addresses = append(server.addresses, listenAddress{a, listen})
			}
		}
		for _, r := range s.Routes {
			for _, raw := range r.HandlersRaw {
				for _, pool := range poolsIn(raw) {
					server.pools = append(server.pools, repl.ReplaceAll(pool, ""))
				}
			}
			server.serves = len(server.pools) > 0
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
	Name    string `json:"name"`
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

// poolsIn returns the names of the tcp_lb handlers that are somewhere in the JSON.
func poolsIn(raw json.RawMessage) []string {
	var h handlerJSON
	if json.Unmarshal(raw, &h) == nil && h.Handler == "tcp_lb" {
		return []string{cmp.Or(h.Name, defaultName)} // and needn't be searched, large as it may be
	}
	var v any
	if json.Unmarshal(raw, &v) != nil {
		return nil
	}
	return searchPools(v)
}

func searchPools(v any) (names []string) {
	switch v := v.(type) {
	case map[string]any:
		if v["handler"] == "tcp_lb" {
			name, _ := v["name"].(string)
			return []string{cmp.Or(name, defaultName)}
		}
		for _, inner := range v {
			names = append(names, searchPools(inner)...)
		}
	case []any:
		for _, inner := range v {
			names = append(names, searchPools(inner)...)
		}
	}
	return names
}

// claim is a server's claim to an address. It matters here if the server leads
// to tcp_lb or the listener is this package's.
type claim struct {
	server  *layer4Server
	as      string // what the config calls the address
	matters bool
}

func (s *layer4Server) claimTo(a listenAddress) claim {
	return claim{s, a.text, s.serves || a.Network == networkName}
}

// String says which server it is, by its listener: a Caddyfile has no names of
// servers.
func (c claim) String() string {
	return fmt.Sprintf("the layer4 server of %s (%q)", c.as, c.server.name)
}

// checkServers refuses listeners that tcp_lb can't serve, and servers that would
// share their connections with another at random.
func checkServers(servers []*layer4Server) error {
	taken := make(map[string]claim)
	for _, s := range servers {
		for _, a := range s.addresses {
			mine := s.claimTo(a)
			if mine.matters {
				if err := a.check(s); err != nil {
					return err
				}
			}
			for key, address := range listenAddresses(a.NetworkAddress) {
				other := taken[key]
				if other.server != nil && other.server != s && (mine.matters || other.matters) {
					return fmt.Errorf("%s and %s both listen on %s, and each would get connections at random: put the routes of both into one", other, mine, address)
				}
				if other.server == nil || mine.matters {
					taken[key] = mine
				}
			}
		}
	}
	return nil
}

// check refuses what tcp_lb can't serve, and what Caddy takes for something else
// than its writer does.
func (a listenAddress) check(s *layer4Server) error {
	wrong := func(why string) error {
		return fmt.Errorf("layer4 server %q listens on %s: %s", s.name, a.text, why)
	}
	path, isPath := strings.CutPrefix(a.Host, "unix/")
	_, literal := netip.ParseAddr(a.Host)
	switch {
	case s.serves && !isStream(a.Network):
		return fmt.Errorf("layer4 server %q listens on %s: tcp_lb serves TCP connections only", s.name, a)
	case caddy.IsUnixNetwork(a.Network), caddy.IsFdNetwork(a.Network):
		return nil
	case a.Network == networkName && isPath:
		return wrong("tcp_lb/ is TCP: write unix/" + path)
	case a.Host == networkName && a.Network == "tcp" && !strings.HasPrefix(a.text, "tcp/"):
		return wrong(fmt.Sprintf("is tcp_lb/:%s meant? tcp_lb: is a host of that name (tcp/%s if it is)", a.PortRange(), a.text))
	case a.hasPort(), !portNetworks[a.Network]:
		return nil
	case literal != nil && strings.Contains(a.Host, ":"):
		return wrong("the port is missing, or an IPv6 address lacks its brackets, [IPv6]:port")
	case hasPlaceholder(a.text):
		return wrong("the port is missing: a placeholder is empty")
	}
	return wrong("the port is missing (0 is one that the kernel chooses)")
}

// portNetworks are those whose addresses must have a port. What other modules
// bring may do without.
var portNetworks = map[string]bool{"tcp": true, "tcp4": true, "tcp6": true, networkName: true}

// PortRange returns the ports as they are written.
func (a listenAddress) PortRange() string {
	if a.EndPort > a.StartPort {
		return fmt.Sprintf("%d-%d", a.StartPort, a.EndPort)
	}
	return strconv.Itoa(int(a.StartPort))
}

// hasPort reports whether a port is written, if only 0.
func (a listenAddress) hasPort() bool {
	if a.StartPort > 0 {
		return true
	}
	_, _, port, err := caddy.SplitNetworkAddress(caddy.NewReplacer().ReplaceAll(a.text, ""))
	return err == nil && port != ""
}

// checkHTTPServers does so for HTTP servers beside those of layer4.
func checkHTTPServers(servers []*layer4Server, app *caddyhttp.App) error {
	taken := make(map[string]claim)
	for _, s := range servers {
		for _, a := range s.addresses {
			for key := range listenAddresses(a.NetworkAddress) {
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
					return fmt.Errorf("%s and %s both listen on %s, and each would get connections at random: %s", other, httpServer(name, listen), address, apart(name, a))
				}
			}
		}
	}
	return nil
}

// redirects is what Caddy calls the server that it adds for redirects to HTTPS.
const redirects = "remaining_auto_https_redirects"

// httpServer says which server it is, as claim does.
func httpServer(name, listen string) string {
	if name == redirects {
		return "Caddy's own server of redirects to HTTPS"
	}
	return fmt.Sprintf("the HTTP server of %s (%q)", listen, name)
}

// apart says how an HTTP server gets out of the way.
func apart(name string, a caddy.NetworkAddress) string {
	switch {
	case name == redirects:
		return "turn that off by the global option auto_https disable_redirects, or move it by http_port"
	case caddy.IsUnixNetwork(a.Network):
		return "give one another path"
	}
	return "give one another port"
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
			if !s.serves || a.Network != "tcp" { // which tcp_lb/ can stand for
				continue
			}
			if _, said := advised.LoadOrStore(a.String(), true); said {
				continue
			}
			better := a.NetworkAddress
			better.Network = networkName
			to.Warn("write "+better.String()+" for this listener: as it is, a flood of connections can keep it from accepting for good, a reload loses those that wait, and each takes many times the memory while it rests",
				zap.String("server", s.name), zap.String("listener", a.String()))
		}
	}
}
