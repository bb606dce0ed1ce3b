package tcplb

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/literal"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
)

// tlsOptions are those of TLS to all backends, or to one. unset is what holds for
// the latter.
func tlsOptions[T any](unset string, at func(*T) **BackendTLS) []option[T] {
	or := func(handlers string) string {
		if unset != "off" {
			return unset
		}
		return handlers
	}
	values := "[off]"
	if unset == "off" {
		values = "" // of what it is without
	}
	text := func(want string, check func(string) error, field func(*BackendTLS) *string) kind[T] {
		return inTLS(asOptionalText(want, check, field), at)
	}
	return []option[T]{
		{spec{name: "tls", values: values, path: "tls", unset: unset, aside: "what else it takes stands on lines of its own, such as tls_server_name",
			help: "speak TLS to backends, and verify their certificates; what follows needs it; see [TLS](docs/backends.md#tls); in JSON an empty object is enough"},
			inTLS(kind[BackendTLS]{read: readTLS, check: checkBackendTLS, show: func(t *BackendTLS) string { return onOrOff(!t.Off) }}, at).orWithout(unset, at)},
		{spec{name: "tls_server_name", values: "<name>", path: "tls.server_name", unset: or("the backend's host"),
			help: "the name to ask for, and to find in the certificate"},
			text("a server's name", checkServerName, func(t *BackendTLS) *string { return &t.ServerName })},
		{spec{name: "tls_trust_pool", values: "<module> [...]", path: "tls.ca", unset: or("the system's CAs"),
			help: "trust these CAs, such as `file <path>`: a module of `tls.ca_pool.source`"},
			inTLS(kind[BackendTLS]{read: readTrustPool, show: trustPoolText}, at)},
		{spec{name: "tls_client_auth", values: "<name>|<cert_file> <key_file>", path: "tls.client_certificate_file", unset: or("none"),
			help: "the certificate to show: of these files, as they are when the config is loaded, in JSON with `client_certificate_key_file`; or one that Caddy gets for this name, in JSON `client_certificate_automate`"},
			inTLS(kind[BackendTLS]{read: readClientAuth, check: checkClientAuth, show: clientAuthText}, at)},
		{spec{name: "tls_insecure_skip_verify", path: "tls.insecure_skip_verify",
			help: "take any certificate"},
			inTLS(asFlag(func(t *BackendTLS) *bool { return &t.InsecureSkipVerify }), at)},
		{spec{name: "tls_timeout", values: "<duration>", path: "tls.handshake_timeout", unset: or("what is left of `dial_timeout`"),
			help: "for the handshake"},
			inTLS(asDuration(minDuration, 0, plain(func(t *BackendTLS) *caddy.Duration { return &t.HandshakeTimeout })).shownBy(timeoutText), at)},
		{spec{name: "tls_alpn", values: "<protocol>...", path: "tls.alpn", unset: or("none"),
			help: "the protocols to offer, such as `postgresql`"},
			inTLS(kind[BackendTLS]{read: readALPN, check: checkALPN, show: func(t *BackendTLS) string { return listText(t.ALPN) }}, at)},
		{spec{name: "tls_curves", values: "<curve>...", path: "tls.curves", unset: or("Go's choice"),
			help: "the key exchanges to offer: `" + strings.Join(curveNames(), "`, `") + "`"},
			inTLS(kind[BackendTLS]{read: readCurves, check: checkCurves, show: func(t *BackendTLS) string { return listText(t.Curves) }}, at)},
		{spec{name: "tls_renegotiation", values: "never|once|freely", path: "tls.renegotiation", unset: or("never"),
			help: "whether the backend may ask for further handshakes, in TLS 1.2; a connection that may have one keeps a buffer of 32 KB"},
			text("never, once or freely", checkRenegotiation, func(t *BackendTLS) *string { return &t.Renegotiation })},
	}
}

// inTLS is a kind of TLS as one of what has that. Only reading makes an object, as
// its being there means TLS.
func inTLS[T any](k kind[BackendTLS], at func(*T) **BackendTLS) kind[T] {
	lifted := kind[T]{
		read: func(p *parser, s spec, t *T) error {
			setDefault(at(t), new(BackendTLS))
			return k.readInto(p, s, *at(t))
		},
		show: func(t *T) string {
			if *at(t) == nil {
				return k.show(new(BackendTLS))
			}
			return k.show(*at(t))
		},
	}
	if k.check != nil {
		lifted.check = func(path string, t *T) error {
			if *at(t) == nil {
				return nil
			}
			return k.check(path, *at(t))
		}
	}
	return lifted
}

// orWithout shows the text where there is no object.
func (k kind[T]) orWithout(text string, at func(*T) **BackendTLS) kind[T] {
	show := k.show
	return k.shownBy(func(t *T) string {
		if *at(t) == nil {
			return text
		}
		return show(t)
	})
}

func readTLS(p *parser, s spec, t *BackendTLS) error {
	if !p.NextArg() {
		return nil
	}
	if p.Val() != "off" {
		return p.Errf("%s: takes no value but off, and that for one backend, found %q: %s", s.name, p.Val(), s.aside)
	}
	t.Off = true
	if p.NextArg() {
		return p.Errf("%s off: one value is enough, found %q", s.name, p.Val())
	}
	return nil
}

// tlsNames are the options that need tls.
func tlsNames() (names []string) {
	for _, name := range namesOf(backendOptions) {
		if strings.HasPrefix(name, "tls_") {
			names = append(names, name)
		}
	}
	return names
}

func checkServerName(name string) error {
	if _, err := netip.ParseAddr(name); err == nil || hasPlaceholder(name) {
		return nil
	}
	if name == "" || strings.ContainsAny(name, ":/ *") || checkText(name) != nil {
		return fmt.Errorf("%q: want a server's name such as db.internal, or its address", name)
	}
	if err := literal.Check(name); err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	return nil
}

func readTrustPool(p *parser, s spec, t *BackendTLS) (err error) {
	t.CARaw, err = p.trustPool(s)
	return err
}

// trustPool reads a module that has CAs, and what follows its name.
func (p *parser) trustPool(s spec) (json.RawMessage, error) {
	if !p.NextArg() {
		return nil, p.Errf("%s: the value is missing, want a module such as file <path>", s.name)
	}
	name := p.Val()
	if err := checkModuleName("trust pool", "tls.ca_pool.source", name, nil); err != nil {
		return nil, p.Errf("%s %s: %v", s.name, name, err)
	}
	module, err := caddyfile.UnmarshalModule(p.Dispenser, "tls.ca_pool.source."+name)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", s.name, name, err)
	}
	return caddyconfig.JSONModuleObject(module, "provider", name, nil), nil
}

func trustPoolText(t *BackendTLS) string { return orNotSet(short(t.CARaw)) }

func readClientAuth(p *parser, s spec, t *BackendTLS) error {
	switch args := p.RemainingArgs(); len(args) {
	case 0:
		return p.Errf("%s: the value is missing, want a certificate's file and its key's, or a name for which Caddy has one", s.name)
	case 1:
		t.ClientCertificateAutomate = args[0]
	case 2:
		t.ClientCertificateFile, t.ClientCertificateKeyFile = args[0], args[1]
	default:
		return p.Errf("%s %s: want a certificate's file and its key's, found %q as well", s.name, args[0]+" "+args[1], args[2])
	}
	if err := checkClientAuth(s.name, t); err != nil {
		return p.located(err)
	}
	return nil
}

func checkClientAuth(path string, t *BackendTLS) error {
	file, key := t.ClientCertificateFile, t.ClientCertificateKeyFile
	switch {
	case file != "" && key == "":
		return fmt.Errorf("%s %q: the key is missing, write client_certificate_key_file", path, file)
	case file == "" && key != "":
		return fmt.Errorf("tls.client_certificate_key_file %q: the certificate is missing, write client_certificate_file", key)
	case file != "" && t.ClientCertificateAutomate != "":
		return fmt.Errorf("%s %q: one certificate is enough, and client_certificate_automate is there, too", path, file)
	case isFileName(t.ClientCertificateAutomate):
		return fmt.Errorf("%s %q: want a name for which Caddy has a certificate, or two files: the certificate's and its key's, which may be one and the same",
			path, t.ClientCertificateAutomate)
	}
	return nil
}

// isFileName reports whether what should be a host's name is that of a file.
func isFileName(name string) bool {
	return strings.ContainsAny(name, `/\`) || slices.Contains([]string{".pem", ".crt", ".cer", ".key"}, strings.ToLower(filepath.Ext(name)))
}

func clientAuthText(t *BackendTLS) string {
	switch {
	case t.ClientCertificateAutomate != "":
		return strconv.Quote(t.ClientCertificateAutomate)
	case t.ClientCertificateFile == "" && t.ClientCertificateKeyFile == "":
		return notSet
	}
	return fmt.Sprintf("%q %q", t.ClientCertificateFile, t.ClientCertificateKeyFile)
}

func readALPN(p *parser, s spec, t *BackendTLS) error {
	if t.ALPN = p.RemainingArgs(); len(t.ALPN) == 0 {
		return p.Errf("%s: the value is missing, want protocols such as postgresql", s.name)
	}
	return p.located(checkALPN(s.name, t))
}

func checkALPN(path string, t *BackendTLS) error {
	for i, name := range t.ALPN {
		switch {
		case name == "" || len(name) > 255:
			return fmt.Errorf("%s %q: want protocols of 1 to 255 bytes", path, name)
		case slices.Contains(t.ALPN[:i], name):
			return fmt.Errorf("%s: %q is listed twice", path, name)
		}
	}
	return nil
}

func readCurves(p *parser, s spec, t *BackendTLS) error {
	if t.Curves = p.RemainingArgs(); len(t.Curves) == 0 {
		return p.Errf("%s: the value is missing, want curves such as x25519", s.name)
	}
	return p.located(checkCurves(s.name, t))
}

func checkCurves(path string, t *BackendTLS) error {
	for i, name := range t.Curves {
		if _, ok := caddytls.SupportedCurves[name]; !ok {
			return fmt.Errorf("%s: %s", path, unknown("curve", name, curveNames(), nil))
		}
		if slices.Contains(t.Curves[:i], name) {
			return fmt.Errorf("%s: %q is listed twice", path, name)
		}
	}
	return nil
}

func curveNames() []string { return slices.Sorted(maps.Keys(caddytls.SupportedCurves)) }

func checkRenegotiation(level string) error {
	if level != "never" && level != "once" && level != "freely" {
		return fmt.Errorf("%q: want never, once or freely", level)
	}
	return nil
}

func timeoutText(t *BackendTLS) string {
	if t.HandshakeTimeout == 0 {
		return notSet
	}
	return durationText(t.HandshakeTimeout)
}

func listText(list []string) string {
	if len(list) == 0 {
		return notSet
	}
	return strconv.Quote(strings.Join(list, " "))
}

// checkBackendTLS refuses what makes no sense as a whole.
func checkBackendTLS(path string, t *BackendTLS) error {
	if len(t.ExceptPorts) > 0 {
		return fmt.Errorf(`%s.except_ports: a backend without TLS says so: write "tls": {"off": true} beside its address`, path)
	}
	if t.isUnsure() {
		return fmt.Errorf("%s.insecure_skip_verify: nothing is verified with it, so that %s.ca would do nothing: leave one of them out", path, path)
	}
	alone := BackendTLS{Off: true}
	if t.Off && !t.equal(&alone) {
		return fmt.Errorf("%s.off: the other options would do nothing, leave them out", path)
	}
	//lint:ignore SA1019 they are refused
	if len(t.RootCAPool)+len(t.RootCAPEMFiles) > 0 {
		return fmt.Errorf(`%s: root_ca_pool and root_ca_pem_files are Caddy's former names: write "ca": {"provider": "file", "pem_files": [...]}`, path)
	}
	return nil
}

// isUnsure reports whether it names CAs to trust, and takes any certificate.
func (t *BackendTLS) isUnsure() bool { return t != nil && t.InsecureSkipVerify && len(t.CARaw) > 0 }

func (t *BackendTLS) equal(other *BackendTLS) bool {
	a, err := json.Marshal(t)
	b, otherErr := json.Marshal(other)
	return errors.Join(err, otherErr) == nil && string(a) == string(b)
}

// tlsConflict finds an option of TLS that does not go with the others. Their names
// in the error are by call.
func (h *Handler) tlsConflict(call func(option string) string) (option string, err error) {
	if h.TLS != nil && h.TLS.Off {
		return "tls", fmt.Errorf("%s: it is off unless it is there: off is for a backend's block", call("tls"))
	}
	if h.TLS.isUnsure() {
		return "tls_insecure_skip_verify", fmt.Errorf("%s: nothing is verified with it, so that %s would do nothing: leave one of them out", call("tls_insecure_skip_verify"), call("tls_trust_pool"))
	}
	for _, b := range h.Backends {
		t := b.TLS.over(h.TLS)
		if t != nil && strings.HasPrefix(b.Address, "unix/") && t.ServerName == "" && !t.InsecureSkipVerify {
			return "tls", fmt.Errorf("%s: backend %q has no host whose name a certificate could have: write %s", call("tls"), b.Address, call("tls_server_name"))
		}
	}
	return "", nil
}

// tlsTooSlow finds a handshake that may take longer than the connect that it is a part
// of, as both were written: defaults are not filled in.
func (h *Handler) tlsTooSlow(call func(option string) string) (option string, err error) {
	over := func(t *BackendTLS) bool { return t != nil && h.DialTimeout > 0 && t.HandshakeTimeout > h.DialTimeout }
	if over(h.TLS) {
		return "tls_timeout", fmt.Errorf("%s %s: may not exceed %s, %s, which holds for the handshake, too",
			call("tls_timeout"), time.Duration(h.TLS.HandshakeTimeout), call("dial_timeout"), time.Duration(h.DialTimeout))
	}
	for _, b := range h.Backends {
		if over(b.TLS) {
			return "dial_timeout", fmt.Errorf("backend %q: %s %s: may not exceed %s, %s, which holds for the handshake, too",
				b.Address, call("tls_timeout"), time.Duration(b.TLS.HandshakeTimeout), call("dial_timeout"), time.Duration(h.DialTimeout))
		}
	}
	return "", nil
}

// halfTLS is an option that needs tls where that is not.
type halfTLS struct {
	backend, option string
	place           *caddyfile.Dispenser
}

// noteHalfTLS remembers the first option of a backend's block that needs tls, which
// may yet be found to be the handler's.
func (p *parser) noteHalfTLS(backend string, own *parser) {
	if own.places["tls"] != nil {
		return
	}
	for _, name := range tlsNames() {
		if place := own.places[name]; place != nil {
			p.halfTLS = append(p.halfTLS, halfTLS{backend, name, place})
			return
		}
	}
}

// checkTLS needs all options of TLS, and all backends.
func (p *parser) checkTLS(h *Handler, start *caddyfile.Dispenser) error {
	if p.places["tls"] == nil {
		for _, half := range p.halfTLS {
			return half.place.Errf("backend %s: %s: there is no TLS without tls: write tls, here or for all backends", half.backend, half.option)
		}
		for _, name := range tlsNames() {
			if place := p.places[name]; place != nil {
				return place.Errf("tcp_lb: %s: there is no TLS without tls: write tls, too", name)
			}
		}
	}
	byName := func(name string) string { return name }
	option, err := h.tlsConflict(byName)
	if err == nil {
		option, err = h.tlsTooSlow(byName)
	}
	if err == nil {
		return nil
	}
	if place := p.places[option]; place != nil {
		start = place
	}
	return start.WrapErr(fmt.Errorf("tcp_lb: %w", err))
}
