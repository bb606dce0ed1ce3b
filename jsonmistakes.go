package tcplb

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddyserver/caddy/v2"
)

// UnmarshalJSON is as strict as Caddy is with modules. It is here for its
// errors, which name the place and what could be meant.
func (h *Handler) UnmarshalJSON(b []byte) error {
	type plain Handler // without this method
	withName := struct {
		*plain
		Handler string `json:"handler"` // of the module, which Caddy has taken out of b
	}{plain: (*plain)(h)}
	return decodePlaced(b, &withName, reflect.TypeFor[plain]())
}

// decodePlaced decodes into v, which has the fields of t.
func decodePlaced(b []byte, v any, t reflect.Type) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		return nil
	}
	if place := misplaced(b, t, ""); place != nil {
		return place
	}
	return err
}

const exampleSources = `[{"source":"a","name":"db.internal","port":5432}]`

// checksOffJSON is what turns checks off, by the value that was meant to.
var checksOffJSON = map[string]string{
	"health_checks": `{"active":{"disabled":true}}`, "health_checks.active": `{"disabled":true}`,
	"health_checks.active.interval": `"disabled": true`,
}

// meantFields says what to write for names that other balancers, and other
// handlers of Caddy have: a field, or a hint. See meantInJSON.
var meantFields = map[string]string{
	"servers": "backends", "upstreams": "backends", "upstream": "backends", "dynamic_upstreams": "dynamic_backends",
	"policy": "write load_balancing.selection_policy", "selection_policy": "write load_balancing.selection_policy",
	"retries": "write load_balancing.retries", "try_duration": "write load_balancing.try_duration", "try_interval": "write load_balancing.try_interval",
	"slow_start": "write load_balancing.slow_start",
	"interval":   "write health_checks.active.interval",
	"dial":       "address", "host": "address", "addr": "address", "backup": "it belongs to a backend: write it beside its address",
	"passive": "write health_checks.passive", "max_fails": "write health_checks.passive.max_fails", "uri": "write health_checks.active.uri", "path": "write health_checks.active.uri", "status": "expect_status", "body": "expect_body",
	"steps": "dialogue", "trust_pool": "ca",
	"rise": "write health_checks.active.passes", "fall": "write health_checks.active.fails", "max_requests": "max_connections", "sni": "write tls.server_name", "source_address": "local_address", "local_addr": "local_address", "bind": "local_address", "send_proxy": "proxy_protocol", "send_proxy_v2": "proxy_protocol",
}

// meantInJSON has what is meant by a name that is no field: an option's name in
// the Caddyfile, or an entry of meantFields.
func meantInJSON(name string) map[string]string {
	name = plainName(name)
	if o := named(handlerOptions, name); o != nil && o.path != name {
		if !strings.Contains(o.path, ".") {
			return map[string]string{name: o.path}
		}
		return map[string]string{name: "write " + o.path}
	}
	if o := named(globalOptions, name); o != nil {
		return map[string]string{name: "it holds for all handlers: write apps.tcp_lb." + o.path}
	}
	return meantFields
}

// misplaced finds the value in the JSON that does not fit the type, and says
// what is wrong with it; nil if there is none.
func misplaced(raw json.RawMessage, t reflect.Type, path string) error {
	raw = bytes.TrimSpace(raw)
	switch {
	case string(raw) == "null":
		return nil
	case t.Kind() == reflect.Pointer:
		return misplaced(raw, t.Elem(), path)
	case t.Kind() == reflect.Struct:
		return misplacedField(raw, t, path)
	case t == reflect.TypeFor[[]BackendConfig]():
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) != nil {
			return fmt.Errorf(`%s: want a list such as [{"address":"host:port"}], found %s`, path, short(raw))
		}
		for i, each := range list {
			if err := misplaced(each, t.Elem(), fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return err
			}
		}
		return nil
	}
	if json.Unmarshal(raw, reflect.New(t).Interface()) == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %s", path, short(raw), wanted(path, raw, t))
}

func misplacedField(raw json.RawMessage, t reflect.Type, path string) error {
	var members map[string]json.RawMessage
	if json.Unmarshal(raw, &members) != nil {
		switch {
		case t == reflect.TypeFor[BackendConfig]():
			return fmt.Errorf(`%s: want an object such as {"address":"host:port"}, found %s`, path, short(raw))
		case path == "":
			return nil // not even an object: the decoder says it well
		case checksOffJSON[path] != "":
			return fmt.Errorf("%s: want an object, found %s; %s turns checks off", path, short(raw), checksOffJSON[path])
		}
		return fmt.Errorf("%s: want an object, found %s", path, short(raw))
	}
	fields := make(map[string]reflect.Type)
	for _, f := range reflect.VisibleFields(t) { // those of an embedded struct, too
		if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
			fields[name] = f.Type
		}
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		at := strings.TrimPrefix(path+"."+name, ".")
		field, ok := fields[strings.ToLower(name)] // as encoding/json matches them
		switch {
		case ok:
			if err := misplaced(members[name], field, at); err != nil {
				return err
			}
		case path != "" || name != "handler":
			err := errors.New(unknown("field", name, slices.Sorted(maps.Keys(fields)), meantInJSON(name)))
			if path != "" {
				err = fmt.Errorf("%s: %w", path, err)
			}
			return err
		}
	}
	return nil
}

// wanted says what a value of the type looks like.
func wanted(path string, raw json.RawMessage, t reflect.Type) string {
	var text string
	_ = json.Unmarshal(raw, &text)
	s := specAt(path)
	switch {
	case t == reflect.TypeFor[caddy.Duration]() && isNone(text) && checksOffJSON[path] != "":
		return fmt.Sprintf(`want a duration such as "10s"; %s turns checks off`, checksOffJSON[path])
	case t == reflect.TypeFor[caddy.Duration]() && text != "":
		return `want a duration such as "10s"` + durationHint(s, text)
	case t == reflect.TypeFor[caddy.Duration]():
		return `want a duration such as "10s"`
	case t == reflect.TypeFor[[]checks.Step]():
		return `want a list such as [{"send":"PING\\r\\n"},{"expect":"+PONG"}]`
	case t == reflect.TypeFor[http.Header]():
		return `want an object such as {"Host":["db.internal"]}`
	case t == reflect.TypeFor[[]json.RawMessage]():
		return "want a list such as " + exampleSources
	case t.Kind() == reflect.Bool && path == "access_log" && raw[0] == '{':
		return "want true or false; access_log_connects and access_log_interval stand beside it"
	case t.Kind() == reflect.Bool:
		return "want true or false"
	case t.Kind() == reflect.Int && text != "":
		return "want a number" + cmp.Or(valueHint(s, text), ", without quotes")
	case t.Kind() == reflect.Int:
		return "want a whole number"
	}
	return "want a text in quotes"
}

// short is the JSON on one line, and not all of it if it is long.
func short(raw json.RawMessage) string {
	var b bytes.Buffer
	if json.Compact(&b, raw) != nil {
		return string(raw)
	}
	if b.Len() > 60 {
		return strings.ToValidUTF8(b.String()[:60], "") + "…"
	}
	return b.String()
}
