package tcplb

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// labelBlock is what caddy-docker-proxy makes of labels: a dot goes one block
// deeper, and the number that ends a first name is an order. Blocks of several
// containers become one where they begin alike.
type labelBlock struct {
	text   string
	inside []*labelBlock
}

// enter returns the block inside b that begins with text, a new one if need be.
func (b *labelBlock) enter(text string) *labelBlock {
	for _, c := range b.inside {
		if c.text == text {
			return c
		}
	}
	c := &labelBlock{text: text}
	b.inside = append(b.inside, c)
	return c
}

func (b *labelBlock) write(to *strings.Builder) {
	to.WriteString(b.text)
	if len(b.inside) > 0 {
		to.WriteString(" {\n")
		for _, c := range b.inside {
			c.write(to)
		}
		to.WriteString("}")
	}
	to.WriteString("\n")
}

// addLabels adds those of one container, whose address upstreams gives.
func (b *labelBlock) addLabels(labels map[string]string, address string) {
	upstreams := regexp.MustCompile(`\{\{upstreams (\d+)\}\}`)
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		path := strings.Split(name, ".")
		at := b
		for _, step := range path[:len(path)-1] {
			at = at.enter(step)
		}
		value := upstreams.ReplaceAllString(labels[name], address+":$1")
		at.enter(path[len(path)-1] + " " + value)
	}
}

func TestDockerProxyLabels(t *testing.T) {
	var c struct {
		Services map[string]struct{ Labels map[string]string }
	}
	decodeYAML(t, "examples/docker-proxy/docker-compose.yaml", &c)
	all := new(labelBlock)
	balancer := c.Services["caddy"].Labels
	require.Equal(t, "/health", balancer["caddy_1.tcp_lb_health"], "a site, for Caddy to read")
	maps.DeleteFunc(balancer, func(name, _ string) bool { return strings.HasPrefix(name, "caddy_1") })
	all.addLabels(balancer, "")
	for i := range 3 {
		all.addLabels(c.Services["db"].Labels, fmt.Sprintf("10.0.0.%d", i+1))
	}
	require.Len(t, all.inside, 1)
	all.inside[0].text = "" // the global options
	var text strings.Builder
	all.inside[0].write(&text)
	config, err := adapt(t, string(caddyfile.Format([]byte(text.String()))))
	require.NoError(t, err, text.String())
	h := handlerOf(t, firstHandler(t, config))
	require.NoError(t, h.fill())
	require.NoError(t, h.check())
	require.Equal(t, "db", h.Name)
	require.Len(t, h.Backends, 3)
	require.Equal(t, "10.0.0.3:5432", h.Backends[2].Address)
}
