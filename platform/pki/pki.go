// Package pki issues certificates: one root for each organization, an intermediate for each kind of leaf below it, and leaves that
// live 24 hours. Private keys of CAs leave this package sealed only (see Sealer).
//
//	root             <org>, path length 1, names below <org>.sallyway only
//	└ intermediate   one per kind, path length 0, the kind's extended key usage only, the same names
//	  └ leaf         one SPIFFE URI, key made by the node, proved by its request
//
// The platform itself is an organization by the name identity.SharedOrg: its relay CA serves relays that organizations share, and
// nobody trusts it for gateways or clients.
package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"

	"sallyway/internal/identity"
)

// Lifetimes.
const (
	RootLife         = 20 * 365 * 24 * time.Hour
	IntermediateLife = 10 * 365 * 24 * time.Hour
	// Backdate is how long before now a certificate begins to be valid: for peers whose clocks lag (identity.ClockSkew).
	Backdate = identity.ClockSkew
	// PolicyLife is the life of the leaf that signs snapshots and grants: long, since nodes check cached documents with it while the
	// platform is down.
	PolicyLife = 30 * 24 * time.Hour
)

// MaxRequest bounds a certificate signing request in bytes.
const MaxRequest = 8 << 10

// KindRoot is the kind of a root authority. Other authorities have the kind of leaf that they issue.
const KindRoot = "root"

// documentSigning is id-kp-documentSigning (RFC 9336): leaves of kind policy sign documents and can not serve as TLS peers.
var documentSigning = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 36}

// Authority is a CA with its key.
type Authority struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
}

// usages returns what leaves of a kind may be used for: servers and clients are separate, so that neither passes as the other.
func usages(k identity.Kind) ([]x509.ExtKeyUsage, []asn1.ObjectIdentifier, error) {
	switch k {
	case identity.Relay, identity.Gateway:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, nil, nil
	case identity.Client, identity.Site, identity.Platform:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, nil, nil
	case identity.Policy:
		return nil, []asn1.ObjectIdentifier{documentSigning}, nil
	}
	return nil, nil, fmt.Errorf("no certificates for kind %q", k)
}

// serial returns 128 random bits as a positive number (RFC 5280 §4.1.2.2 allows 20 octets).
func serial() (*big.Int, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, err
	}
	b[0] &= 0x7f
	b[15] |= 1 // never zero
	return new(big.Int).SetBytes(b[:]), nil
}

// domain is the name below which an organization's certificates lie.
func domain(org string) string { return org + ".sallyway" }

// allAddresses are the ranges that no certificate of ours may name.
func allAddresses() []*net.IPNet {
	return []*net.IPNet{
		{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	}
}

// caTemplate is what the certificates of all CAs of an organization have in common.
func caTemplate(org, name string, now time.Time, life time.Duration, pathLen int) (*x509.Certificate, error) {
	sn, err := serial()
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:                sn,
		Subject:                     pkix.Name{Organization: []string{org}, CommonName: name},
		NotBefore:                   now.Add(-Backdate),
		NotAfter:                    now.Add(life),
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid:       true,
		IsCA:                        true,
		MaxPathLen:                  pathLen,
		MaxPathLenZero:              pathLen == 0,
		PermittedURIDomains:         []string{domain(org)},
		PermittedDNSDomains:         []string{domain(org)},
		PermittedDNSDomainsCritical: true,
		ExcludedIPRanges:            allAddresses(),
	}, nil
}

// certify signs t for pub.
func certify(t, issuer *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, issuer, pub, signer)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", t.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

// NewRoot makes an organization's first root.
func NewRoot(org string, now time.Time) (*Authority, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	t, err := caTemplate(org, rootName(org, 1), now, RootLife, 1)
	if err != nil {
		return nil, err
	}
	c, err := certify(t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &Authority{Certificate: c, Key: key}, nil
}

// NewIntermediate makes the first CA for leaves of a kind.
func (a *Authority) NewIntermediate(org string, k identity.Kind, now time.Time) (*Authority, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	c, err := a.SignIntermediate(org, k, 1, key.Public(), now, IntermediateLife)
	if err != nil {
		return nil, err
	}
	return &Authority{Certificate: c, Key: key}, nil
}

// Request is a checked certificate signing request.
type Request struct {
	Node   identity.Node
	Public crypto.PublicKey
	Key    identity.KeyHash
}

// ParseRequest checks a request (PEM): its sender holds the key, the key is of a good kind, and it asks for nothing but one
// identity of ours.
func ParseRequest(b []byte) (*Request, error) {
	r, err := proven(b)
	if err != nil {
		return nil, err
	}
	if len(r.URIs) != 1 || len(r.DNSNames)+len(r.EmailAddresses)+len(r.IPAddresses) != 0 {
		return nil, errors.New("a certificate request names one SPIFFE URI and nothing else")
	}
	n, err := identity.ParseURI(r.URIs[0])
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return &Request{Node: n, Public: r.PublicKey, Key: identity.HashKey(r.PublicKey)}, nil
}

// proven reads a request (PEM) of a good kind of key, whose sender holds the key.
func proven(b []byte) (*x509.CertificateRequest, error) {
	if len(b) > MaxRequest {
		return nil, fmt.Errorf("certificate request of %d bytes, limit %d", len(b), MaxRequest)
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) != 0 {
		return nil, errors.New("want one PEM block of type CERTIFICATE REQUEST")
	}
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, errors.New("malformed certificate request")
	}
	if err := identity.CheckKey(r.PublicKey); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, errors.New("the signature of the certificate request is not by its key: its sender does not hold the key")
	}
	return r, nil
}

// Leaf issues a certificate for n and returns it; n's kind must be the one that the intermediate is for. It ends with the CA at the
// latest.
func (a *Authority) Leaf(n identity.Node, pub crypto.PublicKey, now time.Time, life time.Duration) (*x509.Certificate, error) {
	if err := n.Validate(); err != nil {
		return nil, err
	}
	if err := identity.CheckKey(pub); err != nil {
		return nil, err
	}
	eku, other, err := usages(n.Kind)
	if err != nil {
		return nil, err
	}
	sn, err := serial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          sn,
		Subject:               pkix.Name{CommonName: n.ID},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           eku,
		UnknownExtKeyUsage:    other,
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{n.URI()},
		DNSNames:              []string{n.ServerName()},
	}
	if t.NotAfter.After(a.Certificate.NotAfter) {
		t.NotAfter = a.Certificate.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.Certificate, pub, a.Key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate for %v: %w", n, err)
	}
	return x509.ParseCertificate(der)
}
