package checks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
)

// Dialogue talks to a backend in whatever it speaks: what is sent, and what the
// answers have to contain, step by step.
type Dialogue struct {
	// Steps are taken in their order, one at least.
	Steps []Step `json:"steps"`

	steps []step
}

// Step is one of two things: to send a text, or to wait for one.
type Step struct {
	// Send is sent as it is, but for the escapes \r \n \t \\ \" and \xNN, a byte.
	// Global placeholders are resolved once, when the config is loaded.
	Send string `json:"send,omitempty"`
	// Expect is what the answer has to contain, after what the step before found
	// in it, with the same escapes. After a ~ it is a regular expression, with no
	// escapes but its own. What was received before something is sent is no answer
	// to that. An answer may have 64 KB.
	Expect string `json:"expect,omitempty"`
}

// step is a Step that can be taken.
type step struct {
	send    []byte // nil = expect
	expect  []byte
	pattern *regexp.Regexp // in place of expect
}

// CaddyModule returns the Caddy module information.
func (*Dialogue) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  Namespace + ".dialogue",
		New: func() caddy.Module { return new(Dialogue) },
	}
}

// Provision refuses what is wrong.
func (d *Dialogue) Provision(caddy.Context) error {
	if err := CheckSteps(d.Steps); err != nil {
		return err
	}
	repl := caddy.NewReplacer()
	for _, each := range d.Steps {
		s, _ := each.parse()
		if s.send != nil {
			text, err := repl.ReplaceOrErr(string(s.send), true, false) // braces may be its own
			if err != nil {
				return err
			}
			s.send = []byte(text)
		}
		d.steps = append(d.steps, s)
	}
	return nil
}

// CheckSteps refuses what can't be taken.
func CheckSteps(steps []Step) error {
	if len(steps) == 0 {
		return errors.New("no steps: want a send or an expect at least")
	}
	for i, s := range steps {
		if _, err := s.parse(); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	return nil
}

func (s Step) parse() (p step, err error) {
	switch {
	case !utf8.ValidString(s.Send + s.Expect):
		return p, fmt.Errorf(`%q: want UTF-8, and other bytes as \xNN`, s.Send+s.Expect)
	case s.Send != "" && s.Expect != "":
		return p, errors.New("want a send or an expect, each a step of its own")
	case s.Send != "":
		if p.send, err = unescape(s.Send); err != nil {
			return p, fmt.Errorf("send %q: %w", s.Send, err)
		}
	case strings.HasPrefix(s.Expect, "~"):
		if p.pattern, err = regexp.Compile(s.Expect[1:]); err != nil {
			return p, fmt.Errorf("expect %q: want a regular expression after the ~: %w", s.Expect, err)
		}
		if p.pattern.Match(nil) {
			return p, fmt.Errorf("expect %q: it matches no answer at all", s.Expect)
		}
	case s.Expect != "":
		if p.expect, err = unescape(s.Expect); err != nil {
			return p, fmt.Errorf("expect %q: %w", s.Expect, err)
		}
		if len(p.expect) > maxAnswer {
			return p, fmt.Errorf("expect: want %d KB at most", maxAnswer>>10)
		}
	default:
		return p, errors.New("want a text to send, or to expect")
	}
	return p, nil
}

// String is the step as it is told of in errors.
func (s Step) String() string {
	if pattern, ok := strings.CutPrefix(s.Expect, "~"); ok {
		return fmt.Sprintf("~%q", pattern)
	}
	return `"` + s.Expect + `"`
}

// unescape turns the escapes into what they stand for.
func unescape(text string) ([]byte, error) {
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			out = append(out, text[i])
			continue
		}
		i++
		if i == len(text) {
			return nil, errors.New(`it ends in a lone \, write \\ for one`)
		}
		switch c := text[i]; c {
		case 'r':
			out = append(out, '\r')
		case 'n':
			out = append(out, '\n')
		case 't':
			out = append(out, '\t')
		case '\\', '"':
			out = append(out, c)
		case 'x':
			if i+2 >= len(text) || !isHex(text[i+1]) || !isHex(text[i+2]) {
				return nil, errors.New(`want two hexadecimal digits after \x`)
			}
			out = append(out, hexValue(text[i+1])<<4|hexValue(text[i+2]))
			i += 2
		default:
			return nil, fmt.Errorf(`there is no escape \%s (there are \r \n \t \\ \" and \xNN)`, string([]rune(text[i:])[:1]))
		}
	}
	return out, nil
}

func isHex(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F' }

func hexValue(c byte) byte {
	switch {
	case c >= 'a':
		return c - 'a' + 10
	case c >= 'A':
		return c - 'A' + 10
	}
	return c - '0'
}

// Check implements Check.
func (d *Dialogue) Check(ctx context.Context, t Target) error {
	conn, err := t.Dial(ctx)
	if err != nil {
		return err
	}
	var a answer
	for i, s := range d.steps {
		if s.send == nil {
			if err := a.await(conn, s); err != nil {
				return fmt.Errorf("expected %s, %w", d.Steps[i], err)
			}
			continue
		}
		a.forget()
		if _, err := conn.Write(s.send); err != nil {
			return fmt.Errorf("step %d, sending: %w", i+1, unsent(conn, err))
		}
	}
	if d.steps[len(d.steps)-1].send != nil {
		awaitClose(conn, lingerTime) // it may have been a farewell
	}
	return nil
}

// answer is what a backend has said.
type answer struct {
	said    []byte
	from    int // what steps have found of it is before this
	scanned int // the text that is awaited does not begin before this
}

func (a *answer) forget() { a.said, a.from, a.scanned = a.said[:0], 0, 0 }

// await reads until the answer has what the step expects.
func (a *answer) await(r io.Reader, s step) error {
	for {
		if a.find(s) {
			return nil
		}
		if len(a.said) >= maxAnswer {
			return fmt.Errorf("not found in the first %d KB", maxAnswer>>10)
		}
		if cap(a.said)-len(a.said) < 512 {
			grown := make([]byte, len(a.said), min(maxAnswer, 2*cap(a.said)+1024))
			copy(grown, a.said)
			a.said = grown
		}
		n, err := r.Read(a.said[len(a.said):cap(a.said)])
		a.said = a.said[:len(a.said)+n]
		if err != nil && !(n > 0 && a.find(s)) {
			return a.missing(err)
		}
	}
}

// find looks for what the step expects in what has come so far, and goes past it.
func (a *answer) find(s step) bool {
	if s.pattern != nil {
		at := s.pattern.FindIndex(a.said[a.from:])
		if at == nil {
			return false
		}
		a.from += at[1]
		a.scanned = a.from
		return true
	}
	i := bytes.Index(a.said[a.scanned:], s.expect)
	if i < 0 {
		a.scanned = max(a.scanned, len(a.said)-len(s.expect)+1)
		return false
	}
	a.from = a.scanned + i + len(s.expect)
	a.scanned = a.from
	return true
}

// missing says what came in place of what was expected.
func (a *answer) missing(err error) error {
	err = received(err)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		err = &failure{"no more within the time", err}
	}
	said := a.said[a.from:]
	if len(said) == 0 {
		return fmt.Errorf("got nothing: %w", err)
	}
	if len(said) > 100 {
		return fmt.Errorf("got %q…: %w", said[:100], err)
	}
	return fmt.Errorf("got %q: %w", said, err)
}

// Interface guards
var (
	_ Check             = (*Dialogue)(nil)
	_ caddy.Provisioner = (*Dialogue)(nil)
)
