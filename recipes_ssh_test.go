//go:build unix

package tcplb

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSSHByBanner has sshd checked without a complaint in its log, and sessions
// go through.
func TestSSHByBanner(t *testing.T) {
	requirePrograms(t, "/usr/sbin", "openssh-server openssh-client", "sshd", "ssh", "ssh-keygen")
	sshd, err := exec.LookPath("sshd") // which wants to be called by its path
	require.NoError(t, err)
	user, _, as := serverUser(t)
	dir, keys := serverDir(t, as), t.TempDir()
	newKey := func(name string) string {
		command{name: "ssh-keygen", args: []string{"-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(keys, name)}}.run(t)
		return filepath.Join(keys, name)
	}
	clientKey := newKey("client")
	// All servers have one host key, or clients would take one for an impostor.
	hostKey := newKey("host")
	hostKeyThere := writeFile(t, dir, "host", readFile(t, hostKey), as)
	authorized := writeFile(t, dir, "authorized", readFile(t, clientKey+".pub"), as)
	lb := freeAddress(t)
	known := writeFile(t, keys, "known", fmt.Sprintf("tcplb %s", readFile(t, hostKey+".pub")), nil)
	ssh := func(address string, args ...string) command {
		return command{name: "ssh", args: append([]string{
			"-F", "none", "-i", clientKey, "-p", portOf(address), "-o", "BatchMode=yes", "-o", "HostKeyAlias=tcplb", "-o", "StrictHostKeyChecking=yes",
			"-o", "UserKnownHostsFile=" + known, "-o", "GlobalKnownHostsFile=none", user + "@127.0.0.1",
		}, args...)}
	}

	settings := fmt.Sprintf("HostKey %s\nAuthorizedKeysFile %s\nPidFile none\nStrictModes no\nUsePAM yes\nMaxStartups 4:100:5\nSubsystem sftp internal-sftp\n",
		hostKeyThere, authorized)
	// Where it holds failures against an address it is not to do so here.
	const exempt = "PerSourcePenaltyExemptList 127.0.0.1\n"
	if _, err := (command{name: sshd, args: []string{"-t", "-f", writeFile(t, dir, "exempt", settings+exempt, as)}, as: as}).begin(t).wait(); err == nil {
		settings += exempt
	}

	var servers [2]*realServer
	for i := range servers {
		s := &realServer{address: freeAddress(t)}
		config := writeFile(t, dir, "config"+s.port(), "ListenAddress "+s.address+"\n"+settings, as)
		s.command = command{name: sshd, args: []string{"-D", "-e", "-f", config}, dir: dir, as: as}
		s.ready = ssh(s.address, "-s", "sftp") // ends at once, as it has no input
		s.start(t)
		servers[i] = s
	}
	runExample(t, "examples/ssh/Caddyfile", "tcp_lb/:2222", "tcp_lb/"+lb, "10.0.8.1:22", servers[0].address, "10.0.8.2:22", servers[1].address,
		"name ssh", "name ssh\n\t\t\t\t\thealth_interval 100ms")
	awaitAvailable(t, "ssh", servers[0].address, servers[1].address)

	// Checks leave nothing in the log but a farewell.
	from := len(servers[0].logged(t))
	awaitChecks(t, servers[0].address, 5)
	log := servers[0].logged(t)[from:]
	require.Contains(t, log, "Received disconnect from 127.0.0.1")
	require.NotContains(t, log, "kex_exchange_identification")
	require.NotContains(t, log, "error:")

	// A session that lasts, with a connection through it.
	backend, tunnel := echoServer(t), freeAddress(t)
	session := ssh(lb, "-N", "-o", "ExitOnForwardFailure=yes", "-L", tunnel+":"+backend.address).begin(t)
	eventually(t, func() bool { return listens(tunnel) }, "a session through the balancer")
	echoed(t, tunnel, 1<<20)
	serving, other := servers[0], servers[1]
	if serving.connections(t) == 0 {
		serving, other = other, serving
	}

	// One that turns away who comes is down in its own words, and up once it doesn't.
	var held []net.Conn
	for len(held) < 4 { // a check may have one of the places just now
		c := dialClient(t, serving.address)
		greeting := make([]byte, 4)
		_, err := io.ReadFull(c, greeting)
		require.NoError(t, err)
		if string(greeting) == "SSH-" {
			held = append(held, c)
		}
	}
	awaitAvailable(t, "ssh", other.address)
	require.Regexp(t, `Exceeded MaxStartups|Not allowed at this time`, lastErrors("ssh")[serving.address])
	echoed(t, tunnel, 1<<20)
	ssh(lb, "-s", "sftp").run(t)
	require.EqualValues(t, 1, other.connections(t))
	for _, c := range held {
		require.NoError(t, c.Close())
	}
	awaitAvailable(t, "ssh", servers[0].address, servers[1].address)
	eventually(t, func() bool { // sshd may count those that have left for a moment more
		_, err := ssh(lb, "-s", "sftp").begin(t).wait()
		return err == nil && serving.connections(t) > 1
	}, "its clients are back")
	echoed(t, tunnel, 1<<20)
	_, _ = session.end()
}
