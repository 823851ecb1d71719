package identity

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Limits on what a peer may present, checked before anything is parsed further or repeated in an error.
const (
	// MaxChain is the longest chain: leaf, intermediate, root.
	MaxChain = 3
	// MaxCertificate bounds one certificate in bytes; ours are below 1 KiB.
	MaxCertificate = 8 << 10
	// ClockSkew is how far two clocks may differ before a certificate counts as not yet valid or expired.
	ClockSkew = 5 * time.Minute
)

// Trust is what an end of a connection knows about the other: whose certificates count and which keys do not. It is a value:
// replace it, never change it while in use.
type Trust struct {
	// Roots are the organization's root certificates.
	Roots []*x509.Certificate
	// Pins are hashes of the CA keys that may have issued the peer's leaf: the current one and, during a rotation, the next.
	Pins []KeyHash
	// Denied are hashes of revoked leaf keys.
	Denied []KeyHash
	// Now tells the time; nil is time.Now.
	Now func() time.Time
}

// RevokedError says that a certificate's key is on the deny list.
type RevokedError struct {
	Node Node
	Key  KeyHash
}

func (e *RevokedError) Error() string { return fmt.Sprintf("the key of %v is revoked", e.Node) }

// CertificateNode returns the identity in a certificate: exactly one URI SAN, of ours.
func CertificateNode(c *x509.Certificate) (Node, error) {
	if len(c.URIs) != 1 {
		return Node{}, fmt.Errorf("certificate has %d URI names, want one SPIFFE URI", len(c.URIs))
	}
	return ParseURI(c.URIs[0])
}

// Verify checks a presented chain (leaf first) and returns whom it proves. usage is the extended key usage the leaf must have:
// x509.ExtKeyUsageServerAuth for who was dialled, x509.ExtKeyUsageClientAuth for who dialled, ExtKeyUsageAny for documents.
func (t *Trust) Verify(chain []*x509.Certificate, usage x509.ExtKeyUsage) (Node, error) {
	if len(chain) == 0 {
		return Node{}, errors.New("the peer showed no certificate")
	}
	if len(chain) > MaxChain {
		return Node{}, fmt.Errorf("the peer showed %d certificates, limit %d", len(chain), MaxChain)
	}
	for _, c := range chain {
		if len(c.Raw) > MaxCertificate {
			return Node{}, fmt.Errorf("certificate of %d bytes, limit %d", len(c.Raw), MaxCertificate)
		}
		if err := CheckKey(c.PublicKey); err != nil {
			return Node{}, err
		}
	}
	leaf := chain[0]
	n, err := CertificateNode(leaf)
	if err != nil {
		return Node{}, err
	}
	now := time.Now()
	if t.Now != nil {
		now = t.Now()
	}
	// The skew is granted towards the certificate's own window: a clock that is off by less than ClockSkew passes.
	at := now
	switch {
	case now.Before(leaf.NotBefore) && leaf.NotBefore.Sub(now) <= ClockSkew:
		at = leaf.NotBefore
	case now.After(leaf.NotAfter) && now.Sub(leaf.NotAfter) <= ClockSkew:
		at = leaf.NotAfter
	case now.Before(leaf.NotBefore):
		return n, fmt.Errorf("certificate of %v is valid only from %s, this host's clock says %s: check the clock (NTP)",
			n, leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return n, fmt.Errorf("certificate of %v expired at %s, this host's clock says %s: check the clock (NTP) and that the node reaches its platform to renew",
			n, leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range t.Roots {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage},
	})
	if err != nil {
		return n, fmt.Errorf("certificate of %v: %w", n, err)
	}
	if !slices.ContainsFunc(chains, func(c []*x509.Certificate) bool {
		return len(c) >= 2 && slices.Contains(t.Pins, CertificateKeyHash(c[1]))
	}) {
		return n, fmt.Errorf("certificate of %v is not issued by a pinned CA key of its organization", n)
	}
	if key := CertificateKeyHash(leaf); slices.Contains(t.Denied, key) {
		return n, &RevokedError{Node: n, Key: key}
	}
	return n, nil
}

// TLSConfig returns a TLS 1.3 configuration that shows cert and lets a connection live only when check accepts the peer. check
// runs in VerifyConnection, hence also on resumption, and sees the verified identity's chain (leaf first). server says which
// side this is; servers demand a certificate. No session tickets: a ticket would outlive a revocation.
func TLSConfig(cert func() (*tls.Certificate, error), server bool, alpn []string, check func(chain []*x509.Certificate) error) *tls.Config {
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             alpn,
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(alpn) > 0 && !slices.Contains(alpn, cs.NegotiatedProtocol) {
				return fmt.Errorf("peer speaks protocol %q, want one of %q", cs.NegotiatedProtocol, alpn)
			}
			return check(cs.PeerCertificates)
		},
	}
	if server {
		cfg.ClientAuth = tls.RequireAnyClientCert
		cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert() }
		return cfg
	}
	// The verifier is ours and checks chain, pin and URI SAN, so the name check of crypto/tls, which knows none of these, is off.
	cfg.InsecureSkipVerify = true
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert() }
	return cfg
}

// EncodeCertificates writes certificates as PEM, one after the other.
func EncodeCertificates(certs ...*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// DecodeCertificates reads PEM certificates; at least one, at most 16.
func DecodeCertificates(b []byte) ([]*x509.Certificate, error) {
	const most = 16
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if len(certs) == most {
			return nil, fmt.Errorf("more than %d certificates", most)
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block of type %q, want CERTIFICATE", clip(block.Type))
		}
		if len(block.Bytes) > MaxCertificate {
			return nil, fmt.Errorf("certificate of %d bytes, limit %d", len(block.Bytes), MaxCertificate)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no PEM certificate")
	}
	return certs, nil
}

// TLSCertificate joins a chain (leaf first) with its key.
func TLSCertificate(chain []*x509.Certificate, key crypto.Signer) (*tls.Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("empty certificate chain")
	}
	if CertificateKeyHash(chain[0]) != HashKey(key.Public()) {
		return nil, errors.New("the certificate is for another key")
	}
	c := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, x := range chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c, nil
}
