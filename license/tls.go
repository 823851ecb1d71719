package license

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"sallyway/internal/daemon"
	"sallyway/internal/identity"
)

// tlsFile has the authority of the service's own certificate: its key and its certificate.
const tlsFile = "tls.key"

// Lives of certificates of the service's own.
const (
	authorityLife = 20 * 365 * 24 * time.Hour
	leafLife      = 60 * 24 * time.Hour // made anew at half of it, and at every start
	backdate      = time.Hour           // clocks of others
)

// certificates are what the service shows: files that are read again when they were replaced, or leaves by an authority of its own.
type certificates struct {
	pin       string // of that authority; "" for files
	cert, key string // files
	ca        *x509.Certificate
	caKey     *ecdsa.PrivateKey
	host      string
	now       func() time.Time

	mu   sync.Mutex
	leaf *tls.Certificate // guarded by mu
	from time.Time        // when the leaf was made, or the file changed; guarded by mu
}

func openCertificates(dir, cert, key, at string, now func() time.Time) (*certificates, error) {
	u, err := url.Parse(at)
	if err != nil {
		return nil, err
	}
	c := &certificates{cert: cert, key: key, host: u.Hostname(), now: now}
	if cert == "" {
		if err := c.authority(filepath.Join(dir, tlsFile)); err != nil {
			return nil, err
		}
		c.pin = identity.CertificateKeyHash(c.ca).String()
	}
	_, err = c.get()
	return c, err
}

// authority reads the service's own authority, or makes it.
func (c *certificates) authority(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if b, err = newAuthority(c.now()); err == nil {
			err = daemon.WriteFile(path, b, 0o600)
		}
	}
	if err != nil {
		return fmt.Errorf("TLS authority: %w", err)
	}
	damaged := fmt.Errorf("%s is damaged: remove it, and tell platforms the new pin", path)
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		switch block.Type {
		case "EC PRIVATE KEY":
			c.caKey, err = x509.ParseECPrivateKey(block.Bytes)
		case "CERTIFICATE":
			c.ca, err = x509.ParseCertificate(block.Bytes)
		}
		if err != nil {
			return damaged
		}
	}
	if c.ca == nil || c.caKey == nil {
		return damaged
	}
	return nil
}

func serial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

func newAuthority(now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	n, err := serial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: "Sallyway licence service"}, NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	k, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: k}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...), nil
}

func (c *certificates) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.get() }}
}

// get is the certificate to show now.
func (c *certificates) get() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ca == nil {
		return c.readLocked()
	}
	now := c.now()
	if c.leaf != nil && now.Sub(c.from) < leafLife/2 && !now.Before(c.from) {
		return c.leaf, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	n, err := serial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: "Sallyway licence service"}, NotBefore: now.Add(-backdate), NotAfter: now.Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if name, err := os.Hostname(); err == nil {
		tmpl.DNSNames = append(tmpl.DNSNames, name)
	}
	if a, err := netip.ParseAddr(c.host); err == nil {
		tmpl.IPAddresses = append(tmpl.IPAddresses, a.AsSlice())
	} else {
		tmpl.DNSNames = append(tmpl.DNSNames, c.host)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.ca, key.Public(), c.caKey)
	if err != nil {
		return nil, err
	}
	c.leaf, c.from = &tls.Certificate{Certificate: [][]byte{der, c.ca.Raw}, PrivateKey: key}, now
	return c.leaf, nil
}

// readLocked reads the files when they were replaced. While they do not fit together, the old ones are shown.
func (c *certificates) readLocked() (*tls.Certificate, error) {
	st, err := os.Stat(c.cert)
	if err == nil && c.leaf != nil && st.ModTime().Equal(c.from) {
		return c.leaf, nil
	}
	if err == nil {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(c.cert, c.key); err == nil {
			c.leaf, c.from = &pair, st.ModTime()
		}
	}
	if c.leaf != nil {
		return c.leaf, nil
	}
	return nil, fmt.Errorf("TLS certificate: %w", err)
}
