//go:build unix

package discovery

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// dnsmasq is a real name server, over a file of hosts.
type dnsmasq struct {
	t       testing.TB
	address string
	hosts   string
	process *exec.Cmd
}

func startDnsmasq(t testing.TB, options ...string) *dnsmasq {
	t.Helper()
	program, err := exec.LookPath("dnsmasq")
	if err != nil {
		program, err = exec.LookPath("/usr/sbin/dnsmasq")
	}
	if err != nil {
		if os.Getenv("TCPLB_REQUIRE_SERVERS") != "" {
			t.Fatal("TCPLB_REQUIRE_SERVERS is set, but this is missing: dnsmasq (Debian: apt-get install dnsmasq-base)")
		}
		t.Skip("not checked with a real name server, as this is missing: dnsmasq (Debian: apt-get install dnsmasq-base)")
	}
	s := &dnsmasq{t: t, hosts: filepath.Join(t.TempDir(), "hosts")}
	s.write()
	for range 20 { // ports that somebody else has by now
		s.address = freePort(t)
		_, port, _ := net.SplitHostPort(s.address)
		s.process = exec.Command(program, append([]string{
			"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=" + userName(), "--port=" + port, "--listen-address=127.0.0.1", "--bind-interfaces",
			"--no-resolv", "--no-hosts", "--addn-hosts=" + s.hosts, "--local=/internal/", "--local-ttl=1",
		}, options...)...)
		s.process.Stderr = os.Stderr
		require.NoError(t, s.process.Start())
		if s.answers() {
			t.Cleanup(s.stop)
			return s
		}
		s.stop()
	}
	t.Fatal("dnsmasq does not start")
	return nil
}

func userName() string {
	if os.Geteuid() == 0 {
		return "root"
	}
	return cmp.Or(os.Getenv("USER"), "nobody")
}

func freePort(t testing.TB) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer c.Close()
	return c.LocalAddr().String()
}

// answers waits for the first answer. It reports false if the process has ended.
func (s *dnsmasq) answers() bool {
	ended := make(chan struct{})
	go func() {
		_ = s.process.Wait()
		close(ended)
	}()
	for range 600 {
		select {
		case <-ended:
			return false
		default:
		}
		if _, err := once(s.address).query(context.Background(), "up.internal.", 1); err == nil {
			return true
		}
		time.Sleep(10 * time.Millisecond) // it may not even listen
	}
	return false
}

func (s *dnsmasq) stop() {
	_ = s.process.Process.Signal(syscall.SIGCONT)
	_ = s.process.Process.Kill()
}

// write has the server know these lines, after a signal.
func (s *dnsmasq) write(hosts ...string) {
	s.t.Helper()
	require.NoError(s.t, os.WriteFile(s.hosts, []byte(strings.Join(hosts, "\n")+"\n"), 0o600))
}

func (s *dnsmasq) know(hosts ...string) {
	s.t.Helper()
	s.write(hosts...)
	s.signal(syscall.SIGHUP)
}

func (s *dnsmasq) signal(signal os.Signal) {
	s.t.Helper()
	require.NoError(s.t, s.process.Process.Signal(signal))
}

// following runs a source. The channel has what it finds.
func following(t testing.TB, source Source) <-chan []Found {
	t.Helper()
	answers := make(chan []Found, 100)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { source.Run(ctx, func(found []Found) { answers <- found }) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return answers
}

// TestARealNameServer whose records come and go, and which does so itself.
func TestARealNameServer(t *testing.T) {
	s := startDnsmasq(t)
	s.know("10.0.0.2 db.internal", "10.0.0.1 db.internal", "fd00::1 db.internal")
	source, err := load(t, "a", `{"name":"db.internal","port":5432,"refresh":"1s","resolvers":["`+s.address+`"]}`)
	require.NoError(t, err)
	answers := following(t, source)
	is := func(addresses ...string) {
		t.Helper()
		for {
			select {
			case found := <-answers:
				if got := addressesOf(found); fmt.Sprint(got) == fmt.Sprint(addresses) {
					return
				}
			case <-time.After(time.Minute):
				t.Fatalf("not found: %v; status %+v", addresses, source.(Reporter).Status())
			}
		}
	}
	counted := func(status string) {
		t.Helper()
		before := source.(Reporter).Status().Lookups[status]
		require.Eventually(t, func() bool { return source.(Reporter).Status().Lookups[status] > before }, time.Minute, time.Millisecond, status)
	}
	is("10.0.0.1:5432", "10.0.0.2:5432", "[fd00::1]:5432")
	s.know("10.0.0.3 db.internal", "10.0.0.1 db.internal")
	is("10.0.0.1:5432", "10.0.0.3:5432")

	s.know()
	counted(StatusEmpty)
	s.signal(syscall.SIGSTOP)
	counted(StatusFailure)
	require.Empty(t, answers, "what there was stays")
	require.Contains(t, source.(Reporter).Status().Error, "no answer within 2s")
	s.signal(syscall.SIGCONT)

	var many, addresses []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("10.1.%d.%d db.internal", i/250, i%250))
		addresses = append(addresses, fmt.Sprintf("10.1.%d.%d:5432", i/250, i%250))
	}
	s.know(many...)
	is(addresses...)
	require.Empty(t, source.(Reporter).Status().Error)

	s.stop()
	counted(StatusFailure)
	require.Empty(t, answers)
}

// TestARealNameServersServices has names of which it knows, and one of which it
// does not.
func TestARealNameServersServices(t *testing.T) {
	s := startDnsmasq(t, "--srv-host=_pg._tcp.internal,a.internal,5432,10,60", "--srv-host=_pg._tcp.internal,b.internal,5433,10,40", "--srv-host=_pg._tcp.internal,c.internal,5432,20,1",
		"--srv-host=_pg._tcp.internal,gone.internal,5432,10,60", "--cname=c.internal,b.internal")
	s.know("10.0.0.1 a.internal", "10.0.0.2 b.internal", "fd00::2 b.internal")
	source, err := load(t, "srv", `{"name":"_pg._tcp.internal","resolvers":["`+s.address+`"]}`)
	require.NoError(t, err)
	require.Equal(t, []Found{
		{Address: "10.0.0.1:5432", Weight: 60}, backup("10.0.0.2:5432", 1), {Address: "10.0.0.2:5433", Weight: 40},
		backup("[fd00::2]:5432", 1), {Address: "[fd00::2]:5433", Weight: 40},
	}, <-following(t, source))
	require.Eventually(t, func() bool {
		return strings.Contains(source.(Reporter).Status().Error, "target gone.internal.: no such name")
	}, time.Minute, time.Millisecond)
}
