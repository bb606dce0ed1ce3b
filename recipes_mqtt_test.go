//go:build unix

package tcplb

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMQTTBrokers has a subscriber that is silent for long get its messages, over
// a broker that hangs and one that is restarted.
func TestMQTTBrokers(t *testing.T) {
	requirePrograms(t, "/usr/sbin", "mosquitto mosquitto-clients", "mosquitto", "mosquitto_pub", "mosquitto_sub")
	dir := t.TempDir()
	addresses := [2]string{freeAddress(t), freeAddress(t)}
	var brokers [2]*realServer
	for i, address := range addresses {
		s := &realServer{address: address}
		settings := fmt.Sprintf("listener %s 127.0.0.1\nallow_anonymous true\nlog_dest stdout\n", s.port())
		if os.Geteuid() == 0 {
			settings += "user root\n" // whose directory it is
		}
		if i == 0 {
			settings += fmt.Sprintf("connection bridge\naddress %s\ntopic # both 1\nnotifications false\nrestart_timeout 1\n", addresses[1])
		} else {
			settings += "connection_messages false\n"
		}
		s.command = command{name: "mosquitto", args: []string{"-c", writeFile(t, dir, "config"+s.port(), settings, nil)}}
		s.ready = command{name: "mosquitto_pub", args: []string{"-h", "127.0.0.1", "-p", s.port(), "-t", "ready", "-n"}}
		s.start(t)
		brokers[i] = s
	}
	lb := freeAddress(t)
	runExample(t, "examples/mqtt/Caddyfile", "tcp_lb/:1883", "tcp_lb/"+lb, "10.0.5.1:1883", addresses[0], "10.0.5.2:1883", addresses[1],
		"name mqtt", "name mqtt\n\t\t\t\t\thealth_interval 100ms\n\t\t\t\t\thealth_timeout 500ms", "close_if_unhealthy 5s", "close_if_unhealthy 100ms")
	awaitAvailable(t, "mqtt", addresses[:]...)

	subscriber := command{name: "mosquitto_sub", args: []string{"-h", "127.0.0.1", "-p", portOf(lb), "-k", "3600", "-t", "news"}}.begin(t)
	publish := func(address, message string) {
		t.Helper()
		command{name: "mosquitto_pub", args: []string{"-h", "127.0.0.1", "-p", portOf(address), "-q", "1", "-t", "news", "-m", message}}.run(t)
	}
	has := func(message string) bool { return strings.Contains(readFile(t, subscriber.output), message+"\n") }
	// What is said before subscriber and bridge are there again is lost, so it is said until it is heard.
	say := func(address, message string) {
		t.Helper()
		eventually(t, func() bool { publish(address, message); return has(message) }, "%q is heard", message)
	}
	say(lb, "hello")

	// Silent over many checks.
	its, other := brokers[0], brokers[1]
	eventually(t, func() bool { return metric(t, "connections_active", nil) == 1 }, "the subscriber is alone")
	if its.metric(t, "connections_active") == 0 {
		its, other = other, its
	}
	say(other.address, "over the bridge")
	connections := its.connections(t)
	from := [2]int{len(brokers[0].logged(t)), len(brokers[1].logged(t))}
	awaitChecks(t, its.address, 20)
	awaitChecks(t, other.address, 1)
	require.Equal(t, connections, its.connections(t))
	require.EqualValues(t, 1, its.metric(t, "connections_active"))
	log := brokers[0].logged(t)[from[0]:]
	require.Regexp(t, `Client \S+ disconnected\.`, log, "a check says good-bye")
	require.NotContains(t, log, "closed its connection")
	require.NotContains(t, log, "error")
	require.Empty(t, brokers[1].logged(t)[from[1]:], "where connections are not logged, checks are not")
	publish(lb, "once")
	eventually(t, func() bool { return has("once") }, "after a long silence")

	// A broker that hangs is still connected to, and loses its clients all the same.
	hung := its.running.Process
	t.Cleanup(func() { _ = hung.Signal(syscall.SIGCONT) })
	require.NoError(t, hung.Signal(syscall.SIGSTOP))
	awaitAvailable(t, "mqtt", other.address)
	require.Contains(t, lastErrors("mqtt")[its.address], "got nothing: no more within the time")
	eventually(t, func() bool { return its.metric(t, "connections_closed_total", "reason", "backend_down") == 1 }, "the subscriber is cut")
	say(lb, "from the other")
	require.NoError(t, hung.Signal(syscall.SIGCONT))
	awaitAvailable(t, "mqtt", addresses[:]...)

	// A restart ends what is connected, and nobody is turned away.
	_, err := other.running.end()
	require.NoError(t, err)
	say(lb, "over a restart")
	other.start(t)
	awaitAvailable(t, "mqtt", addresses[:]...)
	say(lb, "with both again")
	require.Zero(t, metric(t, "connection_errors_total", labels("error_type", "no_backend")))
	_, _ = subscriber.end()
}
