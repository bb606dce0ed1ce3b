package tcplb

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// dashboardTitles are the dashboards by uid, with their titles.
var dashboardTitles = map[string]string{
	"tcp-lb-overview":    "Load Balancer Overview",
	"tcp-lb-backends":    "Backend Status",
	"tcp-lb-connections": "Connection Metrics",
}

// board is what the tests look at of a dashboard.
type board struct {
	UID    string `json:"uid"`
	Title  string `json:"title"`
	Panels []struct {
		ID          int    `json:"id"`
		Type        string `json:"type"`
		Title       string `json:"title"`
		Description string `json:"description"`
		Datasource  source `json:"datasource"`
		GridPos     struct{ X, Y, W, H int }
		Targets     []struct {
			RefID      string `json:"refId"`
			Datasource source `json:"datasource"`
			Expr       string `json:"expr"`
			Instant    bool   `json:"instant"`
			Range      bool   `json:"range"`
		} `json:"targets"`
		FieldConfig struct {
			Defaults struct {
				Unit       string `json:"unit"`
				NoValue    string `json:"noValue"`
				Thresholds struct {
					Steps []struct{ Color string } `json:"steps"`
				} `json:"thresholds"`
			} `json:"defaults"`
		} `json:"fieldConfig"`
	} `json:"panels"`
	Templating struct {
		List []struct {
			Name       string                 `json:"name"`
			Datasource source                 `json:"datasource"`
			Query      struct{ Query string } `json:"query"`
			IncludeAll bool                   `json:"includeAll"`
			AllValue   string                 `json:"allValue"`
			Multi      bool                   `json:"multi"`
		} `json:"list"`
	} `json:"templating"`
	Links []struct {
		Title       string `json:"title"`
		URL         string `json:"url"`
		IncludeVars bool   `json:"includeVars"`
		KeepTime    bool   `json:"keepTime"`
	} `json:"links"`
}

// source is a reference to a data source.
type source struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

// loadBoards returns the dashboards by uid.
func loadBoards(t testing.TB) map[string]board {
	t.Helper()
	boards := make(map[string]board)
	for _, file := range glob(t, "grafana/dashboards/*.json") {
		var b board
		require.NoError(t, json.Unmarshal([]byte(readFile(t, file)), &b), file)
		boards[b.UID] = b
	}
	require.Len(t, boards, len(dashboardTitles))
	return boards
}

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	list, err := filepath.Glob(pattern)
	require.NoError(t, err)
	require.NotEmpty(t, list, pattern)
	return list
}

// Nothing is misspelt or misplaced: decoding against Grafana's own types, panel
// plugins and queries included, knows every field and misses none.
func TestDashboardsFitGrafanasSchema(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	for _, file := range glob(t, "grafana/dashboards/*.json") {
		require.NoError(t, decodeStrictly(readFile(t, file)), file)
	}
	sound := readFile(t, "grafana/dashboards/overview.json")
	for _, field := range []string{"gridPos", "graphMode", "legendFormat", "noValue", "drawStyle", "includeAll", "keepTime"} {
		broken := strings.Replace(sound, `"`+field+`"`, `"`+field+`s"`, 1)
		require.Error(t, decodeStrictly(broken), "the check can fail: %s", field)
	}
}

func decodeStrictly(text string) error {
	var d dashboard.Dashboard
	if err := d.UnmarshalJSONStrict([]byte(text)); err != nil {
		return err
	}
	// Of these the above checks the panel plugin's own part only.
	var raw struct {
		Panels []struct {
			FieldConfig json.RawMessage `json:"fieldConfig"`
		} `json:"panels"`
	}
	if err := json.Unmarshal([]byte(text), &raw); err != nil {
		return err
	}
	for _, p := range raw.Panels {
		if err := new(dashboard.FieldConfigSource).UnmarshalJSONStrict(p.FieldConfig); err != nil {
			return err
		}
	}
	return d.Validate()
}

func TestDashboards(t *testing.T) {
	uid := provisionedSource(t)
	boards := loadBoards(t)
	for uid, title := range dashboardTitles {
		require.Equal(t, title, boards[uid].Title)
	}
	for name, b := range boards {
		t.Run(name, func(t *testing.T) {
			require.Len(t, b.Templating.List, 3)
			for i, want := range []string{"instance", "lb", "backend"} {
				v := b.Templating.List[i]
				require.Equal(t, want, v.Name)
				require.Equal(t, uid, v.Datasource.UID)
				require.True(t, v.IncludeAll && v.Multi, want)
				require.Equal(t, ".*", v.AllValue, "all includes the series without a backend")
			}
			requireLinks(t, b)
			requireGrid(t, b)
			var ids []int
			for _, p := range b.Panels {
				require.NotEmpty(t, p.Title)
				require.Greater(t, len(p.Description), 25, p.Title)
				require.Equal(t, source{"prometheus", uid}, p.Datasource, p.Title)
				require.NotEmpty(t, p.FieldConfig.Defaults.Unit, p.Title)
				require.NotEmpty(t, p.FieldConfig.Defaults.NoValue, p.Title)
				require.NotEmpty(t, p.FieldConfig.Defaults.Thresholds.Steps, p.Title)
				require.NotEmpty(t, p.Targets, p.Title)
				for _, q := range p.Targets {
					require.Equal(t, p.Datasource, q.Datasource, p.Title)
					require.NotEqual(t, q.Instant, q.Range, p.Title)
					requireInstance(t, q.Expr)
				}
				require.False(t, slices.Contains(ids, p.ID), "%s has the id of another panel", p.Title)
				ids = append(ids, p.ID)
			}
		})
	}
}

// requireLinks checks the links to the other dashboards, which keep the
// variables and the time range.
func requireLinks(t *testing.T, b board) {
	t.Helper()
	links := make(map[string]string)
	for _, l := range b.Links {
		require.True(t, l.IncludeVars && l.KeepTime, l.Title)
		links[strings.TrimPrefix(l.URL, "/d/")] = l.Title
	}
	want := make(map[string]string)
	for uid, title := range dashboardTitles {
		if uid != b.UID {
			want[uid] = title
		}
	}
	require.Equal(t, want, links)
}

// requireGrid checks that panels fill Grafana's 24 columns without overlap.
func requireGrid(t *testing.T, b board) {
	t.Helper()
	taken := make(map[[2]int]string)
	for _, p := range b.Panels {
		require.LessOrEqual(t, p.GridPos.X+p.GridPos.W, 24, p.Title)
		require.Positive(t, p.GridPos.W*p.GridPos.H, p.Title)
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				require.Empty(t, taken[[2]int{x, y}], p.Title)
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
}

// provisionedSource returns the uid of the data source that Grafana is given,
// and checks that it agrees with Prometheus and the stack.
func provisionedSource(t testing.TB) string {
	t.Helper()
	var sources struct {
		Datasources []struct {
			UID, Type, URL string
			IsDefault      bool              `yaml:"isDefault"`
			JSONData       map[string]string `yaml:"jsonData"`
		}
	}
	decodeYAML(t, "grafana/provisioning/datasources/prometheus.yaml", &sources)
	require.Len(t, sources.Datasources, 1)
	s := sources.Datasources[0]
	require.Equal(t, "prometheus", s.Type)
	require.True(t, s.IsDefault)
	var config struct {
		Global struct {
			Interval string `yaml:"scrape_interval"`
		}
	}
	decodeYAML(t, "prometheus.yml", &config)
	require.Equal(t, config.Global.Interval, s.JSONData["timeInterval"], "Grafana knows how often Prometheus scrapes")
	return s.UID
}

func decodeYAML(t testing.TB, file string, into any) {
	t.Helper()
	require.NoError(t, yaml.Unmarshal([]byte(readFile(t, file)), into), file)
}

// substitute fills in what Grafana does before it sends a query.
func substitute(expr string) string {
	return strings.NewReplacer(
		"$instance", ".*", "$lb", ".*", "$backend", ".*",
		"$__rate_interval", "1m", "$__range", "5m", "$__interval", "2m",
	).Replace(expr)
}

// expressions returns all queries of the dashboards by dashboard, panel and ref.
func expressions(t testing.TB) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for _, b := range loadBoards(t) {
		for _, p := range b.Panels {
			for _, q := range p.Targets {
				all[fmt.Sprintf("%s/%s/%s", b.Title, p.Title, q.RefID)] = substitute(q.Expr)
			}
		}
	}
	return all
}

// requireInstance wants every series of the query to be of the balancers chosen.
func requireInstance(t *testing.T, query string) {
	t.Helper()
	for _, after := range strings.Split(query, "tcp_lb_")[1:] {
		require.Regexp(t, `^\w+\{instance=~"\$instance"`, after, query)
	}
}
