package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"sallyway/internal/identity"
)

// rootName is the subject of a root.
func rootName(org string, generation int) string { return numbered(org+" root", generation) }

// intermediateName is the subject of an intermediate.
func intermediateName(org string, k identity.Kind, generation int) string {
	return numbered(org+" "+string(k)+" CA", generation)
}

func numbered(name string, generation int) string {
	if generation > 1 {
		return fmt.Sprintf("%s %d", name, generation)
	}
	return name
}

// NextRoot makes the root that follows a. Its certificate is signed by a: whoever trusts a follows (identity.Succession), and as a root it
// is as good as one that is signed by itself.
func (a *Authority) NextRoot(org string, generation int, now time.Time) (*Authority, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	t, err := caTemplate(org, rootName(org, generation), now, RootLife, 1)
	if err != nil {
		return nil, err
	}
	c, err := certify(t, a.Certificate, key.Public(), a.Key)
	if err != nil {
		return nil, err
	}
	return &Authority{Certificate: c, Key: key}, nil
}

// SignIntermediate certifies the key of the CA for leaves of a kind. It ends with the root at the latest.
func (a *Authority) SignIntermediate(org string, k identity.Kind, generation int, pub crypto.PublicKey, now time.Time, life time.Duration) (*x509.Certificate, error) {
	if err := identity.CheckKey(pub); err != nil {
		return nil, err
	}
	t, err := caTemplate(org, intermediateName(org, k, generation), now, life, 0)
	if err != nil {
		return nil, err
	}
	if t.ExtKeyUsage, t.UnknownExtKeyUsage, err = usages(k); err != nil {
		return nil, err
	}
	if t.NotAfter.After(a.Certificate.NotAfter) {
		t.NotAfter = a.Certificate.NotAfter
	}
	return certify(t, a.Certificate, pub, a.Key)
}

// IntermediateRequest asks the owner of an offline root to certify the key of a CA (PEM).
func IntermediateRequest(org string, k identity.Kind, generation int, key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Organization: []string{org}, CommonName: intermediateName(org, k, generation)},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("request for %s: %w", intermediateName(org, k, generation), err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// ParseIntermediateRequest checks what IntermediateRequest made: its sender holds the key, and it is for what it is said to be for.
func ParseIntermediateRequest(b []byte, org string, k identity.Kind, generation int) (crypto.PublicKey, error) {
	r, err := proven(b)
	if err != nil {
		return nil, err
	}
	if want := intermediateName(org, k, generation); r.Subject.CommonName != want || !slices.Equal(r.Subject.Organization, []string{org}) {
		return nil, fmt.Errorf("the certificate request is for %.80q of %.80q, want %q of %q", r.Subject.CommonName, r.Subject.Organization, want, org)
	}
	return r.PublicKey, nil
}

// CheckRoot holds a root that an owner hands over to what one of ours is. before is the root that it follows, which signed it; nil is none:
// it is signed by itself.
func CheckRoot(c *x509.Certificate, org string, before *x509.Certificate, now time.Time) error {
	if len(c.Raw) > identity.MaxCertificate {
		return fmt.Errorf("certificate of %d bytes, limit %d", len(c.Raw), identity.MaxCertificate)
	}
	if err := identity.CheckKey(c.PublicKey); err != nil {
		return err
	}
	switch {
	case !identity.IsRoot(c) || c.MaxPathLen != 1:
		return errors.New("the certificate is not one of a root: a CA of path length 1 for every usage")
	case !constrained(c, org):
		return fmt.Errorf("the root is not constrained to names below %s", domain(org))
	case now.Before(c.NotBefore.Add(-identity.ClockSkew)) || !now.Before(c.NotAfter):
		return fmt.Errorf("the root is valid from %s to %s", c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	}
	if before == nil {
		before = c
	}
	if err := c.CheckSignatureFrom(before); err != nil {
		return fmt.Errorf("the certificate is not signed by the key of %s", before.Subject.CommonName)
	}
	return nil
}

// CheckIntermediate holds a certificate that the owner of root signed to what was asked for.
func CheckIntermediate(c, root *x509.Certificate, org string, k identity.Kind, pub crypto.PublicKey, now time.Time) error {
	eku, other, err := usages(k)
	if err != nil {
		return err
	}
	switch {
	case len(c.Raw) > identity.MaxCertificate:
		return fmt.Errorf("certificate of %d bytes, limit %d", len(c.Raw), identity.MaxCertificate)
	case identity.CertificateKeyHash(c) != identity.HashKey(pub):
		return errors.New("the certificate is for another key than the one that was asked for")
	case !c.IsCA || c.MaxPathLen != 0 || !c.MaxPathLenZero || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("the certificate is not one of an intermediate: a CA of path length 0")
	case !slices.Equal(c.ExtKeyUsage, eku) || len(c.UnknownExtKeyUsage) != len(other) || (len(other) > 0 && !c.UnknownExtKeyUsage[0].Equal(other[0])):
		return fmt.Errorf("the certificate is not for the usage of kind %s alone", k)
	case !constrained(c, org):
		return fmt.Errorf("the certificate is not constrained to names below %s", domain(org))
	case now.Before(c.NotBefore.Add(-identity.ClockSkew)) || !now.Before(c.NotAfter):
		return fmt.Errorf("the certificate is valid from %s to %s", c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := c.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("the certificate is not signed by the organization's root %v", identity.CertificateKeyHash(root))
	}
	return nil
}

func constrained(c *x509.Certificate, org string) bool {
	only := []string{domain(org)}
	return c.PermittedDNSDomainsCritical && slices.Equal(c.PermittedURIDomains, only) && slices.Equal(c.PermittedDNSDomains, only)
}

// IssuedBy says whether an intermediate was issued by the key of root.
func IssuedBy(c, root *x509.Certificate) bool {
	return c.CheckSignatureFrom(root) == nil
}
