package command

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// column of a table. Those of numbers are aligned to the right.
type column struct {
	title string
	right bool
}

// maxWidth is where a last column is cut that is free text: the whole of it is in
// the JSON. Addresses are never cut.
const (
	maxWidth = 120
	minText  = 40
)

// writeTable writes rows under their titles, two spaces apart. The last column
// may be free text.
func writeTable(w io.Writer, columns []column, rows [][]string, freeText bool) error {
	widths := make([]int, len(columns))
	for i, c := range columns {
		widths[i] = width(c.title)
	}
	for _, row := range rows {
		for i := range row {
			row[i] = printable(row[i])
			widths[i] = max(widths[i], width(row[i]))
		}
	}
	if freeText {
		last, before := len(columns)-1, 0
		for _, n := range widths[:last] {
			before += n + 2
		}
		room := max(maxWidth-before, minText)
		for _, row := range rows {
			row[last] = shorten(row[last], room)
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
			gap := strings.Repeat(" ", max(widths[i]-width(cell), 0))
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

func width(s string) int { return utf8.RuneCountInString(s) }

// printable keeps what others have named from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

func shorten(s string, room int) string {
	if width(s) <= room {
		return s
	}
	return string([]rune(s)[:room-1]) + "…"
}

// size is a number of bytes for people: three digits, and a unit of a thousand.
func size(n uint64) string {
	if n < 1000 {
		return strconv.FormatUint(n, 10) + " B"
	}
	v, unit := scaled(float64(n), " kB", " MB", " GB", " TB", " PB", " EB")
	return v + unit
}

// count is a number for people, in full as long as that is short.
func count(n uint64) string {
	if n < 1_000_000 {
		return strconv.FormatUint(n, 10)
	}
	v, unit := scaled(float64(n), "k", "M", "G", "T", "P", "E")
	return v + unit
}

// scaled divides v by 1000 until three digits are left, once at least.
func scaled(v float64, units ...string) (digits, unit string) {
	for _, unit = range units {
		v /= 1000
		if v < 999.5 {
			break
		}
	}
	switch {
	case v < 9.95:
		return strconv.FormatFloat(v, 'f', 1, 64), unit
	default:
		return strconv.FormatFloat(math.Round(v), 'f', 0, 64), unit
	}
}

// span is a time in seconds for people, in its two largest units.
func span(seconds float64) string {
	d := time.Duration(max(seconds, 0) * float64(time.Second))
	day := 24 * time.Hour
	switch {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", math.Floor(d.Seconds()*10)/10)
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%02dh", d/day, d%day/time.Hour)
	}
}

// plural is a number and what is counted.
func plural(n uint64, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}
