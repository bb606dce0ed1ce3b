package tcplb

import (
	"encoding/json"
	"go/ast"
	goparser "go/parser"
	"go/token"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// leafFields returns the paths of all values in the JSON of a t.
func leafFields(t reflect.Type, under string) (paths []string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		of := f.Type
		if of.Kind() == reflect.Pointer {
			of = of.Elem()
		}
		switch {
		case f.Anonymous:
			paths = append(paths, leafFields(of, under)...)
		case name == "":
		case of.Kind() == reflect.Struct:
			if of == reflect.TypeFor[BackendTLS]() { // whose being there is an option
				paths = append(paths, under+name)
			}
			paths = append(paths, leafFields(of, under+name+".")...)
		default:
			paths = append(paths, under+name)
		}
	}
	return paths
}

// paths returns where the options are in JSON, each at a place of its own.
func paths[T any](t testing.TB, options []option[T]) (list []string) {
	t.Helper()
	names := namesOf(options)
	slices.Sort(names)
	require.Equal(t, slices.Compact(slices.Clone(names)), names, "one row for each")
	for _, o := range options {
		if o.path != dialoguePath || !slices.Contains(list, o.path) { // two options make its steps
			list = append(list, o.path)
		}
	}
	return list
}

// tlsAside has what the rows of TLS say together with others, and what is Caddy's and
// has none.
var tlsAside = []string{
	"tls.off", "tls.client_certificate_key_file", "tls.client_certificate_automate",
	"tls.root_ca_pool", "tls.root_ca_pem_files", "tls.except_ports",
}

// A field that has no row is never checked, filled in, compared or documented.
func TestEveryFieldIsAnOption(t *testing.T) {
	require.ElementsMatch(t, leafFields(reflect.TypeFor[Handler](), ""),
		append(append(paths(t, handlerOptions), tlsAside...), "health_checks.active.tls.off", "health_checks.active.disabled", "max_lifetime_spread", "access_log_connects", "access_log_interval"), "beside what off is, what follows max_lifetime, and what is in the block of access_log")
	require.ElementsMatch(t, leafFields(reflect.TypeFor[BackendConfig](), ""),
		append(append(paths(t, backendOptions), tlsAside...), "address"), "beside what stands before the block")
	require.ElementsMatch(t, leafFields(reflect.TypeFor[App](), ""), paths(t, globalOptions))
}

// set returns the paths of a JSON object's values. Those of modules and lists
// are not looked into.
func set(t testing.TB, raw []byte, under string) (paths []string) {
	t.Helper()
	var members map[string]json.RawMessage
	require.NoError(t, json.Unmarshal(raw, &members))
	for name, value := range members {
		if value[0] == '{' && !(name == "tls" && string(value) == "{}") && !slices.Contains([]string{"selection_policy", "headers", "check", "ca"}, name) {
			paths = append(paths, set(t, value, under+name+".")...)
		} else {
			paths = append(paths, under+name)
		}
	}
	return paths
}

// TestOptionsReachTheirFields: what the Caddyfile has is in the JSON where its
// row says, and nothing else is.
func TestOptionsReachTheirFields(t *testing.T) {
	for _, o := range handlerOptions {
		if o.name == "backend" {
			continue
		}
		config, err := adapt(t, lbCaddyfile("a:80", withNeeded(o.name, strings.TrimSpace(o.name+" "+validOptions[o.name]))...))
		require.NoError(t, err)
		want := []string{"handler", "backends", o.path}
		if needed, _, _ := strings.Cut(neededOptions[o.name], " "); needed != "" {
			want = append(want, named(handlerOptions, needed).path)
		}
		want = withoutTLS(want)
		require.ElementsMatch(t, want, set(t, []byte(firstHandler(t, config)), ""))
	}
	for _, o := range backendOptions {
		lines := []string{"backend a:80 {", "\t" + strings.TrimSpace(o.name+" "+validBackendOptions[o.name]), "}"}
		if strings.HasPrefix(o.name, "tls_") {
			lines = append(lines, "tls")
		}
		config, err := adapt(t, lbCaddyfile("", lines...))
		require.NoError(t, err)
		b, err := json.Marshal(handlerOf(t, firstHandler(t, config)).Backends[0])
		require.NoError(t, err)
		require.ElementsMatch(t, withoutTLS([]string{"address", o.path}), set(t, b, ""))
	}
	for _, o := range globalOptions {
		config, err := adapt(t, "{\n\ttcp_lb {\n\t\t"+strings.TrimSpace(o.name+" "+validGlobalOptions[o.name])+"\n\t}\n}\n")
		require.NoError(t, err)
		require.ElementsMatch(t, []string{"apps.tcp_lb." + o.path}, set(t, []byte(config), ""))
	}
}

// withoutTLS leaves out of the paths that of an object that has more in it than its
// being there. Of a client's certificate there are two files.
func withoutTLS(paths []string) []string {
	if i := slices.Index(paths, "tls.client_certificate_file"); i >= 0 {
		paths = append(paths, "tls.client_certificate_key_file")
	}
	if slices.ContainsFunc(paths, func(p string) bool { return strings.HasPrefix(p, "tls.") }) {
		paths = slices.DeleteFunc(paths, func(p string) bool { return p == "tls" })
	}
	return paths
}

// requireSound wants of rows defaults that are accepted, and told as they are,
// and a 0 that is the default, or refused, or explained.
func requireSound[T any](t testing.TB, options []option[T], fresh func() T) {
	t.Helper()
	filled := fresh()
	fillIn(&filled, options)
	require.NoError(t, checkAll(&filled, options))
	for _, o := range options {
		require.NotEmpty(t, o.help, o.name)
		if o.kind.show == nil {
			continue
		}
		shown := o.kind.show(&filled)
		switch {
		case o.unset == "":
			require.NotContains(t, shown, notSet, "%s: its default wants a text", o.name)
		case strings.HasPrefix(o.unset, "`"):
			require.Contains(t, shown, `"`+strings.Trim(o.unset, "`")+`"`, o.name)
		case shown != notSet:
			require.Regexp(t, "^"+shown+`\b`, o.unset, o.name)
		}
		zero := fresh()
		if o.kind.parse == nil || strings.HasPrefix(shown, `"`) {
			continue
		}
		if o.kind.parse(newParser(nowhere()), o.spec, "0", &zero) != nil {
			require.Empty(t, o.zero, "%s: 0 is refused", o.name)
			continue
		}
		fillIn(&zero, options)
		require.NoError(t, checkAll(&zero, options))
		if o.zero == "" {
			require.Equal(t, shown, o.kind.show(&zero), "%s: 0 is no default, and no word says what it is", o.name)
		} else {
			require.Regexp(t, "^0", o.kind.show(&zero), "%s: 0 is taken for what is not set", o.name)
		}
	}
}

// nowhere is a Caddyfile without an option.
func nowhere() *caddyfile.Dispenser {
	d := caddyfile.NewTestDispenser("tcp_lb")
	d.Next()
	return d
}

func TestDefaultsOfOptions(t *testing.T) {
	requireSound(t, handlerOptions, func() Handler { return Handler{Backends: []BackendConfig{{Address: "a:80", Weight: new(1)}}} })
	requireSound(t, backendOptions, func() BackendConfig { return BackendConfig{} })
	requireSound(t, accessLogOptions, func() Handler { return Handler{AccessLog: true} })
	requireSound(t, globalOptions, func() App { return App{} })
}

// documented are the rows of the options in the documentation, with links as in the README.
func documented[T any](options []option[T]) (rows []string) {
	var defaults T
	fillIn(&defaults, options)
	for _, o := range options {
		usage := strings.ReplaceAll(strings.TrimSpace(o.name+" "+o.values), "|", "` or `")
		unset, meaning := o.unset, o.help
		if unset == "" {
			unset = o.kind.show(&defaults)
		}
		if o.zero != "" {
			meaning += "; 0 = " + o.zero
		}
		rows = append(rows, "| `"+usage+"` | "+unset+" | `"+o.path+"` | "+meaning+" |")
	}
	return rows
}

// usedFirst are the options that the README shows.
var usedFirst = []string{"name", "backend", "dynamic", "lb_policy", "lb_try_duration", "health_interval", "health_uri",
	"close_if_unhealthy", "max_connections", "idle_timeout", "drain_timeout", "access_log"}

// TestReadmeHasTheOptions compares the tables of README and docs/options.md with
// the rows, and writes them with -update.
func TestReadmeHasTheOptions(t *testing.T) {
	const arguments = "| `<address>...` after `tcp_lb` | | `backends` | backends of weight 1 |"
	rows := documented(handlerOptions)
	first := []string{arguments}
	for i, o := range handlerOptions {
		if slices.Contains(usedFirst, o.name) {
			first = append(first, rows[i])
		}
	}
	require.Len(t, first, 1+len(usedFirst))
	requireTable(t, "README.md", "option", first)
	requireTable(t, "docs/options.md", "option", append([]string{arguments}, rows...))
	requireTable(t, "docs/options.md", "in a backend's block", documented(backendOptions))
	requireTable(t, "docs/options.md", "in the block of `access_log`", documented(accessLogOptions))
	requireTable(t, "docs/options.md", "global option", documented(globalOptions))
}

// requireTable wants the rows under a table's header.
func requireTable(t testing.TB, file, of string, rows []string) {
	t.Helper()
	want := strings.Join(rows, "\n")
	if strings.HasPrefix(file, "docs/") {
		want = strings.ReplaceAll(want, "](docs/", "](")
	}
	text, header := readFile(t, file), "| "+of+" | default | JSON | meaning |\n|---|---|---|---|\n"
	before, after, ok := strings.Cut(text, header)
	require.True(t, ok, header)
	table, after, _ := strings.Cut(after, "\n\n")
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(before+header+want+"\n\n"+after), 0o644))
		return
	}
	require.Equal(t, want, table)
}

// usage is how the options look in a Caddyfile, as a comment has them.
func usage[T any](options []option[T], indent string) string {
	var b strings.Builder
	for _, o := range options {
		b.WriteString(indent + strings.TrimSpace(o.name+" "+strings.TrimSuffix(o.values, "[{ ... }]")))
		if o.name == "backend" {
			b.WriteString(" [{\n" + usage(backendOptions, indent+"\t") + indent + "}]")
		}
		if o.name == "access_log" {
			b.WriteString(" [{\n" + usage(accessLogOptions, indent+"\t") + indent + "}]")
		}
		b.WriteString("\n")
	}
	return b.String()
}

func TestCommentsHaveTheOptions(t *testing.T) {
	comment := func(file, function string) (text string) {
		f, err := goparser.ParseFile(token.NewFileSet(), file, nil, goparser.ParseComments)
		require.NoError(t, err)
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && d.Name.Name == function {
				text = d.Doc.Text()
			}
		}
		return text
	}
	require.Contains(t, comment("caddyfile.go", "UnmarshalCaddyfile"),
		"\ttcp_lb [<address>...] {\n"+usage(handlerOptions, "\t\t")+"\t}\n")
	require.Contains(t, comment("globaloption.go", "parseGlobalOption"),
		"\ttcp_lb {\n"+usage(globalOptions, "\t\t")+"\t}\n")
}
