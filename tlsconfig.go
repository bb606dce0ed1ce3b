package tcplb

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/caddy-tcp-lb/caddy-tcp-lb/checks"
	"github.com/caddy-tcp-lb/caddy-tcp-lb/internal/secure"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// BackendTLS is TLS to backends. Its fields are those of reverse_proxy, and two.
type BackendTLS struct {
	reverseproxy.TLSConfig
	// ALPN are the protocols to offer, the preferred first. Default: none.
	ALPN []string `json:"alpn,omitempty"`
	// Off has a backend do without, where the others have TLS.
	Off bool `json:"off,omitempty"`
}

// over returns t with what it leaves open as the handler's has it; nil = no TLS.
func (t *BackendTLS) over(handlers *BackendTLS) *BackendTLS {
	switch {
	case t == nil:
		return handlers
	case t.Off:
		return nil
	case handlers == nil:
		return t
	}
	c := *t
	if len(c.CARaw) == 0 && !c.InsecureSkipVerify { // else who trusts a CA would take any
		c.CARaw, c.InsecureSkipVerify = handlers.CARaw, handlers.InsecureSkipVerify
	}
	if c.ClientCertificateFile == "" && c.ClientCertificateAutomate == "" {
		c.ClientCertificateFile, c.ClientCertificateKeyFile = handlers.ClientCertificateFile, handlers.ClientCertificateKeyFile
		c.ClientCertificateAutomate = handlers.ClientCertificateAutomate
	}
	setDefault(&c.HandshakeTimeout, handlers.HandshakeTimeout)
	setDefault(&c.ServerName, handlers.ServerName)
	setDefault(&c.Renegotiation, handlers.Renegotiation)
	if len(c.Curves) == 0 {
		c.Curves = handlers.Curves
	}
	if len(c.ALPN) == 0 {
		c.ALPN = handlers.ALPN
	}
	return &c
}

// resolve resolves placeholders, once.
func (t *BackendTLS) resolve(repl *caddy.Replacer) error {
	if t == nil {
		return nil
	}
	for name, at := range map[string]*string{
		"server_name": &t.ServerName, "client_certificate_file": &t.ClientCertificateFile,
		"client_certificate_key_file": &t.ClientCertificateKeyFile, "client_certificate_automate": &t.ClientCertificateAutomate,
	} {
		if err := resolveText(repl, at); err != nil {
			return fmt.Errorf("tls.%s: %w", name, err)
		}
	}
	return nil
}

// resolveText resolves the placeholders of a text, and refuses one with a brace that
// is none's.
func resolveText(repl *caddy.Replacer, at *string) error {
	text, err := repl.ReplaceOrErr(*at, true, true)
	if err != nil {
		return err
	}
	if hasPlaceholder(text) {
		return fmt.Errorf("%q: a brace is left over", text)
	}
	*at = text
	return nil
}

// security is the TLS of some backends, loaded. Its sessions are its own: those
// that were made as another config wanted are not resumed.
type security struct {
	config   *tls.Config   // without a server name the backend's host is that
	ofChecks *tls.Config   // the same of checks to the backend's own port; nil = they have none
	timeout  time.Duration // of a handshake; 0 = what is left of the connect's
}

// securities loads each kind of TLS of a config once, by its JSON.
type securities map[string]*security

// load returns nil for no TLS.
func (loaded securities) load(ctx caddy.Context, t *BackendTLS) (*security, error) {
	if t == nil {
		return nil, nil
	}
	b, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	if s := loaded[string(b)]; s != nil {
		return s, nil
	}
	c := t.TLSConfig // loading takes the modules out of it
	config, err := c.MakeTLSClientConfig(ctx)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	if config == nil { // as that says that all is as it is without
		config = new(tls.Config)
	}
	if err := checks.CheckPool(t.CARaw, config.RootCAs); err != nil {
		return nil, fmt.Errorf("tls.ca: %w", err)
	}
	if find := config.GetClientCertificate; find != nil {
		config.GetClientCertificate = whileCaddyHasIt(find)
	}
	config.NextProtos = t.ALPN
	if len(config.Certificates) > 0 {
		config.GetClientCertificate = alwaysShow(&config.Certificates[0])
	}
	s := &security{config: config, timeout: time.Duration(t.HandshakeTimeout)}
	loaded[string(b)] = s
	return s, nil
}

// errNoCertificates is of a connect that outlasts the config whose TLS app has its
// certificate.
var errNoCertificates = errors.New("the certificate of tls_client_auth has gone with the config that had it")

// whileCaddyHasIt turns a panic into an error: once a config without a TLS app has
// taken over, or Caddy exits, there is no store of certificates to look into any more.
func whileCaddyHasIt(find func(*tls.CertificateRequestInfo) (*tls.Certificate, error)) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(asked *tls.CertificateRequestInfo) (c *tls.Certificate, err error) {
		defer func() {
			if recover() != nil {
				c, err = nil, errNoCertificates
			}
		}()
		return find(asked)
	}
}

// alwaysShow shows the certificate also to a server that names other CAs: by itself
// crypto/tls shows none then, and the server would complain that there is none. One of
// a kind that it can't read is an error here.
func alwaysShow(c *tls.Certificate) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(asked *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		anyCA := *asked
		anyCA.AcceptableCAs = nil
		if err := anyCA.SupportsCertificate(c); err != nil {
			return nil, fmt.Errorf("the certificate of tls_client_auth is not of a kind that the backend takes: %w", err)
		}
		return c, nil
	}
}

// forHost returns the config for a backend at that host, empty for a Unix socket.
func (s *security) forHost(host string) *tls.Config {
	c := s.config.Clone()
	setDefault(&c.ServerName, checks.ServerName(host))
	return c
}

// channel is a security as one backend has it. It keeps the last session there,
// since a handshake that resumes one costs either side much less.
type channel struct {
	of      *security
	config  *tls.Config
	session atomic.Pointer[tls.ClientSessionState]
	cut     atomic.Int32 // handshakes in a row that offered one and were cut off
	never   atomic.Bool  // the backend resumes none, and ends the handshake
}

func newChannel(s *security, host string) *channel {
	c := &channel{of: s, config: s.forHost(host)}
	c.config.ClientSessionCache = c
	return c
}

// Get implements tls.ClientSessionCache. There is one key.
func (c *channel) Get(string) (*tls.ClientSessionState, bool) {
	s := c.session.Load()
	return s, s != nil
}

// Put implements tls.ClientSessionCache.
func (c *channel) Put(_ string, s *tls.ClientSessionState) {
	if c.never.Load() {
		s = nil
	}
	c.session.Store(s)
}

// maxCut is after how many handshakes in a row that were cut off without an alert
// the session is to blame. One may be of a server that is restarted.
const maxCut = 2

// refused takes note of a handshake that was to resume a session, and was ended,
// where the next one got through without. It may be that no session is kept from
// now on. Of those that were cut off side by side one counts.
func (c *channel) refused(e *handshakeError) {
	if secure.IsAlert(e) || c.cut.CompareAndSwap(e.cut, e.cut+1) && e.cut+1 >= maxCut {
		c.never.Store(true)
		c.session.Store(nil)
	}
}

// afresh returns the config for a handshake that resumes nothing.
func (c *channel) afresh() *tls.Config {
	config := c.config.Clone()
	config.ClientSessionCache = putOnly{c}
	return config
}

// putOnly is a channel that offers no session, and keeps what comes.
type putOnly struct{ *channel }

// Get implements tls.ClientSessionCache.
func (putOnly) Get(string) (*tls.ClientSessionState, bool) { return nil, false }

// channel returns the backend's channel by the security, which is made where it
// has another.
func (b *Backend) channelBy(s *security) *channel {
	for {
		old := b.channel.Load()
		if old != nil && old.of == s {
			return old
		}
		if c := newChannel(s, b.target.host); b.channel.CompareAndSwap(old, c) {
			return c
		}
	}
}

// Interface guard
var _ tls.ClientSessionCache = (*channel)(nil)
