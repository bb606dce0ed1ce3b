package command

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
)

func TestCompletion(t *testing.T) {
	a := startAdmin(t, answers(map[string]string{"/tcp_lb/pools": somePools, "/tcp_lb/backends": someBackends}))
	for args, want := range map[string]string{
		"status --lb ":                      "db web",
		"drain ":                            "10.0.1.1:5432 10.0.0.1:3001 [2001:db8::1234:5678]:3001",
		"kill 10.0.0":                       "10.0.1.1:5432 10.0.0.1:3001 [2001:db8::1234:5678]:3001",
		"drain a:1 ":                        "",
		"weight a:1 ":                       "config",
		"connections --sort ":               "age bytes idle",
		"":                                  "connections drain kill maint ready status weight",
		"drain --address 127.0.0.1:1 --lb ": "",
	} {
		list := []string{"tcp-lb"}
		if !strings.Contains(args, "--address") {
			list = append(list, "--address", a.address)
		}
		list = append([]string{cobra.ShellCompNoDescRequestCmd}, append(list, strings.Split(args, " ")...)...)
		root := &cobra.Command{Use: "caddy"}
		cmd := &cobra.Command{Use: "tcp-lb"}
		setUp(cmd)
		root.AddCommand(cmd)
		var b bytes.Buffer
		root.SetOut(&b)
		root.SetErr(io.Discard)
		root.SetArgs(list)
		require.NoError(t, root.Execute())
		got, _, _ := strings.Cut(b.String(), ":4\n") // no files
		require.Equal(t, want, strings.Join(strings.Fields(got), " "), args)
	}
	require.Contains(t, a.requests(), "GET /tcp_lb/backends?")
}

// Caddy has the command, with help for each part of it.
func TestRegistered(t *testing.T) {
	require.Contains(t, caddycmd.Commands(), "tcp-lb")
	for _, name := range []string{"status", "connections", "kill", "ready", "drain", "maint", "weight"} {
		out, code, err := caddyRun(t, name, "--help")
		require.NoError(t, err)
		require.Zero(t, code)
		require.Contains(t, out, "caddy tcp-lb "+name)
		require.Contains(t, out, "--json")
		for _, line := range strings.Split(out, "\n") {
			require.LessOrEqual(t, len(line), 140, line)
		}
	}
	out, _, err := caddyRun(t)
	require.NoError(t, err)
	require.Contains(t, out, "Takes a backend out of work")
}

func document(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile("../../" + file)
	require.NoError(t, err)
	return string(b)
}

// The commands of the documentation and of the help are ones.
func TestDocumentedCommands(t *testing.T) {
	help, _, err := caddyRun(t)
	require.NoError(t, err)
	text := help + document(t, "docs/maintenance.md")
	for _, name := range []string{"connections", "kill", "weight"} {
		out, _, err := caddyRun(t, name, "--help")
		require.NoError(t, err)
		text += out
	}
	a := startAdmin(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, `[{"lb":"web","address":"10.0.0.1:5432","state":"drain","backends":1,"available":1}]`)
	})
	lines := regexp.MustCompile(`(?m)^ *(?:\$ )?caddy tcp-lb ([a-z]+ [a-z0-9-].*?|status)(?: &&.*)?$`).FindAllStringSubmatch(text, -1)
	require.Greater(t, len(lines), 12)
	seen := make(map[string]bool)
	for _, line := range lines {
		if seen[line[1]] || strings.Contains(line[1], "[") {
			continue
		}
		seen[line[1]] = true
		args := strings.Fields(line[1])
		_, code, err := caddyRun(t, append(args, "--address", a.address)...)
		require.NoError(t, err, line[1])
		require.Zero(t, code, line[1])
	}
	require.GreaterOrEqual(t, len(seen), 10)
}

func TestStatusInTheReadme(t *testing.T) {
	a := startAdmin(t, answers(map[string]string{
		"/tcp_lb/pools": `[{"lb":"web","backends":2,"available":2,"active":5,"connections_total":1204,"errors_total":3,"retries_total":3,"received_bytes":518000,"sent_bytes":940000000}]`,
		"/tcp_lb/backends": `[
			{"lb":"web","address":"10.0.0.1:5432","configured":true,"weight":1,"effective_weight":1,"state":"ready","health":"up","active":3,"connections_total":602,"errors_total":3,"received_bytes":260000,"sent_bytes":471000000},
			{"lb":"web","address":"10.0.0.2:5432","configured":true,"weight":1,"effective_weight":3,"state":"ready","health":"up","active":2,"connections_total":602,"errors_total":0,"received_bytes":258000,"sent_bytes":469000000}]`,
	}))
	out, _, err := caddyRun(t, "status", "--address", a.address)
	require.NoError(t, err)
	require.Contains(t, document(t, "README.md"), "$ caddy tcp-lb status\n"+out+"```\n")
}
