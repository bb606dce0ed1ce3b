package tcplb

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/stretchr/testify/require"
)

// TestExamples loads every config of examples/ as a user would.
func TestExamples(t *testing.T) {
	caddyfiles := exampleFiles(t, func(name string) bool {
		return strings.HasPrefix(name, "Caddyfile") || filepath.Ext(name) == ".caddyfile"
	})
	require.NotEmpty(t, caddyfiles)
	for _, file := range caddyfiles {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, string(caddyfile.Format(text)), string(text), "as caddy fmt has it")
			config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt(text, map[string]any{"filename": file})
			require.NoError(t, err)
			require.Empty(t, warnings)
			require.Contains(t, string(config), `"handler":"tcp_lb"`)
			require.NoError(t, validate(t, string(config)))
		})
	}
	for _, file := range exampleFiles(t, func(name string) bool { return filepath.Ext(name) == ".json" }) {
		t.Run(file, func(t *testing.T) {
			config, err := os.ReadFile(file)
			require.NoError(t, err)
			require.NoError(t, validate(t, string(config)))
		})
	}
}

// exampleFiles returns the files below examples/ whose base name is wanted.
func exampleFiles(t testing.TB, wanted func(name string) bool) (files []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir("examples", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && wanted(entry.Name()) {
			files = append(files, filepath.ToSlash(path))
		}
		return err
	}))
	return files
}
