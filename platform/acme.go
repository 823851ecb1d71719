package platform

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"sallyway/internal/identity"
	"sallyway/internal/version"
	"sallyway/platform/pki"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// ACME says which authority (RFC 8555) vouches for the platform's names. The zero value is none.
type ACME struct {
	// Domains are the platform's names. The authority connects to port 443 of each (TLS-ALPN-01, RFC 8737).
	Domains []string
	// Email is told to the authority, for warnings; empty is nobody.
	Email string
	// Directory is the authority's directory URL: empty is Let's Encrypt. CAFile holds the authorities (PEM) of its certificate; empty is the system's.
	Directory, CAFile string
}

// On says whether certificates are obtained.
func (a *ACME) On() bool { return len(a.Domains) > 0 }

// How often a certificate that could not be obtained is tried again: authorities count failures by the hour. What obtains them remembers a
// failure for a minute, so the first pause is longer.
const (
	acmeTimeout   = 2 * time.Minute
	acmeFirst     = 65 * time.Second
	acmeLongest   = time.Hour
	acmeCondition = "certificate"
)

// obtainer gets certificates and renews them when a third of their life is left, and keeps them where every replica finds them.
func (s *Server) obtainer() (*autocert.Manager, error) {
	a := &s.cfg.ACME
	client := &acme.Client{DirectoryURL: a.Directory, UserAgent: "sallyway/" + version.Get().Version}
	if client.DirectoryURL == "" {
		client.DirectoryURL = autocert.DefaultACMEDirectory
	}
	if u, err := url.Parse(client.DirectoryURL); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("ACME directory %.100q is not an https URL", a.Directory)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if a.CAFile != "" {
		b, err := os.ReadFile(a.CAFile)
		if err != nil {
			return nil, fmt.Errorf("authorities of the ACME directory: %w", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("authorities of the ACME directory: %s holds no certificate (PEM)", a.CAFile)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	}
	client.HTTPClient = &http.Client{Transport: transport, Timeout: 30 * time.Second}
	return &autocert.Manager{
		Prompt: autocert.AcceptTOS, Cache: &acmeCache{s.store, s.reg.Seal}, HostPolicy: autocert.HostWhitelist(a.Domains...), Client: client, Email: a.Email,
	}, nil
}

// checkACME says what does not go together.
func checkACME(cfg *Config) error {
	a := &cfg.ACME
	switch {
	case !a.On() && (a.Directory != "" || a.Email != "" || a.CAFile != ""):
		return errors.New("an ACME authority is given, and no domain to get a certificate for: name it with --acme-domain")
	case !a.On():
		return nil
	case cfg.TLSCert != "":
		return errors.New("a TLS certificate is given, and one is to be obtained by ACME: use one of --tls-cert and --acme-domain")
	case cfg.Listen == "":
		return errors.New("a certificate by ACME is for the HTTPS address: give one with --listen")
	}
	for _, d := range a.Domains {
		if !domainName(d) {
			return fmt.Errorf("%.80q is no domain name that an authority gives a certificate for", d)
		}
	}
	if cfg.AdvertiseURL != "" {
		u, err := url.Parse(cfg.AdvertiseURL)
		if err == nil && !slices.Contains(a.Domains, u.Hostname()) {
			return fmt.Errorf("the advertised URL %.100q has a host that no certificate is obtained for: add it to --acme-domain", cfg.AdvertiseURL)
		}
	}
	return nil
}

// domainName says whether a public authority could give a certificate for d: labels in lower case, at least two, and not an address.
func domainName(d string) bool {
	labels := strings.Split(d, ".")
	for _, l := range labels {
		if !identity.ValidLabel(l) {
			return false
		}
	}
	return len(labels) > 1 && net.ParseIP(d) == nil && len(d) <= 253
}

// obtain sees that there are certificates before anybody asks for them, and says so while there are none.
func (s *Server) obtain(ctx context.Context) {
	pause := acmeFirst
	for {
		err := s.obtainAll(ctx)
		if ctx.Err() != nil {
			return
		}
		s.condition(acmeCondition, err)
		if err == nil {
			s.cfg.Log.Info("certificates by ACME are there", "domains", s.cfg.ACME.Domains)
			return // they are renewed by who has them
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, acmeLongest)
	}
}

func (s *Server) obtainAll(ctx context.Context) error {
	for _, d := range s.cfg.ACME.Domains {
		got := make(chan error, 1)
		go func() {
			_, err := s.certs.obtainer.GetCertificate(modern(d))
			got <- err
		}()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-got:
			if err != nil {
				return fmt.Errorf("no certificate for %s yet: %w; the authority has to reach port 443 of that name, and find this platform there", d, err)
			}
		case <-time.After(acmeTimeout):
			return fmt.Errorf("no certificate for %s yet: the authority has not answered for %v", d, acmeTimeout)
		}
	}
	return nil
}

// modern is what a client of today asks for a name. Everybody is answered as such a one: an RSA certificate beside the one that all understand would be
// obtained at the same time, and either's challenge fail by the other's.
func modern(name string) *tls.ClientHelloInfo {
	return &tls.ClientHelloInfo{
		ServerName: name, SupportedVersions: []uint16{tls.VersionTLS13, tls.VersionTLS12},
		CipherSuites:     []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
		SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}, SupportedCurves: []tls.CurveID{tls.CurveP256},
	}
}

// acmeMeta is where the database keeps account, certificates and open challenges.
const acmeMeta = registry.ACMEMeta

// acmeCache keeps what autocert wants kept in the database, sealed, so that all replicas have it: a challenge may reach any of them.
type acmeCache struct {
	store store.Store
	seal  *pki.Sealer
}

var _ autocert.Cache = (*acmeCache)(nil)

func (c *acmeCache) all(ctx context.Context, tx store.Tx) (map[string][]byte, error) {
	all := make(map[string][]byte)
	b, err := tx.Meta(ctx, acmeMeta)
	if errors.Is(err, store.ErrNotFound) {
		return all, nil
	}
	if err != nil {
		return nil, err
	}
	if b, err = c.seal.Open(acmeMeta, b); err != nil {
		return nil, err
	}
	return all, json.Unmarshal(b, &all)
}

// Get implements autocert.Cache.
func (c *acmeCache) Get(ctx context.Context, key string) (value []byte, err error) {
	err = c.store.View(ctx, func(tx store.Tx) error {
		all, err := c.all(ctx, tx)
		if err != nil {
			return err
		}
		var there bool
		if value, there = all[key]; !there {
			return autocert.ErrCacheMiss
		}
		return nil
	})
	return value, err
}

// Put implements autocert.Cache.
func (c *acmeCache) Put(ctx context.Context, key string, value []byte) error {
	return c.change(ctx, func(all map[string][]byte) { all[key] = value })
}

// Delete implements autocert.Cache.
func (c *acmeCache) Delete(ctx context.Context, key string) error {
	return c.change(ctx, func(all map[string][]byte) { delete(all, key) })
}

func (c *acmeCache) change(ctx context.Context, fn func(map[string][]byte)) error {
	return c.store.Update(ctx, func(tx store.Tx) error {
		all, err := c.all(ctx, tx)
		if err != nil {
			return err
		}
		fn(all)
		b, err := json.Marshal(all)
		if err != nil {
			return err
		}
		return tx.PutMeta(ctx, acmeMeta, c.seal.Seal(acmeMeta, b))
	})
}
