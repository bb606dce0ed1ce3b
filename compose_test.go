package tcplb

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// composeFile is what the tests look at of docker-compose.yaml.
type composeFile struct {
	Services map[string]composeService
	Volumes  map[string]any
}

type composeService struct {
	Build, Image string
	Command      []string
	Ports        []string
	Volumes      []string
	Environment  map[string]string
	DependsOn    map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck  struct{ Test []string }
	Grace        string `yaml:"stop_grace_period"`
	Sysctls      map[string]string
	Ulimits      struct{ Nofile struct{ Soft, Hard int } }
	Logging      struct{ Options map[string]string }
	CapDrop      []string `yaml:"cap_drop"`
	SecurityOpt  []string `yaml:"security_opt"`
	ReadOnly     bool     `yaml:"read_only"`
}

func loadCompose(t testing.TB) composeFile {
	t.Helper()
	var c composeFile
	decodeYAML(t, "docker-compose.yaml", &c)
	return c
}

func TestCompose(t *testing.T) {
	c := loadCompose(t)
	require.ElementsMatch(t, []string{"balancer", "backend1", "backend2", "backend3", "prometheus", "grafana"}, slices.Collect(maps.Keys(c.Services)))
	for service, ports := range map[string][]string{
		"balancer":   {"8080:8080", "127.0.0.1:9090:9090"},
		"backend1":   {"127.0.0.1:3001:3001"},
		"backend2":   {"127.0.0.1:3002:3002"},
		"backend3":   {"127.0.0.1:3003:3003"},
		"prometheus": {"127.0.0.1:9091:9090"},
		"grafana":    {"127.0.0.1:3000:3000"},
	} {
		require.Equal(t, ports, c.Services[service].Ports, service)
	}
	for service, after := range map[string][]string{
		"backend1": nil, "backend2": {"backend1"}, "backend3": {"backend1"},
		"balancer": {"backend1", "backend2", "backend3"}, "prometheus": nil, "grafana": {"prometheus"},
	} {
		require.ElementsMatch(t, after, slices.Collect(maps.Keys(c.Services[service].DependsOn)), service)
		for _, d := range c.Services[service].DependsOn {
			require.Equal(t, "service_healthy", d.Condition, service)
		}
	}
	for name, s := range c.Services {
		if s.Image == "caddy-tcp-lb:local" {
			require.Equal(t, name == "backend1", s.Build != "", "one builds it, after which the others start")
		} else {
			require.Regexp(t, `:v?\d+\.\d+\.\d+$`, s.Image, "a pinned version")
		}
		if name != "balancer" { // whose check is the image's
			require.NotEmpty(t, s.Healthcheck.Test, name)
		}
		require.NotEmpty(t, s.Logging.Options["max-size"], "%s: a log that ends", name)
		require.Equal(t, []string{"ALL"}, s.CapDrop, name)
		require.Equal(t, []string{"no-new-privileges:true"}, s.SecurityOpt, name)
		require.Equal(t, name != "grafana", s.ReadOnly, name)
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			if !strings.HasPrefix(from, ".") {
				require.Contains(t, c.Volumes, from, name)
			}
		}
	}
	balancer := c.Services["balancer"]
	require.Greater(t, balancer.Ulimits.Nofile.Soft, 10_000)
	require.Equal(t, map[string]string{"net.ipv4.tcp_migrate_req": "1"}, balancer.Sysctls)
	require.Equal(t, "docker build -t caddy-tcp-lb:local .", makeTarget(t, "docker-build"), "the stack's own tag")
	require.Equal(t, "admin", c.Services["grafana"].Environment["GF_SECURITY_ADMIN_PASSWORD"])
}

// makeTarget returns the only line of the target's recipe.
func makeTarget(t testing.TB, name string) string {
	t.Helper()
	_, rest, ok := strings.Cut(readFile(t, "Makefile"), "\n"+name+":")
	require.True(t, ok, name)
	lines := strings.SplitN(rest, "\n", 3)
	return strings.TrimSpace(lines[1])
}

// A single file that is mounted keeps its old text when an editor replaces it.
func TestComposeMountsDirectories(t *testing.T) {
	for name, s := range loadCompose(t).Services {
		for _, v := range s.Volumes {
			from, _, _ := strings.Cut(v, ":")
			if strings.HasPrefix(from, ".") {
				info, err := os.Stat(from)
				require.NoError(t, err, name)
				require.True(t, info.IsDir(), "%s: %s", name, from)
			}
		}
	}
}

// stackHandler is the handler of the stack's balancer.
func stackHandler(t testing.TB) *Handler {
	t.Helper()
	config, err := adapt(t, readFile(t, "docker/balancer/Caddyfile"))
	require.NoError(t, err)
	h := handlerOf(t, firstHandler(t, config))
	require.NoError(t, h.fill())
	return h
}

// Docker must not kill the balancer while it drains, which ends a second after
// the drain timeout.
func TestComposeGracePeriod(t *testing.T) {
	grace, err := time.ParseDuration(loadCompose(t).Services["balancer"].Grace)
	require.NoError(t, err)
	const shutdown = 5 * time.Second // of the rest of Caddy
	require.GreaterOrEqual(t, grace, time.Duration(*stackHandler(t).DrainTimeout)+exitMargin+shutdown)
}

func TestDockerfile(t *testing.T) {
	text := readFile(t, "Dockerfile")
	from := regexp.MustCompile(`(?m)^FROM (\S+)`).FindAllStringSubmatch(text, -1)
	require.Len(t, from, 2)
	for _, f := range from {
		require.Regexp(t, `:\d+\.\d+\.\d+`, f[1], "a pinned version")
	}
	for _, line := range []string{
		"COPY go.mod go.sum ./\nRUN go mod download\n", " -o /out/caddy ./cmd/caddy\n",
		"\nUSER caddy\n", "http://127.0.0.1:2019/tcp_lb/pools",
	} {
		require.Contains(t, text, line)
	}
	_, build, _ := strings.Cut(text, "go mod download")
	build, _, _ = strings.Cut(build, "FROM ")
	require.NotContains(t, build, "docker", "what the build does not read builds nothing anew")
	require.NotContains(t, build, "COPY . ")
	for _, c := range regexp.MustCompile(`(?m)^COPY (docker/\S+)`).FindAllStringSubmatch(text, -1) {
		require.FileExists(t, c[1])
	}
}

// TestStack runs the configs of the stack, each backend in a process of its own
// as in its container; only names and ports are others.
func TestStack(t *testing.T) {
	for _, file := range []string{"docker/balancer/Caddyfile", "docker/backend/Caddyfile"} {
		text := readFile(t, filepath.FromSlash(file))
		require.Equal(t, string(caddyfile.Format([]byte(text))), text, "as caddy fmt has it")
		config, err := adapt(t, text)
		require.NoError(t, err)
		require.NoError(t, validate(t, config))
	}
	balancer := readFile(t, "docker/balancer/Caddyfile")
	for i := 1; i <= 3; i++ {
		service := loadCompose(t).Services[fmt.Sprintf("backend%d", i)]
		require.Equal(t, []string{"run", "--config", "/etc/caddy-backend/Caddyfile"}, service.Command)
		port := service.Environment["PORT"]
		address := freeAddress(t)
		for name, value := range service.Environment {
			t.Setenv(name, value)
		}
		t.Setenv("PORT", address[strings.LastIndex(address, ":")+1:])
		config, err := adapt(t, readFile(t, "docker/backend/Caddyfile"))
		require.NoError(t, err)
		startChild(t, config)
		eventually(t, func() bool { return listens(address) }, "backend %d", i)
		balancer = replaceOnce(t, balancer, fmt.Sprintf("backend%d:%s", i, port), address)

		// What its health check asks for, without the balancer.
		check := service.Healthcheck.Test
		status, body := request(t, "GET", strings.Replace(check[len(check)-1], "127.0.0.1:"+port, address, 1), "")
		require.Equal(t, 200, status)
		require.Equal(t, fmt.Sprintf("backend-%d\n", i), body)
	}
	lb, metrics := freeAddress(t), freeAddress(t)
	balancer = replaceOnce(t, balancer, "tcp_lb/:8080", "tcp_lb/"+lb)
	balancer = replaceOnce(t, balancer, "http://:9090", "http://"+metrics)
	config, err := adapt(t, replaceOnce(t, balancer, "{\n", "{\n\tadmin off\n\tpersist_config off\n"))
	require.NoError(t, err)
	require.NoError(t, caddy.Load([]byte(config), true))
	t.Cleanup(func() { require.NoError(t, caddy.Stop()) })

	for i := 1; i <= 3; i++ {
		status, body := request(t, "GET", "http://"+lb+"/", "")
		require.Equal(t, 200, status)
		require.Equal(t, fmt.Sprintf("backend-%d\n", i), body)
	}
	c := dialClient(t, lb)
	write(t, c, "test data\n")
	require.NoError(t, c.CloseWrite())
	expect(t, c, "test data\n")
	expectEOF(t, c)
	eventually(t, func() bool {
		status, _ := request(t, "GET", "http://"+metrics+"/health", "")
		return status == 200
	}, "all are checked")
	_, body := request(t, "GET", "http://"+metrics+"/metrics", "")
	require.Contains(t, body, `tcp_lb_connections_total{backend=`)
}

func replaceOnce(t testing.TB, text, old, replacement string) string {
	t.Helper()
	require.GreaterOrEqual(t, strings.Count(text, old), 1, old)
	return strings.Replace(text, old, replacement, 1)
}
