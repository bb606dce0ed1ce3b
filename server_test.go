package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/mholt/caddy-l4/layer4"
	"github.com/stretchr/testify/require"
)

const toNowhere = `"backends":[{"address":"127.0.0.1:1"}]}`

// layer4Routes is a server's routes, each a list of handlers in JSON.
func layer4Routes(routes ...string) string {
	for i, r := range routes {
		routes[i] = `{"handle":[` + r + `]}`
	}
	return `"routes":[` + strings.Join(routes, ",") + `]`
}

// A time limit may hit connections on their way to tcp_lb only.
func TestCoveredServers(t *testing.T) {
	const lb = `{"handler":"tcp_lb","backends":[{"address":"a:1"}]}`
	for routes, want := range map[string]struct{ serves, covered bool }{
		layer4Routes():                                {false, false},
		layer4Routes(lb):                              {true, true},
		layer4Routes(lb, lb):                          {true, true},
		layer4Routes(`{"handler":"tls"},` + lb):       {true, true},
		layer4Routes(`{"handler":"of_others"},` + lb): {true, false}, // it may wrap them in what hides them
		layer4Routes(lb, `{"handler":"of_others"}`):   {true, false},
		layer4Routes(lb, `{"handler":"close"}`):       {true, true},
		layer4Routes(lb, `{"handler":"tls"}`):         {true, true},
		layer4Routes(lb, `{"handler":"echo"}`):        {true, false},
		layer4Routes(`{"handler":"echo"}`, lb):        {true, false},
		layer4Routes(lb, `{"handler":"echo"},`+lb):    {true, false},
		layer4Routes(`{"handler":"close"}`, lb):       {true, false}, // what is gone by then can't be told from echo
		layer4Routes(`{"handler":"proxy"}`):           {false, false},
		`"routes":[{},{"handle":[` + lb + `]}]`:       {true, false},
		layer4Routes(lb) + `,"listen":["udp/:53"]`:    {true, true},
		layer4Routes(`{"handler":"subroute",` + layer4Routes(lb, `{"handler":"close"}`) + `}`):         {true, true},
		layer4Routes(`{"handler":"subroute",` + layer4Routes(lb, `{"handler":"echo"}`) + `}`):          {true, false},
		layer4Routes(`{"handler":"subroute",` + layer4Routes(`{"handler":"of_others"},`+lb) + `}`):     {true, false},
		layer4Routes(`{"handler":"proxy_protocol"},{"handler":"throttle"},{"handler":"vars"},` + lb):   {true, true},
		layer4Routes(lb, `{"handler":"subroute",`+layer4Routes(`{"handler":"tls"}`)+`}`):               {true, true},
		layer4Routes(`{"handler":"tee","branch":[{"handler":"of_others","then":[` + lb + `]}]},` + lb): {true, true},
		layer4Routes(`{"handler":"of_others","then":[` + lb + `]}`):                                    {true, false},
	} {
		t.Run(routes, func(t *testing.T) {
			var app layer4.App
			require.NoError(t, json.Unmarshal([]byte(`{"servers":{"srv":{`+routes+`}}}`), &app))
			s := layer4Servers(&app)[0]
			require.Equal(t, want.serves, s.serves, "serves")
			require.Equal(t, want.covered, s.covered, "covered")
		})
	}
}

// Whichever server is provisioned first, all are known.
func TestServersAreKnownWhicheverComesFirst(t *testing.T) {
	for range 20 {
		list := ""
		for i := range 6 {
			list += fmt.Sprintf(`"s%d":{"listen":["127.0.0.1:%d"],"routes":[{"handle":[{"handler":"echo"}]}]},`, i, 15000+i)
			list += lbAt(fmt.Sprintf("lb%d", i), fmt.Sprintf("127.0.0.1:%d", 15010+i), toNowhere) + ","
		}
		err := validate(t, layer4Config(list+lbAt("udp", "udp/127.0.0.1:15030", toNowhere)))
		require.ErrorContains(t, err, `layer4 server "udp" listens on udp/127.0.0.1:15030: tcp_lb serves TCP connections only`)
	}
}

func TestListenersThatCannotServe(t *testing.T) {
	lb := func(listen string) string { return lbAt("srv", listen, toNowhere) }
	nested := `"srv":{"listen":["udp/127.0.0.1:15000"],` + layer4Routes(`{"handler":"subroute",`+layer4Routes(withHandler(toNowhere))+`}`) + `}`
	echoOn := func(name, listen string) string {
		return fmt.Sprintf(`%q:{"listen":[%q],"routes":[{"handle":[{"handler":"echo"}]}]}`, name, listen)
	}
	t.Setenv("TCPLB_TEST_LISTEN", "udp/127.0.0.1:15000")
	const both = "both listen on "
	for name, c := range map[string]struct{ servers, want string }{
		"UDP":                           {lb("udp/127.0.0.1:15000"), "tcp_lb serves TCP connections only"},
		"UDP of one family":             {lb("udp4/127.0.0.1:15000"), "serves TCP connections only"},
		"UDP, spelled otherwise":        {lb("{env.TCPLB_TEST_LISTEN}"), "serves TCP connections only"},
		"UDP, in a subroute":            {nested, `"srv" listens on udp/127.0.0.1:15000`},
		"a host tcp_lb":                 {lb("tcp_lb:15000"), "listens on tcp_lb:15000: is tcp_lb/:15000 meant?"},
		"a host tcp_lb, a range":        {lb("tcp_lb:15000-15002"), "is tcp_lb/:15000-15002 meant?"},
		"a host tcp_lb that is meant":   {lb("tcp/tcp_lb:15000"), ""},
		"tcp_lb/ with a path":           {lb("tcp_lb/unix//tmp/x"), "tcp_lb/ is TCP: write unix//tmp/x"},
		"IPv6 without brackets":         {lb("tcp_lb/::1:15000"), "an IPv6 address lacks its brackets"},
		"no port":                       {lb("tcp_lb/127.0.0.1"), "listens on tcp_lb/127.0.0.1: the port is missing"},
		"no port, but a colon":          {lb("tcp_lb/127.0.0.1:"), "the port is missing (0 is one"},
		"no port, plain":                {lb("127.0.0.1"), "the port is missing"},
		"a port that is empty":          {lb("tcp_lb/:{env.TCPLB_TEST_UNSET}"), "listens on tcp_lb/:{env.TCPLB_TEST_UNSET}: the port is missing: a placeholder is empty"},
		"no port, of others":            {lb("127.0.0.1:15000") + "," + echoOn("other", "127.0.0.1"), ""},
		"datagrams by path":             {lb("unixgram//tmp/x"), "serves TCP connections only"},
		"packets by path":               {lb("unixpacket//tmp/x"), "serves TCP connections only"},
		"raw IP":                        {lb("ip:icmp/127.0.0.1"), "serves TCP connections only"},
		"UDP that leads elsewhere":      {lb("127.0.0.1:15000") + "," + echoOn("other", "udp/127.0.0.1:15000"), ""},
		"stream by path":                {lb("unix//tmp/x"), ""},
		"one address twice":             {lb("tcp_lb/127.0.0.1:15000") + "," + lbAt("b", "tcp_lb/127.0.0.1:15000", toNowhere), `the layer4 server of tcp_lb/127.0.0.1:15000 ("b") and the layer4 server of tcp_lb/127.0.0.1:15000 ("srv") ` + both + "tcp_lb/127.0.0.1:15000"},
		"one address, two networks":     {lb("tcp_lb/127.0.0.1:15000") + "," + lbAt("t", "127.0.0.1:15000", toNowhere), both + "127.0.0.1:15000"},
		"one address, one elsewhere":    {lb("tcp_lb/127.0.0.1:15000") + "," + echoOn("b", "127.0.0.1:15000"), both},
		"one address, other spelling":   {lb("tcp_lb/localhost:15000") + "," + echoOn("b", "127.0.0.1:15000"), both},
		"wildcards":                     {lb("tcp_lb/0.0.0.0:15000") + "," + echoOn("b", ":15000"), both},
		"IPv6":                          {lb("tcp_lb/[::1]:15000") + "," + echoOn("b", "[0:0::1]:15000"), both},
		"ranges":                        {lb("tcp_lb/127.0.0.1:15000-15010") + "," + echoOn("b", "127.0.0.1:15010-15012"), "127.0.0.1:15010, and each"},
		"one path":                      {lb("unix//tmp/x|0222") + "," + echoOn("b", "unix//tmp/x"), both},
		"ranges that meet":              {lb("tcp_lb/127.0.0.1:15000-15009") + "," + echoOn("b", "127.0.0.1:15010-15012"), ""},
		"wildcard and one host":         {lb("tcp_lb/:15000") + "," + lbAt("t", "tcp_lb/127.0.0.1:15000", toNowhere), ""},
		"two ports of the kernel's":     {lb("tcp_lb/127.0.0.1:0") + "," + lbAt("t", "tcp_lb/127.0.0.1:0", toNowhere), ""},
		"one server, one address twice": {`"srv":{"listen":["127.0.0.1:15000","127.0.0.1:15000"],` + layer4Routes(withHandler(toNowhere)) + `}`, ""},
		"not this module's servers":     {lb("127.0.0.1:15000") + "," + echoOn("a", "127.0.0.1:15001") + "," + echoOn("b", "127.0.0.1:15001"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := validate(t, layer4Config(c.servers))
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
		})
	}
}

// An HTTP server on the address of one that leads to tcp_lb is found at the
// start, whichever of the apps starts first.
func TestHTTPServerOnTheSameAddress(t *testing.T) {
	watchLeftovers(t)
	with := func(l4, http, options string) string {
		return strings.Replace(layer4Config(lbAt("srv", l4, toNowhere)), `"apps":{`,
			fmt.Sprintf(`"apps":{"http":{"http_port":1,"servers":{"site":{"listen":[%q],"automatic_https":{"disable":true}%s}}},`, http, options), 1)
	}
	at := freeAddress(t)
	_, port, err := net.SplitHostPort(at)
	require.NoError(t, err)
	for name, c := range map[string]struct{ l4, http string }{
		"tcp_lb/ and plain": {"tcp_lb/" + at, at},
		"both tcp_lb/":      {"tcp_lb/" + at, "tcp_lb/" + at},
		"both plain":        {at, at},
		"in a range":        {at, "127.0.0.1:" + port + "-" + port},
	} {
		t.Run(name, func(t *testing.T) {
			for range 4 {
				err := loadAndStop(with(c.l4, c.http, ""))
				require.ErrorContains(t, err, fmt.Sprintf(`the layer4 server of %s ("srv") and the HTTP server of %s ("site") both listen on `, c.l4, c.http))
				require.ErrorContains(t, err, at)
				require.ErrorContains(t, err, "give one another port")
			}
		})
	}
	require.NoError(t, loadAndStop(with("tcp_lb/"+at, freeAddress(t), "")))
	require.False(t, listens(at), "what was refused is closed")
}

// What is there to do depends on what the HTTP server is.
func TestHTTPServerGetsOutOfTheWay(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct{ server, listen, want string }{
		"a path":    {"site", "unix/" + dir + "/x", "give one another path"},
		"redirects": {redirects, "127.0.0.1:15000", "Caddy's own server of redirects to HTTPS both listen on 127.0.0.1:15000, and each would get connections at random: turn that off by the global option auto_https disable_redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := caddy.ParseNetworkAddress(c.listen)
			require.NoError(t, err)
			servers := []*layer4Server{{name: "srv0", serves: true, addresses: []listenAddress{{a, c.listen}}}}
			err = checkHTTPServers(servers, &caddyhttp.App{Servers: map[string]*caddyhttp.Server{c.server: {Listen: []string{c.listen}}}})
			require.ErrorContains(t, err, c.want)
		})
	}
}

// loadAndStop reports whether the config loads.
func loadAndStop(config string) error {
	return errors.Join(caddy.Load([]byte(config), true), caddy.Stop())
}

func TestOnlyHTTP3SharesAnAddress(t *testing.T) {
	for protocols, want := range map[string]bool{`["h3"]`: false, `["h1","h3"]`: true, `["h2c"]`: true, `[]`: true, `null`: true} {
		var app struct{ S caddyhttp.Server }
		require.NoError(t, json.Unmarshal([]byte(`{"S":{"protocols":`+protocols+`}}`), &app))
		require.Equal(t, want, acceptsStreams(&app.S, 0), protocols)
		app.S = caddyhttp.Server{}
		require.NoError(t, json.Unmarshal([]byte(`{"S":{"listen_protocols":[`+protocols+`]}}`), &app))
		require.Equal(t, want, acceptsStreams(&app.S, 0), protocols)
	}
}

// A plain listener is spoken of once, when a config with it starts.
func TestAdviceToUseTheSharedListener(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere both are the same")
	}
	plain, shared := freeAddress(t), freeAddress(t)
	config := layer4Config(lbAt("a", plain, toNowhere) + "," +
		lbAt("b", "tcp_lb/"+shared, toNowhere) + "," +
		fmt.Sprintf(`"c":{"listen":[%q],"routes":[{"handle":[{"handler":"echo"}]}]}`, freeAddress(t)))
	admin := freeAddress(t)
	config = strings.Replace(strings.Replace(config, `"disabled":true,`, fmt.Sprintf(`"listen":%q,`, admin), 1), `"ERROR"`, `"WARN"`, 1)
	c := startChild(t, config)
	line := c.line(t, "write tcp_lb/"+plain+" for this listener")
	require.Equal(t, "warn", line["level"])
	require.Equal(t, "a", line["server"])
	require.Equal(t, plain, line["listener"])
	again := strings.ReplaceAll(config, "127.0.0.1:1\"", "127.0.0.1:2\"")
	status, body := request(t, "POST", "http://"+admin+"/load", again)
	require.Equal(t, 200, status, body)
	c.signal(t, terminate)
	require.Zero(t, c.wait(t))
	require.Equal(t, 1, strings.Count(strings.Join(c.log, "\n"), "for this listener"), "once, and of no other")
}
