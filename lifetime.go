package tcplb

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

const (
	defaultLifetimeSpread = 10 // percent
	maxLifetimeSpread     = 50
)

// lifetime is how long connections may last.
type lifetime struct {
	limit  time.Duration // 0 = as long as they want
	spread int           // percent
}

// draw returns the lifetime of one connection, within the spread by a random number
// from 0 on that is below 1; 0 = it has none. What began together is not to end
// together.
func (l lifetime) draw(random float64) time.Duration {
	return l.limit + time.Duration((2*random-1)*float64(l.limit)*float64(l.spread)/100)
}

func (h *Handler) lifetime() lifetime {
	l := lifetime{limit: time.Duration(h.MaxLifetime)}
	if h.MaxLifetimeSpread != nil {
		l.spread = *h.MaxLifetimeSpread
	}
	return l
}

// asLifetime is a duration and by how much it is spread, in two fields.
func asLifetime() kind[Handler] {
	return asDuration(0, 0, plain(func(h *Handler) *caddy.Duration { return &h.MaxLifetime })).
		readBy((*parser).maxLifetime).filledBy(fillLifetimeSpread).checkedBy(checkLifetimeSpread).shownBy(lifetimeText)
}

// maxLifetime reads a duration and, after it, a spread.
func (p *parser) maxLifetime(s spec, h *Handler) error {
	if !p.NextArg() {
		return p.Errf("%s: the value is missing, want a duration such as 1h", s.name)
	}
	value := p.Val()
	if err := named(handlerOptions, s.name).kind.parse(p, s, value, h); err != nil {
		return err
	}
	if !p.NextArg() {
		return nil
	}
	text := p.Val()
	number, isPercent := strings.CutSuffix(text, "%")
	percent, err := strconv.Atoi(number)
	switch {
	case err != nil:
		return p.Errf("%s %s: want a spread after it such as 10%%, or nothing, found %q", s.name, value, text)
	case !isPercent:
		return p.Errf("%s %s %s: did you mean %s%%?", s.name, value, text, text)
	case h.MaxLifetime == 0:
		return p.Errf("%s %s %s: there is nothing to spread", s.name, value, text)
	}
	h.MaxLifetimeSpread = &percent
	if err := checkSpread(s.name+" "+value+" "+text, percent); err != nil {
		return p.located(err)
	}
	if p.NextArg() {
		return p.Errf("%s %s %s: a duration and a spread are enough, found %q", s.name, value, text, p.Val())
	}
	return nil
}

func checkSpread(option string, percent int) error {
	if percent < 0 || percent > maxLifetimeSpread {
		return fmt.Errorf("%s: want a spread from 0%% to %d%%", option, maxLifetimeSpread)
	}
	return nil
}

func fillLifetimeSpread(h *Handler) {
	if h.MaxLifetime != 0 && h.MaxLifetimeSpread == nil {
		h.MaxLifetimeSpread = new(defaultLifetimeSpread)
	}
}

func checkLifetimeSpread(path string, h *Handler) error {
	switch percent := h.MaxLifetimeSpread; {
	case percent == nil:
		return nil
	case h.MaxLifetime == 0:
		return fmt.Errorf("%s_spread %d: there is nothing to spread, %s is missing", path, *percent, path)
	default:
		return checkSpread(fmt.Sprintf("%s_spread %d", path, *percent), *percent)
	}
}

func lifetimeText(h *Handler) string {
	switch {
	case h.MaxLifetime == 0:
		return "none"
	case h.MaxLifetimeSpread == nil:
		return durationText(h.MaxLifetime)
	}
	return fmt.Sprintf("%s %d%%", durationText(h.MaxLifetime), *h.MaxLifetimeSpread)
}
