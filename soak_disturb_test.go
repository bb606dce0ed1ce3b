package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// disturb does something, or nothing for a while.
func (s *soak) disturb() {
	s.noticeAnswers()
	s.well.step()
	for kind := range relaysOf(s.t) {
		s.relays[kind] = true
	}
	b := s.backends[1+s.rnd.IntN(len(s.backends)-1)] // the first always lives
	switch n := s.rnd.IntN(100); {
	case n < 20:
		s.count("reload")
		s.reload()
	case n < 26:
		s.count("failed load")
		s.failToLoad()
	case n < 50 && !b.dead:
		s.count("kill")
		during([]*soakBackend{b}, b.kill)
		b.dead = true
	case n < 50:
		s.count("revival")
		b.start()
		b.dead = false
	case n < 54:
		s.count("outage")
		s.outage()
	case n < 60:
		s.count("stall")
		b.stall.Lock()
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
		b.stall.Unlock()
	case n < 77:
		s.setByHand(b)
	case n < 84:
		s.cutByHand(b)
	case n < 93:
		s.changeAnswers()
	default:
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
	}
}

// outage leaves no backend for a moment. Nothing but the connections that are
// open may be lost by it: new clients wait, also while a config follows another.
func (s *soak) outage() {
	var alive []*soakBackend
	for _, b := range s.backends {
		if !b.dead {
			alive = append(alive, b)
		}
	}
	during(alive, func() {
		for _, b := range alive {
			b.kill()
		}
		pause(time.Duration(s.rnd.IntN(100))*time.Millisecond, s.stop)
		if s.rnd.IntN(2) == 0 {
			s.reload()
		}
		for _, b := range alive {
			b.start()
		}
	})
}

// change does what may change which connections go to the backends. Until it
// begins what was so holds, and from its end on what is so.
func change(backends []*soakBackend, do func()) {
	for _, b := range backends {
		b.closed.set(false)
		b.spare.set(false)
	}
	do()
	for _, b := range backends {
		b.closed.set(b.isClosed())
		b.spare.set(b.backup)
	}
}

// soakMember is a backend as a config has it.
type soakMember struct {
	*soakBackend
	weight int
	backup bool
}

// drawMembers has backends with random weights, of which some may be left out.
func (s *soak) drawMembers(some bool) (members []soakMember) {
	for i, b := range s.backends {
		switch {
		case b.inDNS, i > 0 && some && s.rnd.IntN(4) == 0:
		case i == 0 || !some:
			members = append(members, soakMember{b, 1 + s.rnd.IntN(5), false})
		default:
			members = append(members, soakMember{b, s.rnd.IntN(6), s.rnd.IntN(4) == 0})
		}
	}
	return members
}

// reload runs a config over some of the backends. Those that leave have their
// connections cut if that gives them little time.
func (s *soak) reload() {
	s.drain = []string{longDrain, shortDrain}[s.rnd.IntN(2)]
	members := s.drawMembers(true)
	config := s.configOf(members, s.drain, "")
	var leaving []*soakBackend
	for _, b := range s.backends {
		stays := slices.ContainsFunc(members, func(m soakMember) bool { return m.soakBackend == b })
		if !b.inDNS && !b.absent && !stays && s.drain != longDrain {
			leaving = append(leaving, b)
		}
	}
	during(leaving, func() {
		change(s.backends, func() {
			if err := caddy.Load([]byte(config), true); err != nil {
				s.add("reload: %v", err)
			}
			s.nowHas(members)
			s.well.loads++
		})
	})
}

// nowHas notes that the running config has the members, and what DNS has.
func (s *soak) nowHas(members []soakMember) {
	for _, b := range s.backends {
		b.absent = b.absent || !b.inDNS
	}
	for _, m := range members {
		b := m.soakBackend
		b.absent, b.weight, b.backup = false, m.weight, m.backup
	}
}

// failToLoad loads a config that can't be run, in one of several ways.
func (s *soak) failToLoad() {
	config := s.configOf([]soakMember{{s.backends[0], 1 + s.rnd.IntN(5), false}}, "0s", `"max_connections":1,`)
	switch s.rnd.IntN(3) {
	case 0:
		config = strings.ReplaceAll(config, `"max_connections":1,`, `"max_connections":-1,`)
	case 1:
		config = strings.Replace(config, `"apps":{`, `"apps":{"http":{"servers":{"srv":{"listen":["unix//nonexistent/socket"]}}},`, 1)
	case 2:
		config = config[:len(config)/2]
	}
	if err := caddy.Load([]byte(config), true); err == nil {
		s.add("a bad config was loaded")
	}
}

// call calls the admin API, and returns what it answers.
func (s *soak) call(handler caddy.AdminHandlerFunc, method, query, body string, answer any) (status int) {
	w := httptest.NewRecorder()
	err := handler(w, httptest.NewRequest(method, "/?"+query, strings.NewReader(body)))
	var refused caddy.APIError
	if errors.As(err, &refused) {
		return refused.HTTPStatus
	}
	if err := errors.Join(err, json.Unmarshal(w.Body.Bytes(), answer)); err != nil {
		s.add("%s %s %s: %v", method, query, body, err)
	}
	return w.Code
}

// setByHand changes the backend's state, its weight or both. Where the pool does
// not know it at the moment nothing changes.
func (s *soak) setByHand(b *soakBackend) {
	var c handChange
	fields := make(map[string]any)
	if s.rnd.IntN(3) > 0 {
		state := []handState{stateReady, stateReady, stateDrain, stateMaint}[s.rnd.IntN(4)]
		c.state, fields["state"] = &state, state.String()
	}
	if len(fields) == 0 || s.rnd.IntN(2) == 0 {
		if c.resetWeight = s.rnd.IntN(3) == 0; c.resetWeight {
			fields["weight"] = nil
		} else {
			c.weight = new(s.rnd.IntN(4))
			fields["weight"] = *c.weight
		}
	}
	body, _ := json.Marshal(fields)
	query := []string{"", "lb=" + soakPool + "&"}[s.rnd.IntN(2)] + "address=" + b.address
	set := func() {
		var answer []backendStatus
		status := s.call(serveBackends, http.MethodPatch, query, string(body), &answer)
		i := slices.IndexFunc(answer, func(is backendStatus) bool { return is.LB == soakPool })
		switch {
		case i >= 0:
			s.count("by hand " + c.applyTo(b.hand).state.String())
			b.hand = c.applyTo(b.hand)
			s.requireAnswer(b, answer[i])
		case status != http.StatusOK && status != http.StatusNotFound, !b.absent && !b.awaited:
			s.add("PATCH %s %s: status %d, %+v", query, body, status, answer)
		}
	}
	if c.state != nil && *c.state == stateMaint {
		during([]*soakBackend{b}, func() { change([]*soakBackend{b}, set) })
	} else {
		change([]*soakBackend{b}, set)
	}
}

// requireAnswer checks that what is answered is what was set.
func (s *soak) requireAnswer(b *soakBackend, is backendStatus) {
	weight := b.hand.weightOr(b.weight)
	if b.absent || b.hand.state != stateReady {
		weight = 0
	}
	if is.Address != b.address || is.State != b.hand.state.String() || is.EffectiveWeight != float64(weight) && !b.awaited {
		s.add("set by hand: %+v, effective weight %d, answered: %+v", b.hand, weight, is)
	}
}

// cutByHand kills connections, of the backend or of all.
func (s *soak) cutByHand(b *soakBackend) {
	query, hit := "lb="+soakPool+"&address="+b.address, []*soakBackend{b}
	if s.rnd.IntN(3) == 0 {
		query, hit = "client=127.0.0.1", s.backends
	}
	query += fmt.Sprintf("&limit=%d&sort=%s", 1+s.rnd.IntN(3), []string{"age", "bytes", "idle"}[s.rnd.IntN(3)])
	var cut []connectionStatus
	s.well.broken.begin()
	during(hit, func() { s.call(serveConnections, http.MethodDelete, query, "", &cut) })
	s.well.broken.end()
	s.did["cut by hand"] += len(cut)
	for _, c := range cut {
		if c.LB == soakPool {
			s.killed++
		}
	}
}

// source is the option of a config that has the backends in DNS.
func (s *soak) source() string {
	_, port, _ := net.SplitHostPort(s.backends[len(s.backends)-1].address)
	return fmt.Sprintf(`"dynamic_backends":[{"source":"a","name":%q,"port":%s,"refresh":"1s","resolvers":[%q],"versions":["ipv4"]}]`,
		soakName, port, s.names.packets.LocalAddr())
}

// answers are the addresses that DNS has.
func (s *soak) answers() (addresses []string) {
	for _, b := range s.backends {
		if b.inDNS && !b.withdrawn {
			host, _, _ := net.SplitHostPort(b.address)
			addresses = append(addresses, host)
		}
	}
	return addresses
}

// changeAnswers has DNS fail, or give other addresses. Backends that are
// withdrawn may have their connections cut until they are back. Each change waits
// until the one before it has come through.
func (s *soak) changeAnswers() {
	s.names.fail([]fault{faultNone, faultNone, faultFails, faultEmpty}[s.rnd.IntN(4)])
	for _, b := range s.backends {
		switch {
		case !b.inDNS, b.awaited, s.rnd.IntN(2) == 0:
		case b.withdrawn:
			b.withdrawn, b.awaited = false, true
			change([]*soakBackend{b}, func() { b.absent = false })
		case len(s.answers()) > 1: // an empty answer is none
			s.count("withdrawal")
			b.withdrawn, b.awaited = true, true
			b.broken.begin()
		}
	}
	s.names.answer(strings.TrimSuffix(soakName, "."), s.answers()...)
}

// noticeAnswers looks which of those have come through.
func (s *soak) noticeAnswers() {
	configured := s.configured()
	for _, b := range s.backends {
		if !b.awaited || slices.Contains(configured, b.address) == b.withdrawn {
			continue
		}
		b.awaited = false
		if b.withdrawn {
			change([]*soakBackend{b}, func() { b.absent = true })
		} else {
			s.count("return")
			b.broken.end()
		}
	}
}

// configured are the addresses of the pool's backends.
func (s *soak) configured() (addresses []string) {
	for _, v := range registry.snapshot() {
		if v.name != soakPool {
			continue
		}
		for _, b := range v.configured {
			addresses = append(addresses, b.address)
		}
	}
	return addresses
}
