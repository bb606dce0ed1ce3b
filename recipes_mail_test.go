//go:build unix

package tcplb

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/smtp"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestSMTPByGreeting has Postfix checked as it likes it, bare and behind its
// postscreen.
func TestSMTPByGreeting(t *testing.T) {
	requirePrograms(t, "/usr/lib/postfix/sbin", "postfix", "postfix", "master", "postscreen")
	if os.Geteuid() != 0 {
		t.Skip("not checked with Postfix, which only root can run")
	}
	plain := startPostfix(t, "- smtpd", "smtpd_client_connection_count_limit = 3\nsmtpd_client_event_limit_exceptions =\n")
	screened := startPostfix(t, "1 postscreen", "postscreen_greet_wait = 1s\n")
	lb := freeAddress(t)
	runExample(t, "examples/mail/Caddyfile", "tcp_lb/:25 ", "tcp_lb/"+lb+" ", "10.0.6.1:25", plain.address, "10.0.6.2:25", screened.address,
		"tcp_lb/:993", "tcp_lb/"+freeAddress(t), "10.0.6", "127.0.0", "name smtp", "name smtp\n\t\t\t\t\thealth_interval 100ms")
	awaitAvailable(t, "smtp", plain.address, screened.address)
	awaitChecks(t, plain.address, 5)
	awaitChecks(t, screened.address, 2)
	require.Contains(t, plain.logged(t), "quit=1 commands=1")
	require.Contains(t, screened.logged(t), "PASS NEW", "a check waits for the whole greeting")
	for _, s := range []*realServer{plain, screened} {
		for _, complaint := range []string{"lost connection", "HANGUP", "PREGREET", "warning"} {
			require.NotContains(t, s.logged(t), complaint)
		}
	}

	mail := func() {
		t.Helper()
		require.NoError(t, smtp.SendMail(lb, nil, "sender@example.com", []string{"reader@mail.example.com"}, []byte("Subject: hello\r\n\r\nhello\r\n")))
	}
	delivered := func(s *realServer) int { return strings.Count(s.logged(t), "status=sent") }
	for range 4 {
		mail()
	}
	eventually(t, func() bool { return delivered(plain) == 2 && delivered(screened) == 2 }, "mail for both")

	// To Postfix all clients have one address, and it is down for them once that has
	// too many connections.
	var held []net.Conn
	for len(held) < 3 { // a check may have one of the places just now
		c := dialClient(t, plain.address)
		greeting := make([]byte, 4)
		_, err := io.ReadFull(c, greeting)
		require.NoError(t, err)
		if string(greeting) == "220 " {
			held = append(held, c)
		}
	}
	awaitAvailable(t, "smtp", screened.address)
	require.Regexp(t, `got "421 .*too many connections.*: the backend closed the connection`, lastErrors("smtp")[plain.address])
	mail()
	mail()
	eventually(t, func() bool { return delivered(screened) == 4 }, "mail for the other")
	for _, c := range held {
		require.NoError(t, c.Close())
	}
	awaitAvailable(t, "smtp", plain.address, screened.address)

	_, _ = screened.running.end() // by the signal, which is no error
	eventually(t, func() bool { return !listens(screened.address) }, "its children are gone, too")
	mail()
	mail()
	eventually(t, func() bool { return delivered(plain) == 4 }, "mail for who is left")
}

// startPostfix runs a Postfix of its own, whose mail goes nowhere. The service is
// how many processes of which program listen.
func startPostfix(t testing.TB, service, settings string) *realServer {
	t.Helper()
	s := &realServer{address: freeAddress(t)}
	dir := serverDir(t, nil)
	require.NoError(t, os.Chmod(dir, 0o755)) // its own users pass through
	for _, d := range []string{"config", "queue", "data"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	config := filepath.Join(dir, "config")
	writeFile(t, config, "main.cf", fmt.Sprintf(`compatibility_level = 3.6
queue_directory = %[1]s/queue
data_directory = %[1]s/data
maillog_file = /dev/stdout
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
smtp_host_lookup = native
myhostname = mail.example.com
mydestination = $myhostname
mynetworks = 192.0.2.0/24
local_transport = discard:
local_recipient_maps =
alias_maps =
smtpd_peername_lookup = no
%[2]s`, dir, settings), nil)
	writeFile(t, config, "master.cf", s.address+" inet n - n - "+service+`
smtpd pass - - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
discard unix - - n - - discard
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
`, nil)
	u, err := user.Lookup("postfix")
	require.NoError(t, err)
	uid, err := strconv.Atoi(u.Uid)
	require.NoError(t, err)
	require.NoError(t, os.Chown(filepath.Join(dir, "data"), uid, -1))
	command{name: "postfix", args: []string{"-c", config, "check"}}.run(t) // makes the queue's directories
	s.command = command{name: "master", args: []string{"-c", config, "-s"}}
	s.ready = command{name: "postfix", args: []string{"-c", config, "status"}}
	s.start(t)
	return s
}

// TestIMAPByGreeting has Dovecot checked by what it says over TLS, and clients
// rest.
func TestIMAPByGreeting(t *testing.T) {
	requirePrograms(t, "/usr/sbin", "dovecot-imapd", "dovecot")
	ca := newIssuer(t)
	first, second := startDovecot(t, ca), startDovecot(t, ca)
	full := startServer(t, ca.speaks("mail.example.com", "* BYE Too many connections.\r\n"))
	lb := freeAddress(t)
	runExample(t, "examples/mail/Caddyfile", "tcp_lb/:993", "tcp_lb/"+lb, "10.0.6.1:993", first.address, "10.0.6.2:993", second.address, "10.0.6.3:993", full.address,
		"tcp_lb/:25", "tcp_lb/"+freeAddress(t), "10.0.6", "127.0.0",
		"health_tls mail.example.com", "health_tls mail.example.com\n\t\t\t\t\thealth_interval 100ms\n\t\t\t\t\thealth_tls_trust_pool file "+ca.file)
	awaitAvailable(t, "imap", first.address, second.address)
	awaitChecks(t, full.address, 1)
	require.Equal(t, `expected "* OK ", got "* BYE Too many connections.\r\n": the backend closed the connection`, lastErrors("imap")[full.address])

	// A client rests over many checks, of which the log says nothing worse than this.
	resting := logIn(t, lb, ca)
	require.Contains(t, resting.do("b SELECT INBOX"), "b OK ")
	resting.send("c IDLE")
	require.Contains(t, resting.line(), "+ idling")
	awaitChecks(t, first.address, 10)
	awaitChecks(t, second.address, 1)
	for _, s := range []*realServer{first, second} {
		require.Contains(t, s.logged(t), "Aborted login by logging out")
		require.NotContains(t, s.logged(t), "Error")
		for line := range strings.Lines(s.logged(t)) {
			if !strings.Contains(line, "TLS handshaking") { // who only asked whether it listens
				require.NotContains(t, line, "Connection closed")
			}
		}
	}
	require.Contains(t, resting.do("DONE"), "c OK ")

	// A server whose master hangs greets nobody, though one can connect to it.
	its, other := first, second
	if its.metric(t, "connections_active") == 0 {
		its, other = other, its
	}
	hung := other.running.Process
	t.Cleanup(func() { _ = hung.Signal(syscall.SIGCONT) })
	require.NoError(t, hung.Signal(syscall.SIGSTOP))
	awaitAvailable(t, "imap", its.address)
	for range 3 {
		require.Contains(t, logIn(t, lb, ca).do("b LOGOUT"), "b OK ")
	}
	require.NoError(t, hung.Signal(syscall.SIGCONT))
	awaitAvailable(t, "imap", first.address, second.address)
	require.Contains(t, resting.do("d LOGOUT"), "d OK ")
}

// startDovecot runs an IMAP server of its own, in which everybody has a mailbox.
func startDovecot(t testing.TB, ca *issuer) *realServer {
	t.Helper()
	version := command{name: "dovecot", args: []string{"--version"}}.run(t)
	if !strings.HasPrefix(version, "2.3.") {
		skipWithout(t, "Dovecot 2.3, whose settings are not those of "+version)
	}
	name, group, as := serverUser(t)
	dir := serverDir(t, as)
	s := &realServer{address: freeAddress(t)}
	s.command = command{name: "dovecot", dir: dir, as: as, args: []string{"-F", "-c", writeFile(t, dir, "config", fmt.Sprintf(`
base_dir = %[1]s/run
state_dir = %[1]s/state
log_path = /dev/stderr
default_internal_user = %[2]s
default_internal_group = %[3]s
default_login_user = %[2]s
protocols = imap
listen = 127.0.0.1
ssl = required
ssl_cert = <%[4]s
ssl_key = <%[4]s
service imap-login {
  chroot =
  inet_listener imap {
    port = 0
  }
  inet_listener imaps {
    port = %[5]s
    ssl = yes
  }
}
service anvil {
  chroot =
}
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=%[2]s gid=%[3]s home=%[1]s/home/%%u
}
first_valid_uid = 1
mail_location = maildir:~/mail
`, dir, name, group, ca.serverFile(dir, "mail.example.com", time.Now().Add(time.Hour), as), s.port()), as)}}
	s.ready = command{name: "test", args: []string{"-S", dir + "/run/auth-client"}}
	s.start(t)
	eventually(t, func() bool { return listens(s.address) }, "dovecot listens")
	return s
}

// imapClient is one that is logged in.
type imapClient struct {
	t    testing.TB
	conn *tls.Conn
	r    *bufio.Reader
}

func logIn(t testing.TB, lb string, ca *issuer) *imapClient {
	t.Helper()
	raw := dialClient(t, lb)
	i := &imapClient{t: t, conn: tls.Client(raw, &tls.Config{RootCAs: ca.pool(), ServerName: "mail.example.com"})}
	i.r = bufio.NewReader(i.conn)
	require.Contains(t, i.line(), "* OK ")
	require.Contains(t, i.do("a LOGIN user secret"), "a OK ")
	return i
}

func (i *imapClient) send(command string) {
	i.t.Helper()
	_, err := io.WriteString(i.conn, command+"\r\n")
	require.NoError(i.t, err)
}

func (i *imapClient) line() string {
	i.t.Helper()
	line, err := i.r.ReadString('\n')
	require.NoError(i.t, err)
	return line
}

// do sends a command and returns the last line of the answer.
func (i *imapClient) do(command string) string {
	i.t.Helper()
	i.send(command)
	for {
		if line := i.line(); !strings.HasPrefix(line, "* ") {
			return line
		}
	}
}
