package tcplb

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"
)

// anchors are those of a document's headings, as GitHub makes them.
func anchors(t testing.TB, file string) map[string]bool {
	t.Helper()
	_, prose := split(t, file)
	set := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(prose, -1) {
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, m[1])
		require.False(t, set[anchor], "%s: two headings %q", file, m[1])
		set[anchor] = true
	}
	return set
}

// Every link within the project leads somewhere, to a heading if it names one.
func TestLinksOfTheDocumentation(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^()]+)\)`)
	for _, file := range documents(t) {
		_, prose := split(t, file)
		for _, m := range link.FindAllStringSubmatch(prose, -1) {
			if strings.HasPrefix(m[1], "https://") {
				continue
			}
			path, anchor, _ := strings.Cut(m[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			_, err := os.Stat(target)
			require.NoError(t, err, "%s: %s", file, m[0])
			if anchor != "" {
				require.True(t, anchors(t, target)[anchor], "%s: %s", file, m[0])
			}
		}
	}
}

// The README leads to each page.
func TestReadmeLinksEveryPage(t *testing.T) {
	readme := readFile(t, "README.md")
	for _, file := range documents(t) {
		if filepath.Dir(file) == "docs" {
			require.Contains(t, readme, "]("+filepath.ToSlash(file))
		}
	}
}
