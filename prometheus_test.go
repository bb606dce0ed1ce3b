//go:build unix

package tcplb

import (
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

const prometheusPackage = "prometheus" // Debian's, with promtool

func requirePromtool(t testing.TB) {
	t.Helper()
	requirePrograms(t, "", prometheusPackage, "promtool")
}

func TestPromtool(t *testing.T) {
	requirePromtool(t)
	promtool := func(t *testing.T, stdin string, args ...string) string {
		t.Helper()
		cmd := exec.Command("promtool", args...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		return string(out)
	}
	t.Run("check config", func(t *testing.T) {
		out := promtool(t, "", "check", "config", "prometheus.yml")
		require.Contains(t, out, "SUCCESS: 1 rule files found", "and checked")
	})
	t.Run("test rules", func(t *testing.T) {
		promtool(t, "", "test", "rules", "prometheus/tcp_lb.rules_test.yml")
	})
	t.Run("check metrics", func(t *testing.T) {
		lb := startLB(t, "", namedServer(t, "a").address)
		_, err := ask(lb)
		require.NoError(t, err)
		require.Empty(t, promtool(t, exposition(t), "check", "metrics"))
	})
}

// alertRule is a rule of prometheus/tcp_lb.rules.yml.
type alertRule struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

func alertRules(t testing.TB) []alertRule {
	t.Helper()
	var file struct {
		Groups []struct{ Rules []alertRule }
	}
	require.NoError(t, yaml.Unmarshal([]byte(readFile(t, "prometheus/tcp_lb.rules.yml")), &file))
	require.Len(t, file.Groups, 1)
	return file.Groups[0].Rules
}

// Every alert has a line in docs/alerts.md that says what to do, and a test.
func TestAlertsHaveRunbookAndTest(t *testing.T) {
	runbook, test := readFile(t, "docs/alerts.md"), readFile(t, "prometheus/tcp_lb.rules_test.yml")
	for _, r := range alertRules(t) {
		require.Contains(t, []string{"warning", "critical"}, r.Labels["severity"], r.Alert)
		require.NotEmpty(t, r.Annotations["summary"], r.Alert)
		require.True(t, strings.HasSuffix(r.Annotations["runbook_url"], "/docs/alerts.md#alerts"), r.Alert)
		require.Contains(t, runbook, "| `"+r.Alert+"` |", "a runbook line")
		require.Contains(t, test, "alertname: "+r.Alert+"\n        exp_alerts:\n", "%s fires in the test", r.Alert)
		require.Contains(t, test, "alertname: "+r.Alert+"\n        exp_alerts: []", "%s doesn't always", r.Alert)
	}
}

// An ordinary restart of the stack's balancer, whose metrics are gone while its
// connections drain, is no alarm.
func TestRestartIsNoAlarm(t *testing.T) {
	var config struct {
		Global struct {
			Interval string `yaml:"scrape_interval"`
		}
	}
	decodeYAML(t, "prometheus.yml", &config)
	interval, err := time.ParseDuration(config.Global.Interval)
	require.NoError(t, err)
	const start = 10 * time.Second // a container's
	for _, r := range alertRules(t) {
		if r.Alert == "TcpLbBalancerDown" {
			wait, err := time.ParseDuration(r.For)
			require.NoError(t, err)
			require.Greater(t, wait, time.Duration(*stackHandler(t).DrainTimeout)+exitMargin+start+2*interval)
		}
	}
}

// scrapeEvery is how often Prometheus scrapes in the tests, and how long it
// waits for an answer.
const scrapeEvery = 250 * time.Millisecond

// prometheusServer is a real Prometheus with the project's own config and rules.
//
// Queries are evaluated for the time when the last wait ended. A scrape that
// fails later, on a machine that is busy, changes nothing of that.
type prometheusServer struct {
	t       testing.TB
	address string
	at      time.Time
}

// startPrometheus runs it on the project's config, in which only the target and
// the two intervals are replaced, each where it stands once.
func startPrometheus(t testing.TB, target string) *prometheusServer {
	t.Helper()
	requirePrograms(t, "", prometheusPackage, "prometheus")
	dir := t.TempDir()
	config := readFile(t, "prometheus.yml")
	for old, replacement := range map[string]string{
		"- balancer:9090":         "- " + target,
		"scrape_interval: 5s":     "scrape_interval: " + scrapeEvery.String(),
		"evaluation_interval: 5s": "evaluation_interval: " + scrapeEvery.String(),
	} {
		require.Equal(t, 1, strings.Count(config, old), old)
		config = strings.Replace(config, old, replacement, 1)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	require.NoError(t, os.CopyFS(filepath.Join(dir, "prometheus"), os.DirFS("prometheus")))
	p := &prometheusServer{t: t, address: freeAddress(t)}
	command{name: "prometheus", args: []string{
		"--config.file=" + filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path=" + filepath.Join(dir, "data"),
		"--web.listen-address=" + p.address, "--log.level=warn",
	}}.begin(t)
	p.wait(func() bool {
		if !listens(p.address) {
			return false
		}
		status, _ := request(t, "GET", "http://"+p.address+"/-/ready", "")
		return status == 200
	}, "Prometheus is ready")
	p.eventually(func() bool { return true }, "a scrape")
	return p
}

// eventually is like wait, and looks at scrapes only that have come in: after one
// that timed out there is no series.
func (p *prometheusServer) eventually(cond func() bool, what string, args ...any) {
	p.t.Helper()
	p.wait(func() bool { return p.sum(`up{job="tcp_lb"}`) == 1 && cond() }, what, args...)
}

// wait is like the function eventually, gives Prometheus time to breathe, and looks
// at scrapes only that have come in or timed out.
func (p *prometheusServer) wait(cond func() bool, what string, args ...any) {
	p.t.Helper()
	eventually(p.t, func() bool {
		p.at = time.Now().Add(-2 * scrapeEvery)
		if cond() {
			return true
		}
		time.Sleep(scrapeEvery / 5)
		return false
	}, what, args...)
}

// get asks the HTTP API and decodes the answer's data.
func (p *prometheusServer) get(path string, query url.Values, data any) {
	p.t.Helper()
	status, body := request(p.t, "GET", "http://"+p.address+"/api/v1/"+path+"?"+query.Encode(), "")
	require.Equal(p.t, 200, status, body)
	answer := struct{ Data any }{data}
	require.NoError(p.t, json.Unmarshal([]byte(body), &answer), body)
}

// sample is one series' value; samples are those of a query now.
type sample struct {
	labels map[string]string
	value  float64
}

type samples []sample

func (p *prometheusServer) query(expr string) (list samples) {
	p.t.Helper()
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	p.get("query", url.Values{"query": {expr}, "time": {p.at.UTC().Format(time.RFC3339Nano)}}, &data)
	for _, r := range data.Result {
		list = append(list, sample{r.Metric, parseValue(p.t, r.Value[1])})
	}
	return list
}

func parseValue(t testing.TB, text any) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(text.(string), 64)
	require.NoError(t, err)
	return v
}

// sum adds the values up.
func (p *prometheusServer) sum(expr string) (total float64) {
	p.t.Helper()
	for _, s := range p.query(expr) {
		total += s.value
	}
	return total
}

// one returns the only value with the labels.
func (list samples) one(t testing.TB, pairs ...string) float64 {
	t.Helper()
	var found []float64
	for _, s := range list {
		if matches(s.labels, labels(pairs...)) {
			found = append(found, s.value)
		}
	}
	require.Len(t, found, 1, "%v of %v", pairs, list)
	return found[0]
}

func matches(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

// hasNumber reports whether a value is one, as quantiles of nothing are not.
func (list samples) hasNumber() bool {
	for _, s := range list {
		if !math.IsNaN(s.value) {
			return true
		}
	}
	return false
}

// everyPoint calls check with each value of the query at each scrape so far.
func (p *prometheusServer) everyPoint(expr string, since time.Time, check func(labels map[string]string, v float64)) {
	p.t.Helper()
	var data struct {
		Result []struct {
			Metric map[string]string
			Values [][2]any
		}
	}
	p.get("query_range", url.Values{
		"query": {expr}, "step": {fmt.Sprint(scrapeEvery.Seconds())},
		"start": {since.UTC().Format(time.RFC3339Nano)}, "end": {p.at.UTC().Format(time.RFC3339Nano)},
	}, &data)
	require.NotEmpty(p.t, data.Result, expr)
	for _, r := range data.Result {
		for _, v := range r.Values {
			check(r.Metric, parseValue(p.t, v[1]))
		}
	}
}
