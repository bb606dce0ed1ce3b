//go:build unix

package tcplb

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/stretchr/testify/require"
)

// proxyReader is a server that wants a PROXY header.
type proxyReader struct {
	realServer
	unwanted []string // what its log says of a connection that has none
	log      string   // where that is; empty = its output

	// whoIs asks it, through a connection to it, who it takes the two ends for; tells
	// is how it says that.
	whoIs func(t testing.TB, c net.Conn) string
	tells func(client, local string) string
}

// listensForProxy is listens, with a header that the server does not complain of.
func listensForProxy(address string) bool {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return false
	}
	defer c.Close()
	_, err = io.WriteString(c, "PROXY TCP4 127.0.0.1 127.0.0.1 1 1\r\n")
	return err == nil
}

// readHTTP asks for / and returns the body.
func readHTTP(t testing.TB, c net.Conn) string {
	t.Helper()
	write(t, c, "GET / HTTP/1.0\r\n\r\n")
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	_, body, _ := strings.Cut(string(b), "\r\n\r\n")
	return strings.TrimSpace(body)
}

func hostOnly(client, _ string) string {
	host, _, _ := net.SplitHostPort(client)
	return host
}

// withoutBrackets has none around an IPv6 address.
func withoutBrackets(client, local string) string {
	return strings.NewReplacer("[", "", "]", "").Replace(client + " " + local)
}

func writeConfig(t testing.TB, dir, name, text string) (path string) {
	t.Helper()
	path = filepath.Join(dir, name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

func nginxWantsProxy(t *testing.T) *proxyReader {
	requirePrograms(t, "/usr/sbin", "nginx", "nginx")
	s := &proxyReader{unwanted: []string{"broken header"}, whoIs: readHTTP, tells: withoutBrackets}
	dir := t.TempDir()
	s.address, s.log = freeAddress(t), filepath.Join(dir, "error.log")
	path := writeConfig(t, dir, "nginx.conf", fmt.Sprintf(`daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/error.log info;
events {}
http {
	access_log off; client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
	server {
		listen %[2]s proxy_protocol;
		location / { return 200 "$proxy_protocol_addr:$proxy_protocol_port $proxy_protocol_server_addr:$proxy_protocol_server_port"; }
	}
}
`, dir, s.address))
	s.command = command{name: "nginx", args: []string{"-e", s.log, "-c", path}}
	return s
}

func haproxyWantsProxy(t *testing.T) *proxyReader {
	requirePrograms(t, "/usr/sbin", "haproxy", "haproxy")
	s := &proxyReader{unwanted: []string{"PROXY", "Timeout"}, whoIs: readHTTP, tells: withoutBrackets}
	s.address = freeAddress(t)
	path := writeConfig(t, t.TempDir(), "haproxy.cfg", fmt.Sprintf(`global
	maxconn 100
	log stdout format raw local0 info
defaults
	mode http
	log global
	timeout client 30s
	timeout server 30s
	timeout connect 30s
frontend f
	bind %s accept-proxy
	http-request return status 200 content-type text/plain lf-string "%%[src]:%%[src_port] %%[dst]:%%[dst_port]"
`, s.address))
	s.command = command{name: "haproxy", args: []string{"-f", path}, stop: syscall.SIGUSR1}
	return s
}

// Dovecot's client logs in, and finds its address in the log.
func dovecotWantsProxy(t *testing.T) *proxyReader {
	requirePrograms(t, "/usr/sbin", "dovecot-imapd", "dovecot")
	requireRoot(t)
	if version := (command{name: "dovecot", args: []string{"--version"}}).run(t); !strings.HasPrefix(version, "2.3.") {
		skipWithout(t, "dovecot 2.3, whose config this is, and not "+version)
	}
	s := &proxyReader{unwanted: []string{"haproxy"}, tells: hostOnly}
	dir := publicDir(t)
	s.address, s.log = freeAddress(t), filepath.Join(dir, "log")
	path := writeConfig(t, dir, "dovecot.conf", fmt.Sprintf(`protocols = imap
base_dir = %[1]s/run
state_dir = %[1]s/state
log_path = %[1]s/log
ssl = no
disable_plaintext_auth = no
haproxy_trusted_networks = 127.0.0.0/8
mail_location = maildir:%[1]s/mail
passdb {
	driver = static
	args = nopassword=y
}
userdb {
	driver = static
	args = uid=65534 gid=65534 home=%[1]s/mail
}
service imap-login {
	chroot =
	inet_listener imap {
		address = 127.0.0.1
		port = %[2]s
		haproxy = yes
	}
	inet_listener imaps {
		port = 0
	}
}
`, dir, portOf(s.address)))
	s.command = command{name: "dovecot", args: []string{"-F", "-c", path}}
	s.whoIs = func(t testing.TB, c net.Conn) string {
		user := "u" + portOf(c.LocalAddr().String())
		write(t, c, "a login "+user+" x\r\nb logout\r\n")
		_, err := io.Copy(io.Discard, c)
		require.NoError(t, err)
		var rip string
		eventually(t, func() bool {
			b, _ := os.ReadFile(s.log)
			for line := range strings.Lines(string(b)) {
				if strings.Contains(line, "user=<"+user+">") && strings.Contains(line, "rip=") {
					_, after, _ := strings.Cut(line, "rip=")
					rip, _, _ = strings.Cut(after, ",")
				}
			}
			return rip != ""
		}, "a line in dovecot's log")
		return rip
	}
	return s
}

// Postfix turns everybody away, by their address.
func postfixWantsProxy(t *testing.T) *proxyReader {
	requirePrograms(t, "/usr/lib/postfix/sbin", "postfix", "master", "postfix")
	requireRoot(t)
	s := &proxyReader{unwanted: []string{"haproxy"}, tells: hostOnly}
	dir := publicDir(t)
	s.address, s.log = freeAddress(t), filepath.Join(dir, "log")
	for _, each := range []string{"spool", "data"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, each), 0o755))
	}
	writeConfig(t, dir, "main.cf", fmt.Sprintf(`compatibility_level = 3.6
queue_directory = %[1]s/spool
data_directory = %[1]s/data
daemon_directory = /usr/lib/postfix/sbin
maillog_file = %[1]s/log
maillog_file_prefixes = %[1]s
inet_interfaces = 127.0.0.1
mydestination =
alias_maps =
alias_database =
local_recipient_maps =
smtpd_upstream_proxy_protocol = haproxy
smtpd_peername_lookup = no
smtpd_delay_reject = no
smtpd_client_restrictions = reject
`, dir))
	writeConfig(t, dir, "master.cf", s.address+` inet n - n - - smtpd
postlog unix-dgram n - n - 1 postlogd
anvil unix - - n - 1 anvil
`)
	mail, err := user.Lookup("postfix")
	require.NoError(t, err)
	owner, err := strconv.Atoi(mail.Uid)
	require.NoError(t, err)
	require.NoError(t, os.Chown(filepath.Join(dir, "data"), owner, -1))
	command{name: "postfix", args: []string{"-c", dir, "check"}}.run(t)
	s.command = command{name: "master", args: []string{"-c", dir, "-d"}}
	s.whoIs = func(t testing.TB, c net.Conn) string {
		line, err := bufio.NewReader(c).ReadString('\n')
		require.NoError(t, err)
		_, after, _ := strings.Cut(line, "<unknown[")
		address, _, ok := strings.Cut(after, "]>: Client host rejected")
		require.True(t, ok, line)
		return address
	}
	return s
}

func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not checked with this mail server, which only root can run")
	}
}

// publicDir is a directory for servers that run as others; t.TempDir is for the
// test's user only.
func publicDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tcplb")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	return dir
}

// Servers that read PROXY headers take the client for who it is: that of the
// connection, or of the header that came in before it. The checks leave nothing in
// their logs.
func TestServersThatReadProxyHeaders(t *testing.T) {
	for name, prepare := range map[string]func(*testing.T) *proxyReader{
		"nginx": nginxWantsProxy, "HAProxy": haproxyWantsProxy, "Dovecot": dovecotWantsProxy, "Postfix": postfixWantsProxy,
	} {
		for _, version := range []string{"v1", "v2"} {
			t.Run(name+" "+version, func(t *testing.T) {
				s := prepare(t)
				checks := `"interval":"50ms"`
				if name == "Postfix" { // to which UNKNOWN is unknown
					checks += `,"proxy_protocol":"v2"`
				}
				s.running = s.command.begin(t)
				eventually(t, func() bool { return listensForProxy(s.address) }, "it listens")
				lb, behind := freeAddress(t), freeAddress(t)
				handler := fmt.Sprintf(`%s,"proxy_protocol":%q,"health_checks":{"active":{%s}}}`, backendsJSON(s.address), version, checks)
				runCaddy(t, layer4Config(fmt.Sprintf(
					`"bare":{"listen":["tcp_lb/%s"],"routes":[{"handle":[%s]}]},"behind":{"listen":[%q],"routes":[{"handle":[{"handler":"proxy_protocol"},%s]}]}`,
					lb, withHandler(`{"name":"bare",`+handler), behind, withHandler(`{"name":"behind",`+handler))))
				checked(t)

				c := dialClient(t, lb)
				require.Equal(t, s.tells(c.LocalAddr().String(), lb), s.whoIs(t, c))
				require.NoError(t, c.Close())
				for header, ends := range map[string][2]string{
					"PROXY TCP4 203.0.113.7 198.51.100.1 1111 2222\r\n": {"203.0.113.7:1111", "198.51.100.1:2222"},
					"PROXY TCP6 2001:db8::7 2001:db8::1 1111 2222\r\n":  {"[2001:db8::7]:1111", "[2001:db8::1]:2222"},
				} {
					c := dialClient(t, behind)
					write(t, c, header)
					require.Equal(t, s.tells(ends[0], ends[1]), s.whoIs(t, c))
					require.NoError(t, c.Close())
				}
				eventually(t, func() bool { return metric(t, "connections_active", nil) == 0 }, "their end")

				eventually(t, func() bool { return metric(t, "health_checks_total", labels("status", "success")) > 6 }, "some checks")
				require.Zero(t, metric(t, "health_checks_total", labels("status", "failure")))
				require.NoError(t, caddy.Stop())
				said, _ := s.running.end() // some say that it was a signal
				if s.log != "" {
					b, err := os.ReadFile(s.log)
					require.NoError(t, err)
					said = string(b)
				}
				for _, each := range s.unwanted {
					require.NotContains(t, said, each)
				}
			})
		}
	}
}
