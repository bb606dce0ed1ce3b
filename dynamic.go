package tcplb

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/discovery"
)

// dynamicSource is where a generation has backends from that come and go. It runs
// as long as the generation does.
type dynamicSource struct {
	discovery.Source
	reporter discovery.Reporter // itself; nil = it does not tell how it fares
	config   string             // in JSON
	name     string             // for people
	done     chan struct{}      // closed when it has ended

	told atomic.Bool // there was an answer
	// Guarded by the registry's mutex.
	found   []member // the last answer
	refused string   // what was wrong with it
}

const (
	// sourcePause is how long a source that ended by itself is left alone.
	sourcePause = 10 * time.Second
	// sourcePatience is how long the end of a config waits for its sources'.
	sourcePatience = 2 * time.Second
)

// loadSources makes the handler's sources.
func (h *Handler) loadSources(ctx caddy.Context) ([]*dynamicSource, error) {
	if len(h.DynamicBackendsRaw) == 0 {
		return nil, nil
	}
	var list []*dynamicSource
	for _, raw := range h.DynamicBackendsRaw {
		s, err := newDynamicSource(raw)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(list, func(o *dynamicSource) bool { return o.config == s.config }) {
			return nil, fmt.Errorf("dynamic_backends: source %s is listed twice", s.config)
		}
		list = append(list, s)
	}
	modules, err := ctx.LoadModule(h, "DynamicBackendsRaw")
	if err != nil {
		return nil, fmt.Errorf("loading the sources of backends: %w", err)
	}
	for i, m := range modules.([]any) {
		source, ok := m.(discovery.Source)
		if !ok {
			return nil, fmt.Errorf("module %T is not a source of backends", m)
		}
		list[i].Source = source
		if r, ok := m.(discovery.Reporter); ok {
			list[i].reporter, list[i].name = r, r.Status().Source
		}
		if slices.ContainsFunc(list[:i], list[i].looksForTheSame) {
			return nil, fmt.Errorf("dynamic_backends: source %q is listed twice", list[i].name)
		}
	}
	return list, nil
}

func newDynamicSource(raw json.RawMessage) (*dynamicSource, error) {
	var (
		compact bytes.Buffer
		named   struct {
			Source string `json:"source"`
		}
	)
	if err := errors.Join(json.Compact(&compact, raw), json.Unmarshal(raw, &named)); err != nil || named.Source == "" {
		return nil, fmt.Errorf(`dynamic_backends %s: want a list such as %s`, short(raw), exampleSources)
	}
	if err := checkSourceName(named.Source); err != nil {
		return nil, fmt.Errorf("dynamic_backends: %w", err)
	}
	return &dynamicSource{config: compact.String(), name: named.Source, done: make(chan struct{})}, nil
}

// wantedLocked returns the members that the config names, and then those that
// its sources have found, each address once: what comes first holds.
func (g *generation) wantedLocked() []member {
	if len(g.sources) == 0 {
		return g.config
	}
	list := slices.Clone(g.config)
	seen := make(map[string]bool, len(list))
	for _, m := range list {
		seen[m.target.String()] = true
	}
	for _, s := range g.sources {
		for _, m := range s.found {
			if address := m.target.String(); !seen[address] {
				seen[address] = true
				m.approach = g.approach // it may have been found for the config before
				list = append(list, m)
			}
		}
	}
	if list == nil {
		list = []member{}
	}
	return list
}

// succeedLocked has g begin with what the sources of the generation before have
// found, so that a reload does not take a pool's backends away. A source is the
// same if its config is, or if it looks for the same thing in another way.
func (g *generation) succeedLocked(old *generation) {
	if old == nil {
		return
	}
	for _, s := range g.sources {
		i := slices.IndexFunc(old.sources, func(o *dynamicSource) bool { return o.config == s.config })
		if i < 0 {
			i = slices.IndexFunc(old.sources, s.looksForTheSame)
		}
		if i >= 0 {
			s.found = old.sources[i].found
			s.told.Store(old.sources[i].told.Load())
		}
	}
}

func (s *dynamicSource) looksForTheSame(o *dynamicSource) bool {
	return s.reporter != nil && o.reporter != nil && s.name == o.name
}

// startSources runs the sources. Caddy's context for the modules ends too late:
// when their config has been cleaned up.
func (g *generation) startSources() {
	ctx, cancel := context.WithCancel(context.Background())
	g.endSources = cancel
	for _, s := range g.sources {
		// Owned by g; ends by endSources, and awaitSources waits for it.
		go g.follow(ctx, s)
	}
}

// hurrySources has the sources end, for those who stop many generations.
func (g *generation) hurrySources() {
	if isClosed(g.started) {
		g.endSources()
	}
}

// awaitSources waits until the sources have ended. A module that does not end is
// left behind: a reload must not hang on it, and it changes nothing any more.
func (g *generation) awaitSources() {
	if len(g.sources) == 0 {
		return
	}
	limit := time.NewTimer(sourcePatience)
	defer limit.Stop()
	for _, s := range g.sources {
		select {
		case <-s.done:
		case <-limit.C:
			g.logger.Error("source of backends does not end, going on without",
				zap.String("lb", g.name), zap.String("source", s.name))
			return
		}
	}
}

// follow runs the source, anew if it ends before its time.
func (g *generation) follow(ctx context.Context, s *dynamicSource) {
	defer close(s.done)
	for {
		g.run(ctx, s)
		if ctx.Err() != nil {
			return
		}
		g.logger.Error("source of backends ended by itself, running it again in a while",
			zap.String("lb", g.name), zap.String("source", s.name), zap.Duration("pause", sourcePause))
		if !pause(sourcePause, ctx.Done()) {
			return
		}
	}
}

// run runs the source, which may be anybody's module.
func (g *generation) run(ctx context.Context, s *dynamicSource) {
	defer func() {
		if v := recover(); v != nil {
			g.logger.Error("panic in a source of backends", zap.String("lb", g.name), zap.String("source", s.name),
				zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
		}
	}()
	s.Run(ctx, func(found []discovery.Found) {
		if ctx.Err() != nil {
			return
		}
		members, err := g.judge(s, found)
		g.tellRefused(s, err)
		if len(members) > 0 || len(found) == 0 { // else nothing of it is of use
			registry.change(g, s, members)
		}
	})
}

// judge makes members of what was found. The error says what can't be one.
func (g *generation) judge(s *dynamicSource, found []discovery.Found) (members []member, err error) {
	var errs []error
	for _, f := range found {
		t, err := parseTarget(f.Address)
		if err == nil && g.refuse != nil {
			err = g.refuse(t)
		}
		if err == nil {
			_, err = g.begins.unfit(t.String())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("backend %q: %w", f.Address, err))
			continue
		}
		m := member{target: t, weight: defaultWeight, backup: f.Backup, source: s.name}
		if f.Weight > 0 {
			m.weight = min(f.Weight, maxWeight)
		}
		members = append(members, m)
	}
	return members, errors.Join(errs...)
}

// tellRefused logs what could not be used of an answer, unless that is as before.
func (g *generation) tellRefused(s *dynamicSource, err error) {
	text := ""
	if err != nil {
		text = oneLine(err)
	}
	registry.mu.Lock()
	news := text != s.refused
	s.refused = text
	registry.mu.Unlock()
	if news && text != "" {
		g.logger.Warn("a source found backends that can't be used",
			zap.String("lb", g.name), zap.String("source", s.name), zap.String("error", text))
	}
}

// change makes what s has found members of g, as long as that runs: what a source
// of an ended config tells is late.
func (r *poolRegistry) change(g *generation, s *dynamicSource, found []member) {
	r.mu.Lock()
	p := g.pool
	if !slices.Contains(p.generations, g) {
		r.mu.Unlock()
		return
	}
	first := !s.told.Swap(true)
	s.found = found
	r.departed.prune(time.Now())
	slowly := g.hasAvailable() && (g.follows || !first) // else it is as the pool's start
	t, left := r.enrollLocked(p, g, g.wantedLocked(), p.drainUntilLocked())
	t.slowly = slowly
	if t.joined+t.left+t.reweighed == 0 {
		r.mu.Unlock()
		if first {
			p.changed()
		}
		return
	}
	r.settleLocked(p, &t)
	for _, b := range left {
		r.dropLocked(b, &t.lines)
	}
	if !slices.Contains(t.outdated, g) {
		t.outdated = append(t.outdated, g)
	}
	t.lines = slices.Insert(t.lines, 0, g.turnoverLine(s, &t))
	newest := p.newest.Load()
	r.mu.Unlock()
	t.finish(p, newest)
}

func (g *generation) turnoverLine(s *dynamicSource, t *turnover) logLine {
	return logLine{"backends changed", []zap.Field{
		zap.String("lb", g.name), zap.String("source", s.name), zap.Int("backends", len(g.members())),
		zap.Int("joined", t.joined), zap.Int("left", t.left), zap.Int("changed", t.reweighed),
	}}
}

// sourceNames are those of the generation's sources.
func (g *generation) sourceNames() (names []string) {
	for _, s := range g.sources {
		names = append(names, s.name)
	}
	return names
}

// sourceStatuses are those of the sources that tell.
func (g *generation) sourceStatuses() (list []discovery.Status) {
	for _, s := range g.sources {
		if s.reporter != nil {
			list = append(list, s.status())
		}
	}
	return list
}

// status is the source's, which may be anybody's module, under the name that it
// began with.
func (s *dynamicSource) status() (status discovery.Status) {
	defer func() {
		if recover() != nil {
			status = discovery.Status{Source: s.name, Error: "it can't tell"}
		}
	}()
	status = s.reporter.Status()
	status.Source = s.name
	return status
}

// sourcesText is the JSON of a handler's sources.
func sourcesText(h *Handler) string {
	if len(h.DynamicBackendsRaw) == 0 {
		return notSet
	}
	var texts []string
	for _, raw := range h.DynamicBackendsRaw {
		texts = append(texts, short(raw))
	}
	return strings.Join(texts, ", ")
}
