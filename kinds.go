package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// kind says how an option of a T is read, filled in, checked and shown. What is
// nil is not done.
type kind[T any] struct {
	read  func(p *parser, s spec, t *T) error               // what follows the name in a Caddyfile; nil = one value
	want  string                                            // what that is
	parse func(p *parser, s spec, value string, t *T) error // reads it
	fill  func(t *T)                                        // the default, where nothing is set
	check func(path string, t *T) error                     // refuses what JSON may have
	show  func(t *T) string                                 // to compare two, with their defaults
}

// readInto reads what follows the name, which is the current token.
func (k kind[T]) readInto(p *parser, s spec, t *T) error {
	if k.read != nil {
		return k.read(p, s, t)
	}
	value, err := p.value(s.name, k.want)
	if err != nil {
		return err
	}
	return k.parse(p, s, value, t)
}

func (k kind[T]) readBy(read func(*parser, spec, *T) error) kind[T] {
	k.read = read
	return k
}

func (k kind[T]) filledBy(fill func(*T)) kind[T] {
	k.fill = fill
	return k
}

// checkedBy adds a check, of what depends on other options.
func (k kind[T]) checkedBy(check func(path string, t *T) error) kind[T] {
	first := k.check
	k.check = func(path string, t *T) error { return errors.Join(first(path, t), check(path, t)) }
	return k
}

func (k kind[T]) shownBy(show func(*T) string) kind[T] {
	k.show = show
	return k
}

// orShown shows the text for what is not set.
func (k kind[T]) orShown(text string) kind[T] {
	show := k.show
	return k.shownBy(func(t *T) string {
		if s := show(t); s != notSet {
			return s
		}
		return text
	})
}

const notSet = "not set"

// slot is where a T has an option's value.
type slot[T, V any] struct {
	get       func(*T) (v V, set bool)
	put       func(*T, V)
	zeroUnset bool // 0 is no value
}

// plain is for fields whose zero value is as good as none. As for optional, the
// field's object is made if there is none.
func plain[T any, V comparable](at func(*T) *V) slot[T, V] {
	return slot[T, V]{
		get: func(t *T) (V, bool) {
			var zero V
			v := *at(t)
			return v, v != zero
		},
		put:       func(t *T, v V) { *at(t) = v },
		zeroUnset: true,
	}
}

// optional is for fields whose zero value means something of its own.
func optional[T, V any](at func(*T) **V) slot[T, V] {
	return slot[T, V]{
		get: func(t *T) (v V, set bool) {
			if p := *at(t); p != nil {
				return *p, true
			}
			return v, false
		},
		put: func(t *T, v V) { *at(t) = &v },
	}
}

// fillWith returns a fill that leaves what is set. A default of zero is none.
func fillWith[T any, V comparable](at slot[T, V], value V) func(*T) {
	var zero V
	return func(t *T) {
		if _, set := at.get(t); !set && value != zero {
			at.put(t, value)
		}
	}
}

// asNumber is a whole number within the bounds. Without a default, 0, a plain
// field may be 0 in JSON, whatever the bounds are.
func asNumber[T any](low, high, value int, at slot[T, int]) kind[T] {
	return kind[T]{
		want: "a number",
		parse: func(p *parser, s spec, text string, t *T) error {
			n, err := strconv.Atoi(text)
			if err != nil {
				return p.Errf("%s %s: want a number from %d to %d%s", s.name, text, low, high, valueHint(s, text))
			}
			at.put(t, n)
			return p.located(checkRange(s.name, n, low, high))
		},
		fill: fillWith(at, value),
		check: func(path string, t *T) error {
			n, set := at.get(t)
			if !set {
				return nil
			}
			if at.zeroUnset && value == 0 {
				return checkRange(path, n, min(low, 0), high)
			}
			return checkRange(path, n, low, high)
		},
		show: func(t *T) string {
			if n, set := at.get(t); set {
				return strconv.Itoa(n)
			}
			return notSet
		},
	}
}

// asDuration is a duration that is not below low. Without a default, 0, a plain
// field may be 0 in JSON all the same.
func asDuration[T any](low, value time.Duration, at slot[T, caddy.Duration]) kind[T] {
	return kind[T]{
		want: "a duration such as 10s",
		parse: func(p *parser, s spec, text string, t *T) error {
			d, err := caddy.ParseDuration(text)
			if err != nil {
				return p.Errf("%s %s: want a duration such as 10s%s", s.name, text, durationHint(s, text))
			}
			at.put(t, caddy.Duration(d))
			return p.located(checkDuration(s.name, caddy.Duration(d), low))
		},
		fill: fillWith(at, caddy.Duration(value)),
		check: func(path string, t *T) error {
			if d, set := at.get(t); set {
				return checkJSONDuration(path, d, low)
			}
			return nil
		},
		show: func(t *T) string {
			d, set := at.get(t)
			if !set && !at.zeroUnset {
				return notSet
			}
			return durationText(d)
		},
	}
}

// asFlag is on where its name stands.
func asFlag[T any](at func(*T) *bool) kind[T] {
	return kind[T]{
		read: func(p *parser, s spec, t *T) error {
			*at(t) = true
			if !p.NextArg() {
				return nil
			}
			more := ""
			if s.aside != "" {
				more = ", and " + s.aside
			}
			return p.Errf("%s: takes no value, found %q: it is off unless it is there%s", s.name, p.Val(), more)
		},
		fill: func(t *T) { at(t) },
		show: func(t *T) string {
			if *at(t) {
				return "on"
			}
			return "off"
		},
	}
}

// asText is a text; want is what it is called.
func asText[T any](want, value string, check func(option, text string) error, at slot[T, string]) kind[T] {
	return kind[T]{
		want: want,
		parse: func(p *parser, s spec, text string, t *T) error {
			at.put(t, text)
			return p.located(check(s.name, text))
		},
		fill: fillWith(at, value),
		check: func(path string, t *T) error {
			if text, set := at.get(t); set {
				return check(path, text)
			}
			return nil
		},
		show: func(t *T) string {
			text, _ := at.get(t)
			return strconv.Quote(text)
		},
	}
}

// asModule is a guest module's JSON, which is checked when that is loaded.
func asModule[T any](value json.RawMessage, at func(*T) *json.RawMessage) kind[T] {
	return kind[T]{
		fill: func(t *T) {
			if raw := at(t); len(*raw) == 0 {
				*raw = slices.Clone(value)
			}
		},
		show: func(t *T) string { return short(*at(t)) },
	}
}

func checkRange(option string, n, low, high int) error {
	if n < low || n > high {
		return fmt.Errorf("%s %d: want a number from %d to %d", option, n, low, high)
	}
	return nil
}

func checkDuration(option string, d caddy.Duration, low time.Duration) error {
	switch {
	case d < 0:
		return fmt.Errorf("%s %s: want a duration that is not negative", option, time.Duration(d))
	case time.Duration(d) < low:
		return fmt.Errorf("%s %s: want a duration of at least %s", option, time.Duration(d), low)
	case d > 0 && time.Duration(d) < minDuration:
		return fmt.Errorf("%s %s: want 0 or a duration of at least %s", option, time.Duration(d), minDuration)
	case time.Duration(d) > maxDuration:
		return fmt.Errorf("%s %s: want a duration of at most %s", option, time.Duration(d), maxDuration)
	}
	return nil
}

// checkJSONDuration is checkDuration for JSON, where a number has no unit: 10 is
// taken for seconds by those who write it.
func checkJSONDuration(option string, d caddy.Duration, low time.Duration) error {
	err := checkDuration(option, d, low)
	if d > 0 && time.Duration(d) < minDuration {
		return fmt.Errorf(`%w: write "%ds" (a number without a unit counts nanoseconds)`, err, int64(d))
	}
	return err
}

// durationText leaves zeros out at the end: 1h, not 1h0m0s.
func durationText(d caddy.Duration) string {
	text := time.Duration(d).String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
