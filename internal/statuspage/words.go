package statuspage

import (
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/words"
)

// maxText is how long the text of an error may be here; the whole of it is in the log.
const maxText = 240

func text(s string) string { return words.Shorten(words.Printable(s), maxText) }

// maxLabel is more than a name in DNS or the path of a socket has.
const maxLabel = 280

// label is a name that others have given.
func label(s string) string { return words.Shorten(words.Printable(s), maxLabel) }

// clock is a time of day, with the day if that is another one.
func clock(now, t time.Time) string {
	t = t.In(now.Location())
	if t.Year() == now.Year() && t.YearDay() == now.YearDay() {
		return t.Format("15:04:05")
	}
	return t.Format("2 Jan 15:04")
}

// age is how long ago t was.
func age(now, t time.Time) string {
	d := now.Sub(t)
	if d < time.Second {
		return "0s"
	}
	if d < 10*time.Second {
		return strconv.Itoa(int(d/time.Second)) + "s"
	}
	return words.Span(d.Seconds())
}

// since is " since 14:02:05 (8m12s)", or nothing if that is not known.
func since(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return " since " + clock(now, t) + " (" + age(now, t) + ")"
}

func minutes(d time.Duration) string { return strings.TrimSuffix(d.Round(time.Minute).String(), "0s") }

// amount is a number in full as long as that is short, in groups of three digits.
func amount(n uint64) string {
	if n >= 10_000_000 {
		return words.Count(n)
	}
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural is a number and what is counted.
func plural(n uint64, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return amount(n) + " " + more
}

func atLeast0(n int64) uint64 { return uint64(max(n, 0)) }

// rate is so many in a second.
func rate(v float64) string {
	switch {
	case v == 0:
		return "0/s"
	case v < 9.95:
		return strconv.FormatFloat(max(v, 0.1), 'f', 1, 64) + "/s"
	}
	return amount(uint64(math.Round(v))) + "/s"
}

// flow is so many bytes in a second.
func flow(v float64) string { return words.Size(uint64(math.Round(v))) + "/s" }

// weight has one digit after the point, if need be.
func weight(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }

// argument is s as a word of a shell's command line, whatever is in it.
func argument(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._:/@%+,-", r)
	}
	if s != "" && s[0] != '-' && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(words.Printable(s), "'", `'\''`) + "'"
}
