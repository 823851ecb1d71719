package pki

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/netip"
	"time"

	"sallyway/internal/identity"
)

// ServerLife is the life of the platform's own server certificate, which is made again at half of it.
const ServerLife = 90 * 24 * time.Hour

// KindTLS is the kind of the CA of the platform's own server certificate.
const KindTLS = "tls"

// NewServerCA makes the CA for the platform's own HTTPS certificate: the one whose key hash enrolment tokens carry. It has no part in
// any organization's PKI.
func NewServerCA(now time.Time) (*Authority, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	sn, err := serial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          sn,
		Subject:               pkix.Name{CommonName: "Sallyway platform CA"},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(RootLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	c, err := certify(t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &Authority{Certificate: c, Key: key}, nil
}

// Server issues the HTTPS certificate for hosts: names and IP addresses.
func (a *Authority) Server(hosts []string, now time.Time) (*tls.Certificate, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	sn, err := serial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          sn,
		Subject:               pkix.Name{CommonName: "Sallyway platform"},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(ServerLife),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, h := range hosts {
		if a, err := netip.ParseAddr(h); err == nil {
			t.IPAddresses = append(t.IPAddresses, net.IP(a.Unmap().WithZone("").AsSlice()))
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.Certificate, key.Public(), a.Key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der, a.Certificate.Raw}, PrivateKey: key, Leaf: leaf}, nil
}
