package identity

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"
)

// testTime is when the certificates of tests were issued; they are valid for an hour on both sides of it.
var testTime = time.Now().Truncate(time.Second)

// testCA is an organization's PKI: a root, and an intermediate that issues leaves.
type testCA struct {
	t       testing.TB
	root    *x509.Certificate
	rootKey crypto.Signer
	ca      *x509.Certificate
	key     crypto.Signer
}

func newTestCA(t testing.TB, org string) *testCA {
	t.Helper()
	ca := &testCA{t: t, rootKey: mustKey(t)}
	tmpl := caTemplate(org + " root")
	ca.root = ca.sign(tmpl, tmpl, ca.rootKey.Public(), ca.rootKey)
	ca.rotate()
	return ca
}

// rotate makes a new intermediate; the root stays.
func (ca *testCA) rotate() {
	ca.key = mustKey(ca.t)
	ca.ca = ca.sign(caTemplate("intermediate"), ca.root, ca.key.Public(), ca.rootKey)
}

func caTemplate(cn string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: testTime.Add(-24 * time.Hour), NotAfter: testTime.Add(24 * time.Hour),
	}
}

func mustKey(t testing.TB) crypto.Signer {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (ca *testCA) sign(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	ca.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		ca.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return c
}

// issue makes a leaf for n as a platform would; change may spoil it.
func (ca *testCA) issue(n Node, pub crypto.PublicKey, usage x509.ExtKeyUsage, change func(*x509.Certificate)) *x509.Certificate {
	ca.t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: n.ID}, URIs: []*url.URL{n.URI()},
		NotBefore: testTime.Add(-time.Hour), NotAfter: testTime.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	if change != nil {
		change(tmpl)
	}
	return ca.sign(tmpl, ca.ca, pub, ca.key)
}

// leaf is issue with a key of its own, ready for a handshake.
func (ca *testCA) leaf(n Node, usage x509.ExtKeyUsage) *tls.Certificate {
	ca.t.Helper()
	key := mustKey(ca.t)
	c, err := TLSCertificate([]*x509.Certificate{ca.issue(n, key.Public(), usage, nil), ca.ca}, key)
	if err != nil {
		ca.t.Fatal(err)
	}
	return c
}

func (ca *testCA) trust() *Trust {
	return &Trust{Roots: []*x509.Certificate{ca.root}, Pins: []KeyHash{CertificateKeyHash(ca.ca)}, Now: func() time.Time { return testTime }}
}
