package command

import (
	"io"
	"strings"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
)

// column of a table. Those of numbers are aligned to the right.
type column struct {
	title string
	right bool
}

// writeTable writes rows under their titles, two spaces apart. Nothing is cut: free
// text is the last column, and a terminal or a reader does with its end as it likes.
func writeTable(w io.Writer, columns []column, rows [][]string) error {
	widths := make([]int, len(columns))
	for i, c := range columns {
		widths[i] = words.Width(c.title)
	}
	for _, row := range rows {
		for i := range row {
			row[i] = words.Printable(row[i])
			widths[i] = max(widths[i], words.Width(row[i]))
		}
	}
	titles := make([]string, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	var b strings.Builder
	for _, row := range append([][]string{titles}, rows...) {
		var line strings.Builder
		for i, cell := range row {
			gap := strings.Repeat(" ", max(widths[i]-words.Width(cell), 0))
			if columns[i].right {
				line.WriteString(gap + cell + "  ")
			} else {
				line.WriteString(cell + gap + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}
