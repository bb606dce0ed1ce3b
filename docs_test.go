package tcplb

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
)

// fenced returns the blocks of a document that are fenced as of the language.
func fenced(t testing.TB, file, language string) (blocks []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?s)\n```([a-z]*)\n(.*?)```\n").FindAllStringSubmatch(readFile(t, file), -1) {
		if m[1] == language {
			blocks = append(blocks, m[2])
		}
	}
	require.NotEmpty(t, blocks, file)
	return blocks
}

// documentedFields are those of the access line.
func documentedFields(t testing.TB) map[string]bool {
	t.Helper()
	fields := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(readFile(t, "docs/logs.md"), -1) {
		fields[m[1]] = true
	}
	return fields
}

func TestAccessLineIsDocumented(t *testing.T) {
	fields := documentedFields(t)
	require.True(t, fields["failed"] && fields["reason"])
	for _, block := range fenced(t, "docs/logs.md", "json") {
		for _, sample := range strings.Split(strings.TrimSpace(block), "\n") {
			var line map[string]any
			require.NoError(t, json.Unmarshal([]byte(sample), &line))
			require.Subset(t, keysOf(fields), keys(line))
		}
	}
	s := namedServer(t, "hello")
	lb, file := freeAddress(t), filepath.Join(t.TempDir(), "access.log")
	config := lbConfig(lb, `"name":"web","access_log":true,`+checksDisabled+","+backendsJSON(freeAddress(t), s.address)+"}")
	runCaddy(t, strings.Replace(config, `"default":{"level":"ERROR"}`, fmt.Sprintf(
		`"default":{"level":"ERROR"},"access":{"include":["layer4.handlers.tcp_lb.access"],"writer":{"output":"file","filename":%q}}`, file), 1))
	_, err := ask(lb)
	require.NoError(t, err)
	var line map[string]any
	eventually(t, func() bool {
		b, _ := os.ReadFile(file)
		return json.Unmarshal(b, &line) == nil
	}, "one line")
	require.Subset(t, keysOf(fields), keys(line))
}

func keysOf(set map[string]bool) (list []string) {
	for k := range set {
		list = append(list, k)
	}
	return list
}

// runLogBlock runs one of the documentation's global options, whose files are in the
// directory, and returns what its pool logs by.
func runLogBlock(t testing.TB, dir string, block int) *zap.Logger {
	t.Helper()
	blocks := slices.DeleteFunc(fenced(t, "docs/logs.md", "caddyfile"), func(b string) bool { return !strings.HasPrefix(b, "{") })
	text := strings.ReplaceAll(blocks[block], "/var/log/caddy/", dir+"/")
	text = strings.TrimSuffix(strings.TrimSpace(text), "}")
	// The default log is told apart by where it goes.
	text = replaceOnce(t, text, "log default {\n", "log default {\n\t\toutput file "+dir+"/default.log\n")
	config, err := adapt(t, text+fmt.Sprintf("\tadmin off\n\tpersist_config off\n\tlayer4 {\n\t\t%s {\n\t\t\troute {\n\t\t\t\ttcp_lb 127.0.0.1:1 {\n\t\t\t\t\thealth_interval off\n\t\t\t\t}\n\t\t\t}\n\t\t}\n\t}\n}\n", freeAddress(t)))
	require.NoError(t, err)
	runCaddy(t, config)
	return registry.newest(defaultName).logger
}

// TestLogBlock has lines go where the documentation says.
func TestLogBlock(t *testing.T) {
	dir := t.TempDir()
	logger := runLogBlock(t, dir, 0)
	for _, pool := range []string{"web", "db"} {
		logger.Named("access").Named(pool).Info(pool + " well")
		logger.Named("access").Named(pool).Warn(pool + " failed")
	}
	logger.Warn("backend is down")
	for file, want := range map[string][]string{
		"tcp_lb.log": {"web well", "web failed"}, "tcp_lb-db.log": {"db well", "db failed"},
		"tcp_lb-failures.log": {"web failed", "db failed"},
	} {
		content := readFile(t, filepath.Join(dir, file))
		require.Len(t, strings.Split(strings.TrimSpace(content), "\n"), len(want), file)
		for _, w := range want {
			require.Contains(t, content, w, file)
		}
	}
	content := readFile(t, filepath.Join(dir, "default.log"))
	require.Contains(t, content, "backend is down")
	require.NotContains(t, content, "well")
	require.NotContains(t, content, "failed")
}

// TestLogSampling has as many lines kept as the documentation says.
func TestLogSampling(t *testing.T) {
	dir := t.TempDir()
	logger := runLogBlock(t, dir, 1)
	const lines = 1000
	began := time.Now()
	for i := range lines {
		logger.Named("access").Named([]string{"web", "db"}[i%2]).Info("connection")
	}
	seconds := int(time.Since(began)/time.Second) + 2 // that these may fall into
	logger.Named("access").Named("web").Warn("connection")
	logger.Info("backend is up")
	content := readFile(t, filepath.Join(dir, "tcp_lb.log"))
	kept := strings.Count(content, `"level":"info"`)
	require.GreaterOrEqual(t, kept, 100)
	require.LessOrEqual(t, kept, 100*seconds+lines/50)
	require.Less(t, kept, lines)
	require.Equal(t, 1, strings.Count(content, `"level":"warn"`), "failures have their own share")
	require.Contains(t, readFile(t, filepath.Join(dir, "default.log")), "backend is up")
}

// A client that waits for its server's greeting is closed by a matcher that
// waits for its bytes.
func TestServerSpeaksFirst(t *testing.T) {
	s := namedServer(t, "220 hello")
	for name, c := range map[string]struct{ matcher, want string }{
		"a matcher that wants bytes": {`"tls":{}`, ""},
		"one that wants none":        {`"remote_ip":{"ranges":["192.0.2.0/24"]}`, "220 hello"},
	} {
		t.Run(name, func(t *testing.T) {
			lb := freeAddress(t)
			runCaddy(t, strings.Replace(layer4Config(fmt.Sprintf(
				`"srv":{"listen":[%q],"matching_timeout":"100ms","routes":[{"match":[{%s}],"handle":[{"handler":"close"}]},{"handle":[%s]}]}`,
				"tcp_lb/"+lb, c.matcher, withHandler(checksDisabled+","+backendsJSON(s.address)+"}"))), `"ERROR"`, `"PANIC"`, 1))
			got, err := ask(lb)
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
}
