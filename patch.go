package tcplb

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
)

// maxChange is how long the body of a change may be.
const maxChange = 4 << 10

// stateSynonyms are what others call the states.
var stateSynonyms = map[string]string{
	"up": "ready", "enable": "ready", "enabled": "ready", "active": "ready",
	"draining": "drain", "disable": "maint", "disabled": "maint", "maintenance": "maint", "down": "maint",
}

// changeBackends sets states or weights by hand, and answers which backends have
// them now.
func changeBackends(w http.ResponseWriter, r *http.Request) error {
	set, err := parameters(r, "lb", "address")
	if err != nil {
		return err
	}
	filter, err := parseBackendFilter(set)
	if err != nil {
		return err
	}
	if filter == (backendFilter{}) {
		return badRequest("which backends? want lb, address or both")
	}
	change, err := parseHandChange(http.MaxBytesReader(w, r.Body, maxChange))
	if err != nil {
		return err
	}
	changed, err := registry.setByHand(filter.lb, filter.address, change)
	if errors.Is(err, errNoMatch) {
		return noneMatched("backend")
	}
	if err != nil {
		return badRequest("%w", err)
	}
	list := make([]backendStatus, len(changed))
	for i, b := range changed {
		list[i] = b.status(b.pool.name)
	}
	return sendJSON(w, list)
}

// parseHandChange reads an object with state, weight or both. A weight of null is
// the config's.
func parseHandChange(body io.Reader) (c handChange, err error) {
	var fields map[string]json.RawMessage
	d := json.NewDecoder(body)
	if err := d.Decode(&fields); err != nil || fields == nil {
		return c, badRequest(`want an object such as {"state":"drain"} or {"weight":3}: %v`, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return c, badRequest("want one object, and nothing after it")
	}
	for name, value := range fields {
		switch name {
		case "state":
			c.state, err = parseStateField(value)
		case "weight":
			c.weight, err = parseWeightField(value)
			c.resetWeight = c.weight == nil
		default:
			err = badRequest("%s", unknown("field", name, []string{"state", "weight"}, nil))
		}
		if err != nil {
			return c, err
		}
	}
	if c == (handChange{}) {
		return c, badRequest("nothing to change: want state, weight or both")
	}
	return c, nil
}

func parseStateField(value json.RawMessage) (*handState, error) {
	var name *string
	if err := json.Unmarshal(value, &name); err != nil || name == nil {
		return nil, badRequest("state %s: want one of ready, drain, maint, in quotes", value)
	}
	s, err := parseHandState(*name)
	if err != nil {
		return nil, badRequest("%s", unknown("state", *name, []string{"ready", "drain", "maint"}, stateSynonyms))
	}
	return &s, nil
}

func parseWeightField(value json.RawMessage) (*int, error) {
	var weight *int
	if err := json.Unmarshal(value, &weight); err != nil || weight != nil && (*weight < 0 || *weight > maxWeight) {
		return nil, badRequest("weight %s: want a number from 0 to %d, or null for the config's", value, maxWeight)
	}
	return weight, nil
}
