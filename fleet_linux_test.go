package tcplb

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fleet is a network of two balancers and three backends, each machine a network
// namespace, whose clients are here: 10.77.1.1 to .40, behind a router.
type fleet struct {
	backends  *machine
	balancers [2]*machine
	config    string // of a balancer
}

const fleetClients = 40

// machine is a network namespace, held by a process that sleeps in it.
type machine struct {
	address string
	holder  *exec.Cmd
}

func (h *machine) enter() []string {
	return []string{"nsenter", "-n", "-t", strconv.Itoa(h.holder.Process.Pid)}
}

// run runs a command on it.
func (h *machine) run(t *testing.T, command string) {
	t.Helper()
	c := append(h.enter(), strings.Fields(command)...)
	out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
	require.NoError(t, err, "%s: %s", command, out)
}

func configure(t *testing.T, command string) {
	t.Helper()
	c := strings.Fields(command)
	out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
	require.NoError(t, err, "%s: %s", command, out)
}

// newMachine connects a machine to the bridge.
func newMachine(t *testing.T, name string, addresses ...string) *machine {
	t.Helper()
	h := &machine{address: addresses[0], holder: exec.Command("unshare", "-n", "sleep", "600")}
	require.NoError(t, h.holder.Start())
	t.Cleanup(func() {
		_ = h.holder.Process.Kill()
		_ = h.holder.Wait()
	})
	own, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	eventually(t, func() bool {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.holder.Process.Pid))
		return err == nil && its != own
	}, "a network of its own")
	configure(t, "ip link add "+name+" type veth peer name eth0 netns "+strconv.Itoa(h.holder.Process.Pid))
	configure(t, "ip link set "+name+" master bridge up")
	h.run(t, "ip link set lo up")
	for _, a := range addresses {
		h.run(t, "ip address add "+a+"/24 dev eth0")
	}
	h.run(t, "ip link set eth0 up")
	h.run(t, "ip route add 10.77.1.0/24 via 10.77.0.254")
	return h
}

// newFleet has the backends run, and no balancer yet. Servers are what their
// config has more than the example.
func newFleet(t *testing.T, servers string) *fleet {
	t.Helper()
	bringUp(t)
	configure(t, "ip link add bridge type bridge")
	configure(t, "ip address add 10.77.0.254/24 dev bridge")
	configure(t, "ip link set bridge up")
	for i := range fleetClients {
		configure(t, fmt.Sprintf("ip address add 10.77.1.%d/32 dev lo", i+1))
	}
	f := &fleet{backends: newMachine(t, "backends", "10.77.0.11", "10.77.0.12", "10.77.0.13")}
	for i := range f.balancers {
		f.balancers[i] = newMachine(t, fmt.Sprintf("balancer%d", i), fmt.Sprintf("10.77.0.%d", i+1))
	}
	var demo strings.Builder
	demo.WriteString("{\n\tadmin off\n\tpersist_config off\n\tlayer4 {\n")
	for n := range 3 {
		fmt.Fprintf(&demo, "\t\t10.77.0.1%d:5432 {\n\t\t\troute {\n\t\t\t\tdemo_backend backend-%d\n\t\t\t}\n\t\t}\n", n+1, n+1)
	}
	demo.WriteString("\t}\n}\n")
	config, err := adapt(t, demo.String())
	require.NoError(t, err)
	startChildUnder(t, f.backends.enter(), config)
	for n := range 3 {
		eventually(t, func() bool { return listens(fmt.Sprintf("10.77.0.1%d:5432", n+1)) }, "backend-%d listens", n+1)
	}

	text := strings.ReplaceAll(readFile(t, "examples/keepalived/Caddyfile"), "192.0.2.", "10.77.0.")
	text = replaceOnce(t, text, "\tlayer4 {\n", "\tlayer4 {\n"+servers)
	f.config, err = adapt(t, replaceOnce(t, text, "{\n", "{\n\tadmin off\n\tpersist_config off\n"))
	require.NoError(t, err)
	return f
}

// start runs a balancer, and waits until it serves.
func (f *fleet) start(t *testing.T, i int) *child {
	t.Helper()
	c := startChildUnder(t, f.balancers[i].enter(), f.config)
	f.serves(t, f.balancers[i].address)
	return c
}

func (f *fleet) serves(t *testing.T, address string) {
	t.Helper()
	eventually(t, func() bool {
		_, err := askFrom("10.77.1.1", address)
		return err == nil
	}, "%s serves", address)
}

// askFrom returns which backend the client at the address has through the
// balancer's.
func askFrom(client, to string) (name string, err error) {
	c, err := dialFrom(client, to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return whoServes(c)
}

func dialFrom(client, to string) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}}
	return d.Dial("tcp", net.JoinHostPort(to, "5432"))
}

// whoServes asks the demo backend for its name; it goes on answering.
func whoServes(c net.Conn) (name string, err error) {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: fleet\r\n\r\n"); err != nil {
		return "", err
	}
	in := bufio.NewReader(c)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(line, "backend-") {
			return strings.TrimSpace(line), nil
		}
	}
}

// shares returns each client's backend.
func (f *fleet) shares(t *testing.T, to string) (names [fleetClients]string) {
	t.Helper()
	seen := make(map[string]bool)
	for i := range names {
		var err error
		names[i], err = askFrom(fmt.Sprintf("10.77.1.%d", i+1), to)
		require.NoError(t, err)
		seen[names[i]] = true
	}
	require.Len(t, seen, 3, "every backend has clients")
	return names
}

// TestKeepalived has an address move to the other balancer when one is killed, or
// about to end, and its clients meet the backends that they had.
func TestKeepalived(t *testing.T) {
	requireKeepalived(t)
	if !inNamespace(t) {
		return
	}
	const shared = sharedAddress
	f := newFleet(t, "")
	children := [2]*child{f.start(t, 0), f.start(t, 1)}
	outputs := f.share(t)
	f.serves(t, shared)
	before := f.shares(t, shared)

	holder := f.holder(t, shared)
	require.NoError(t, children[holder].cmd.Process.Kill())
	eventually(t, func() bool { return f.holds(1-holder, shared) }, "the address has moved")
	f.serves(t, shared)
	require.Equal(t, before, f.shares(t, shared), "another balancer, the same backends")

	// An exit moves it before anybody is refused.
	children[holder] = f.start(t, holder)
	eventually(t, func() bool {
		return strings.Contains(after(outputs[holder](), "can_serve) failed"), "can_serve) succeeded")
	}, "it is back")
	require.True(t, f.holds(1-holder, shared), "the address stays where it is")
	children[1-holder].signal(t, syscall.SIGTERM)
	for !f.holds(holder, shared) {
		c, err := dialFrom("10.77.1.7", shared) // those that are open as it moves are cut
		require.NoError(t, err, "a client of the time between")
		_ = c.Close()
	}
	require.Equal(t, before, f.shares(t, shared))
}

// A pool that is down does not take the address from the others: it is down on
// either machine.
func TestKeepalivedWhereAPoolIsDown(t *testing.T) {
	requireKeepalived(t)
	if !inNamespace(t) {
		return
	}
	f := newFleet(t, "\t\ttcp_lb/:5433 {\n\t\t\troute {\n\t\t\t\ttcp_lb 10.77.0.11:1 {\n\t\t\t\t\tname down\n\t\t\t\t}\n\t\t\t}\n\t\t}\n")
	f.start(t, 0)
	f.start(t, 1)
	for _, output := range f.share(t) {
		eventually(t, func() bool { return strings.Contains(output(), "can_serve) failed") }, "neither is ready")
	}
	f.serves(t, sharedAddress)
	f.shares(t, sharedAddress)
}

func requireKeepalived(t *testing.T) {
	t.Helper()
	requirePrograms(t, "/usr/sbin", "keepalived iproute2 curl", "keepalived", "ip", "nsenter", "curl")
	if os.Getuid() != 0 {
		skipWithout(t, "root, as keepalived changes groups for its scripts")
	}
}

const sharedAddress = "10.77.0.100"

// share has keepalived run on both balancers' machines, as in the example. It
// returns their output so far.
func (f *fleet) share(t *testing.T) (outputs [2]func() string) {
	t.Helper()
	example := readFile(t, "examples/keepalived/keepalived.conf")
	example = replaceOnce(t, example, "192.0.2.100", sharedAddress)
	example = replaceOnce(t, example, "script_user nobody", "script_user root") // the only one here
	for i, h := range f.balancers {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(dir+"/keepalived.conf", []byte(example), 0o600))
		command := append(h.enter(), "keepalived", "--dont-fork", "--log-console", "--use-file="+dir+"/keepalived.conf",
			"--pid="+dir+"/pid", "--vrrp_pid="+dir+"/vrrp", "--checkers_pid="+dir+"/checkers", "--vrrp")
		outputs[i] = startProcess(t, command)
	}
	return outputs
}

// after is what follows the text's last mention; empty if there is none.
func after(s, text string) string {
	i := strings.LastIndex(s, text)
	if i < 0 {
		return ""
	}
	return s[i:]
}

// startProcess runs the command until the test ends. It returns its output so far.
func startProcess(t *testing.T, command []string) (output func() string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "output")
	out, err := os.Create(file)
	require.NoError(t, err)
	c := exec.Command(command[0], command[1:]...)
	c.Stdout, c.Stderr = out, out
	require.NoError(t, c.Start())
	output = func() string { return readFile(t, file) }
	t.Cleanup(func() {
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
		_ = out.Close()
		if t.Failed() {
			t.Log(output())
		}
	})
	return output
}

// holds reports whether the balancer's machine has the address.
func (f *fleet) holds(i int, address string) bool {
	c := append(f.balancers[i].enter(), "ip", "-4", "-o", "address", "show", "dev", "eth0")
	out, err := exec.Command(c[0], c[1:]...).Output()
	return err == nil && strings.Contains(string(out), " "+address+"/")
}

func (f *fleet) holder(t *testing.T, address string) int {
	t.Helper()
	for i := range f.balancers {
		if f.holds(i, address) {
			return i
		}
	}
	t.Fatal("nobody has ", address)
	return 0
}

// TestECMP has a router spread connections over two balancers of the same
// address. When one is killed its clients meet the same backends through the
// other, whose own connections go on, also when the first is back.
func TestECMP(t *testing.T) {
	requirePrograms(t, "/usr/sbin", "iproute2", "ip", "nsenter")
	if !inNamespace(t) {
		return
	}
	const shared = "10.77.9.9"
	f := newFleet(t, "")
	sysctl(t, "ipv4/fib_multipath_hash_policy", "1")
	first := f.start(t, 0)
	f.start(t, 1)
	for i, h := range f.balancers {
		h.run(t, "ip address add "+shared+"/32 dev lo")
		configure(t, fmt.Sprintf("ip nexthop add id %d via %s dev bridge", i+1, h.address))
	}
	configure(t, "ip nexthop add id 10 group 1/2 type resilient buckets 64 idle_timer 600")
	configure(t, "ip route add "+shared+"/32 nhid 10")
	before := f.shares(t, shared)

	var open [fleetClients]net.Conn
	for i := range open {
		c, err := dialFrom(fmt.Sprintf("10.77.1.%d", i+1), shared)
		require.NoError(t, err)
		defer c.Close()
		open[i] = c
		name, err := whoServes(c)
		require.NoError(t, err)
		require.Equal(t, before[i], name)
	}
	require.NoError(t, first.cmd.Process.Kill())
	<-first.done
	configure(t, "ip nexthop replace id 10 group 2 type resilient buckets 64 idle_timer 600")
	require.Equal(t, before, f.shares(t, shared), "another balancer, the same backends")
	goOn := func() (n int) {
		for i, c := range open {
			if name, err := whoServes(c); err == nil {
				require.Equal(t, before[i], name)
				n++
			}
		}
		return n
	}
	kept := goOn()
	require.Greater(t, kept, 0)
	require.Less(t, kept, fleetClients, "the router had spread them")

	f.start(t, 0)
	configure(t, "ip nexthop replace id 10 group 1/2 type resilient buckets 64 idle_timer 600")
	require.Equal(t, kept, goOn(), "a path that is in use stays")
	require.Equal(t, before, f.shares(t, shared))
}
