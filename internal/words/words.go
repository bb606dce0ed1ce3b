// Package words writes numbers, times and what others have named for people.
package words

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Width is how many characters s has.
func Width(s string) int { return utf8.RuneCountInString(s) }

// Printable keeps what others have named from steering a terminal, or from turning
// around what stands beside it.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// Brief leaves out of an error about a certificate what its rest says anyway.
func Brief(text string) string {
	return strings.Replace(text, "tls: failed to verify certificate: x509: ", "", 1)
}

// Shorten cuts s so that it is no wider than room.
func Shorten(s string, room int) string {
	if Width(s) <= room {
		return s
	}
	return string([]rune(s)[:room-1]) + "…"
}

// Size is a number of bytes: three digits, and a unit of a thousand.
func Size(n uint64) string {
	if n < 1000 {
		return strconv.FormatUint(n, 10) + " B"
	}
	v, unit := scaled(float64(n), " kB", " MB", " GB", " TB", " PB", " EB")
	return v + unit
}

// Count is a number, in full as long as that is short.
func Count(n uint64) string {
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

// Span is a time in seconds, in its two largest units.
func Span(seconds float64) string {
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

// Plural is a number and what is counted.
func Plural(n uint64, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}
