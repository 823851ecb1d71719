package platform

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"sallyway/internal/identity"
	"sallyway/platform/pki"
	"sallyway/platform/registry"
)

// reloadInterval is how often a given certificate's file is looked at for a newer one.
const reloadInterval = time.Minute

// certificates are what the platform shows on HTTPS: the given one, read again when its file changes, those obtained by ACME, or one by its
// own CA, made again at half of its life.
type certificates struct {
	obtainer  *autocert.Manager // nil without ACME
	domains   []string          // of the obtainer
	ca        *pki.Authority    // nil with another certificate
	hosts     []string
	cert, key string
	now       func() time.Time
	log       func(msg string, args ...any)

	mu      sync.Mutex
	current *tls.Certificate // guarded by mu
	changed time.Time        // of the file of the given one; guarded by mu
	checked time.Time        // guarded by mu
}

func (c *certificates) get() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.ca != nil {
		if c.current == nil || c.current.Leaf.NotAfter.Sub(now) < pki.ServerLife/2 {
			made, err := c.ca.Server(c.hosts, now)
			if err != nil {
				return nil, err
			}
			c.current = made
		}
		return c.current, nil
	}
	if c.current != nil && now.Sub(c.checked) < reloadInterval {
		return c.current, nil
	}
	c.checked = now
	st, err := os.Stat(c.cert)
	if err == nil && c.current != nil && st.ModTime().Equal(c.changed) {
		return c.current, nil
	}
	var read tls.Certificate
	if err == nil {
		read, err = tls.LoadX509KeyPair(c.cert, c.key)
	}
	if err != nil {
		if c.current != nil { // half-written: the old one serves on
			c.log("the TLS certificate can not be read again; the one from before serves on", "path", c.cert, "error", err)
			return c.current, nil
		}
		return nil, fmt.Errorf("TLS certificate: %w", err)
	}
	c.current, c.changed = &read, st.ModTime()
	return c.current, nil
}

func (c *certificates) config() *tls.Config {
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS12, // browsers and load balancers of today; nodes ask for 1.3
		NextProtos:             []string{"h2", "http/1.1"},
		SessionTicketsDisabled: true,
		// Small first records have a page appear earlier over slow links; here they make a configuration of 40 KiB nine writes instead of three.
		DynamicRecordSizingDisabled: true,
		GetCertificate:              func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.get() },
	}
	if c.obtainer != nil {
		cfg.NextProtos = append(cfg.NextProtos, acme.ALPNProto)
		cfg.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if slices.Equal(hello.SupportedProtos, []string{acme.ALPNProto}) { // the authority looks
				return c.obtainer.GetCertificate(hello)
			}
			// Without a name comes a load balancer's probe, or who has an address instead.
			return c.obtainer.GetCertificate(modern(cmp.Or(hello.ServerName, c.domains[0])))
		}
	}
	return cfg
}

// ends is when the certificate that is served ends, for warnings.
func (c *certificates) ends() registry.ServerCertificate {
	out := registry.ServerCertificate{Renews: c.obtainer != nil || c.ca != nil}
	var der []byte
	if c.obtainer != nil {
		// What it keeps, not what it would get: nobody asks for a certificate by looking.
		kept, err := c.obtainer.Cache.Get(context.Background(), c.domains[0])
		for err == nil && der == nil {
			var block *pem.Block
			if block, kept = pem.Decode(kept); block == nil {
				break
			}
			if block.Type == "CERTIFICATE" {
				der = block.Bytes
			}
		}
	} else if leaf, err := c.get(); err == nil { // else it is told elsewhere
		der = leaf.Certificate[0]
	}
	if p, err := x509.ParseCertificate(der); err == nil {
		out.NotAfter = p.NotAfter
	}
	return out
}

// pin is the key hash that enrolment tokens carry: of the CA at the end of the chain, or "" when nodes can do without.
func (c *certificates) pin(host string) (string, error) {
	if c.obtainer != nil {
		return "", nil // an authority may issue by another intermediate every time
	}
	cert, err := c.get()
	if err != nil {
		return "", err
	}
	var chain []*x509.Certificate
	for _, der := range cert.Certificate {
		p, err := x509.ParseCertificate(der)
		if err != nil {
			return "", fmt.Errorf("TLS certificate: %w", err)
		}
		chain = append(chain, p)
	}
	if c.ca == nil {
		intermediates := x509.NewCertPool()
		for _, p := range chain[1:] {
			intermediates.AddCert(p)
		}
		if _, err := chain[0].Verify(x509.VerifyOptions{DNSName: host, Intermediates: intermediates}); err == nil {
			return "", nil // the system's roots vouch for it
		}
		if err := chain[0].VerifyHostname(host); err != nil {
			return "", fmt.Errorf("TLS certificate %s is not for the host of the advertised URL: %w", c.cert, err)
		}
	}
	for _, p := range slices.Backward(chain) {
		if p.IsCA {
			return identity.CertificateKeyHash(p).String(), nil
		}
	}
	return "", fmt.Errorf("TLS certificate %s is by no authority that this system knows, and its file does not hold that authority's certificate: append it", c.cert)
}

// address decides the URL, the certificate and what tokens carry.
func (s *Server) address(ctx context.Context) error {
	var listen string
	scheme := "https"
	switch {
	case s.https != nil:
		listen = s.https.Addr().String()
	default:
		listen, scheme = s.plain.Addr().String(), "http"
	}
	s.url = strings.TrimSuffix(s.cfg.AdvertiseURL, "/")
	if s.url == "" {
		if s.cfg.ACME.On() { // the port of the address in use, at a name that has a certificate
			_, port, err := net.SplitHostPort(listen)
			if err != nil {
				return err
			}
			listen = net.JoinHostPort(s.cfg.ACME.Domains[0], port)
		}
		host, guessed, err := reachable(listen)
		if err != nil {
			return err
		}
		s.url = scheme + "://" + host
		if guessed {
			s.cfg.Log.Warn("no advertised URL given: this one is a guess, name the one that nodes reach with --advertise-url", "url", s.url)
		}
	}
	u, err := url.Parse(s.url)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		return fmt.Errorf("advertised URL %.100q is not of the form https://host[:port]", s.url)
	}
	if s.https != nil {
		s.certs = &certificates{cert: s.cfg.TLSCert, key: s.cfg.TLSKey, now: s.cfg.Now, log: s.cfg.Log.Warn, domains: s.cfg.ACME.Domains}
		switch {
		case s.cfg.ACME.On():
			if s.certs.obtainer, err = s.obtainer(); err != nil {
				return err
			}
		case s.cfg.TLSCert == "":
			if s.certs.ca, err = s.reg.ServerCA(ctx); err != nil {
				return err
			}
			s.certs.hosts = hosts(u.Hostname(), listen)
		}
		s.reg.Server = s.certs.ends
		if s.pin, err = s.certs.pin(u.Hostname()); err != nil {
			return err
		}
	}
	canonical, err := registry.CanonicalURL(s.url)
	if err != nil {
		return err
	}
	urls := []string{canonical}
	if own, err := registry.CanonicalURL(scheme + "://" + listen); err == nil {
		urls = append(urls, own)
	}
	s.reg.URL, s.reg.Pin = s.url, s.pin
	s.reg.Audiences, err = remember(ctx, s.store, urls)
	return err
}

// hosts are the names and addresses in the platform's own certificate.
func hosts(advertised, listen string) []string {
	out := []string{advertised, "localhost", "127.0.0.1", "::1"}
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return out
	}
	if a, err := netip.ParseAddr(host); err == nil && a.IsUnspecified() {
		for _, a := range interfaceAddrs() {
			out = append(out, a.String())
		}
	} else {
		out = append(out, host)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// reachable is a guess at how others reach a listen address: host:port, without a default port.
func reachable(listen string) (string, bool, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", false, err
	}
	guessed := false
	if a, err := netip.ParseAddr(host); err == nil && a.IsUnspecified() {
		host, guessed = "127.0.0.1", true
		if all := interfaceAddrs(); len(all) > 0 {
			host = all[0].String()
		}
	}
	if port == "443" {
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		return host, guessed, nil
	}
	return net.JoinHostPort(host, port), guessed, nil
}

// interfaceAddrs are the host's own global addresses, IPv4 first.
func interfaceAddrs() []netip.Addr {
	as, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for _, a := range as {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
			out = append(out, p.Addr())
		}
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return out
}

// listenError says what to do about an address that can not be listened on.
func listenError(addr, flag string, err error) error {
	hint := "name another address with " + flag
	switch {
	case errors.Is(err, syscall.EACCES):
		hint = "ports below 1024 need CAP_NET_BIND_SERVICE: run as root, use `platformd install`, or " + hint + " (such as :8443)"
	case errors.Is(err, syscall.EADDRINUSE):
		hint = "another program listens there (ss -ltnp); stop it, or " + hint
	}
	return fmt.Errorf("listen on %s: %w\n%s", addr, err, hint)
}
