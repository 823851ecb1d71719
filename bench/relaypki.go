package bench

import (
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"sallyway/internal/identity"
)

// An organization's certificates in a folder, without a platform: roots and a node per kind. It lives as long as a run.
//
//	root.crt            the root certificate, whose key issues the leaves too
//	relay.crt, .key     a node's chain and its key

const pkiLife = 6 * time.Hour

// relayNode and its like are who takes part; there is one of each.
func relayNode(k identity.Kind) identity.Node {
	return identity.Node{Org: relayOrg, Kind: k, ID: "bench-" + string(k)}
}

// writePKI makes the certificates of the nodes in dir, which exists.
func writePKI(dir string, kinds ...identity.Kind) error {
	rootKey, err := identity.NewKey()
	if err != nil {
		return err
	}
	caKey, err := identity.NewKey()
	if err != nil {
		return err
	}
	authority := func(n int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(n), Subject: pkix.Name{CommonName: relayOrg}, IsCA: true, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(pkiLife), KeyUsage: x509.KeyUsageCertSign,
		}
	}
	root, err := signCertificate(authority(1), authority(1), rootKey.Public(), rootKey)
	if err != nil {
		return err
	}
	ca, err := signCertificate(authority(2), root, caKey.Public(), rootKey)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "root.crt"), identity.EncodeCertificates(root, ca), 0o644); err != nil {
		return err
	}
	for i, k := range kinds {
		key, err := identity.NewKey()
		if err != nil {
			return err
		}
		usage := x509.ExtKeyUsageServerAuth
		if k == identity.Client {
			usage = x509.ExtKeyUsageClientAuth
		}
		leaf, err := signCertificate(&x509.Certificate{
			SerialNumber: big.NewInt(int64(3 + i)), Subject: pkix.Name{CommonName: string(k)}, URIs: []*url.URL{relayNode(k).URI()},
			NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(pkiLife), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		}, ca, key.Public(), caKey)
		if err != nil {
			return err
		}
		der, err := identity.EncodeKey(key)
		if err != nil {
			return err
		}
		base := filepath.Join(dir, string(k))
		err = errors.Join(os.WriteFile(base+".crt", identity.EncodeCertificates(leaf, ca), 0o644), os.WriteFile(base+".key", der, 0o600))
		if err != nil {
			return err
		}
	}
	return nil
}

func signCertificate(tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// loadNode reads a node's chain and key; base is the path without an extension.
func loadNode(base string) (*tls.Certificate, error) {
	text, err := os.ReadFile(base + ".crt")
	if err != nil {
		return nil, err
	}
	chain, err := identity.DecodeCertificates(text)
	if err != nil {
		return nil, err
	}
	if text, err = os.ReadFile(base + ".key"); err != nil {
		return nil, err
	}
	key, err := identity.DecodeKey(text)
	if err != nil {
		return nil, err
	}
	return identity.TLSCertificate(chain, key)
}

// loadTrust reads what the certificates of a folder are held against.
func loadTrust(dir string) (*identity.Trust, error) {
	text, err := os.ReadFile(filepath.Join(dir, "root.crt"))
	if err != nil {
		return nil, err
	}
	certs, err := identity.DecodeCertificates(text)
	if err != nil {
		return nil, err
	}
	if len(certs) < 2 {
		return nil, errors.New("root.crt has no issuing certificate")
	}
	return &identity.Trust{Roots: certs[:1], Pins: []identity.KeyHash{identity.CertificateKeyHash(certs[1])}}, nil
}
