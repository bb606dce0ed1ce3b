package checks

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
)

// TLS has checks speak TLS.
type TLS struct {
	// ServerName is the name to ask for, and to find in the certificate. Default:
	// the backend's host.
	ServerName string `json:"server_name,omitempty"`
	// InsecureSkipVerify takes any certificate.
	InsecureSkipVerify bool `json:"insecure_skip_verify,omitempty"`
	// CARaw is where the CAs are from that are trusted, a module. Default: the
	// system's.
	CARaw json.RawMessage `json:"ca,omitempty" caddy:"namespace=tls.ca_pool.source inline_key=provider"`
	// Off has checks do without, where the connections of clients have TLS.
	Off bool `json:"off,omitempty"`
}

// Config loads what it takes to connect.
func (t *TLS) Config(ctx caddy.Context) (*tls.Config, error) {
	c := &tls.Config{
		ServerName:         t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify,
		NextProtos:         nil, // HTTP/1.1 is what there is without
		MinVersion:         tls.VersionTLS12,
	}
	if len(t.CARaw) == 0 {
		return c, nil
	}
	raw := t.CARaw // which loading takes out
	module, err := ctx.LoadModule(t, "CARaw")
	if err != nil {
		return nil, fmt.Errorf("loading the trust pool: %w", err)
	}
	ca, ok := module.(caddytls.CA)
	if !ok {
		return nil, fmt.Errorf("module %T is no trust pool", module)
	}
	c.RootCAs = ca.CertPool()
	return c, CheckPool(raw, c.RootCAs)
}

// CheckPool refuses a pool that trusts nobody, and a file of the module raw in which
// there is no certificate: Caddy makes do with what the others have.
func CheckPool(raw json.RawMessage, trusted *x509.CertPool) error {
	var pool struct {
		Provider string   `json:"provider"`
		Files    []string `json:"pem_files"`
	}
	if json.Unmarshal(raw, &pool) == nil && pool.Provider == "file" {
		for _, name := range pool.Files {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if !x509.NewCertPool().AppendCertsFromPEM(b) {
				return fmt.Errorf("no certificate in %s: want PEM, which begins with -----BEGIN CERTIFICATE-----", name)
			}
		}
	}
	if trusted != nil && trusted.Equal(x509.NewCertPool()) {
		return errors.New("no certificate in the trust pool: want PEM, which begins with -----BEGIN CERTIFICATE-----")
	}
	return nil
}
