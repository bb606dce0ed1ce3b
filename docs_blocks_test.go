package tcplb

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
)

// documents are all that users read.
func documents(t testing.TB) (files []string) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*/*.md"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		files = append(files, found...)
	}
	require.Greater(t, len(files), 10)
	return files
}

// excerpt is what stands between two fences of a document.
type excerpt struct{ place, language, text string }

// split returns a document's blocks, and the document without them.
func split(t testing.TB, file string) (blocks []excerpt, prose string) {
	t.Helper()
	inside, n := false, 0
	for line := range strings.Lines(readFile(t, file)) {
		n++
		language, fence := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "```")
		switch {
		case fence && !inside:
			blocks = append(blocks, excerpt{fmt.Sprintf("%s:%d", file, n), language, ""})
			inside = true
		case fence:
			require.Empty(t, language, "%s:%d: a fence that ends a block, and names a language", file, n)
			inside = false
		case inside:
			blocks[len(blocks)-1].text += line
		default:
			prose += line
		}
	}
	require.False(t, inside, "%s: a block has no end", file)
	return blocks, prose
}

// whole makes a Caddyfile of a block that is one, a handler or some options.
func whole(text string) string {
	const before, after = "{\n\tlayer4 {\n\t\ttcp_lb/127.0.0.1:8080 {\n\t\t\troute {\n", "\t\t\t}\n\t\t}\n\t}\n}\n"
	first, _, _ := strings.Cut(text, " ")
	switch {
	case strings.HasPrefix(text, "{\n"), strings.ContainsAny(first, ".:"):
		return text
	case first == "tcp_lb":
		return before + text + after
	}
	return before + "tcp_lb 10.0.0.1:5432 {\n" + text + "}\n" + after
}

// Every block says what it is, and what is a config can be loaded as it stands.
// The commands have a test of their own.
func TestDocumentedBlocks(t *testing.T) {
	t.Setenv("OPS_PASSWORD_HASH", "$2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG")
	t.Setenv("CHECK_TOKEN", "a")
	ca := newIssuer(t)
	var own struct {
		Cert string `json:"client_certificate_file"`
		Key  string `json:"client_certificate_key_file"`
	}
	require.NoError(t, json.Unmarshal([]byte("{"+ca.files(ca.issue(nil))+"}"), &own))
	here := strings.NewReplacer("/var/log/caddy/", t.TempDir()+"/", "/etc/caddy/ca.pem", ca.file, " lb.pem", " "+own.Cert, " lb-key.pem", " "+own.Key)
	count := make(map[string]int)
	for _, file := range documents(t) {
		blocks, _ := split(t, file)
		for _, b := range blocks {
			count[b.language]++
			switch b.language {
			case "caddyfile":
				require.Equal(t, string(caddyfile.Format([]byte(b.text))), b.text, "%s: as caddy fmt has it", b.place)
				config, err := adapt(t, string(caddyfile.Format([]byte(here.Replace(whole(b.text))))))
				require.NoError(t, err, b.place)
				require.NoError(t, validate(t, config), b.place)
			case "json":
				requireJSON(t, b)
			case "sh", "console", "sql", "dockerfile", "text":
			default:
				t.Errorf("%s: a block of language %q", b.place, b.language)
			}
		}
	}
	require.Greater(t, count["caddyfile"], 15)
	require.Greater(t, count["sh"], 10)
}

// requireJSON takes a handler, a config or lines of a log.
func requireJSON(t testing.TB, b excerpt) {
	t.Helper()
	var object map[string]json.RawMessage
	if err := json.Unmarshal([]byte(b.text), &object); err == nil && object["logger"] == nil {
		config := b.text
		if object["handler"] != nil {
			config = layer4Config(fmt.Sprintf(`"srv":{"listen":["tcp_lb/127.0.0.1:8080"],"routes":[{"handle":[%s]}]}`, b.text))
		}
		require.NoError(t, validate(t, config), b.place)
		return
	}
	for line := range strings.Lines(b.text) {
		require.NoError(t, json.Unmarshal([]byte(line), &object), b.place)
		require.Contains(t, object, "logger", b.place)
	}
}

// Commands within sentences are ones, with flags that there are.
func TestInlineCommands(t *testing.T) {
	tcpLB := &cobra.Command{Use: "tcp-lb"}
	caddycmd.Commands()["tcp-lb"].CobraFunc(tcpLB)
	flag := regexp.MustCompile(`--([a-z-]+)`)
	seen := 0
	for _, file := range documents(t) {
		_, prose := split(t, file)
		for _, m := range regexp.MustCompile("`caddy ([^`]+)`").FindAllStringSubmatch(prose, -1) {
			seen++
			words := strings.Fields(m[1])
			require.Contains(t, caddycmd.Commands(), words[0], "%s: %s", file, m[0])
			if words[0] != "tcp-lb" || len(words) == 1 || !regexp.MustCompile(`^[a-z]+$`).MatchString(words[1]) {
				continue
			}
			cmd, _, err := tcpLB.Find(words[1:])
			require.NoError(t, err, "%s: %s", file, m[0])
			require.NotSame(t, tcpLB, cmd, "%s: %s", file, m[0])
			for _, f := range flag.FindAllStringSubmatch(m[1], -1) {
				require.NotNil(t, cmd.Flag(f[1]), "%s: %s", file, m[0])
			}
		}
	}
	require.Greater(t, seen, 20)
}

// What is called a metric is one.
func TestDocumentedMetrics(t *testing.T) {
	reference := readFile(t, "docs/metrics.md")
	for _, file := range documents(t) {
		_, prose := split(t, file)
		for _, m := range regexp.MustCompile("`(tcp_lb_[a-z_]+)[`{]").FindAllStringSubmatch(prose, -1) {
			if m[1] != "tcp_lb_health" && m[1] != "tcp_lb_status" {
				require.Contains(t, reference, "\n| `"+m[1]+"` |", file)
			}
		}
	}
}

// Each field of the admin endpoint's answers is named.
func TestDocumentedFields(t *testing.T) {
	text := readFile(t, "docs/api.md")
	for _, answer := range []reflect.Type{reflect.TypeFor[backendStatus](), reflect.TypeFor[poolSummary]()} {
		for i := range answer.NumField() {
			name, _, _ := strings.Cut(answer.Field(i).Tag.Get("json"), ",")
			require.Contains(t, text, "`"+name+"`")
		}
	}
}

// What docs/migrate.md says is there is an option, a policy or a command, or
// belongs to caddy-l4.
func TestMigrationLeadsToOptions(t *testing.T) {
	known := []string{"tcp_lb", "caddy", "dynamic", "versions", "proxy_protocol", "tls", "remote_ip", "close", "throttle", "allow", "matching_timeout", "proxy"}
	known = append(known, namesOf(handlerOptions)...)
	known = append(known, namesOf(backendOptions)...)
	known = append(known, namesOf(accessLogOptions)...)
	known = append(known, namesOf(globalOptions)...)
	for _, m := range caddy.GetModules("layer4.tcp_lb.selection_policies") {
		known = append(known, m.ID.Name())
	}
	// Within a row of caddy tcp-lb.
	known = append(known, "connections", "drain", "kill", "maint", "ready", "status", "weight")
	rows := regexp.MustCompile(`(?m)^\|.*\| (.*) \|$`).FindAllStringSubmatch(readFile(t, "docs/migrate.md"), -1)
	require.Greater(t, len(rows), 60)
	for _, row := range rows {
		for _, m := range regexp.MustCompile("`([a-z_]+)[^`]*`").FindAllStringSubmatch(row[1], -1) {
			require.Contains(t, known, m[1], row[0])
		}
	}
}
