package identity

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"
)

const (
	server = x509.ExtKeyUsageServerAuth
	client = x509.ExtKeyUsageClientAuth
)

var (
	gateway1 = Node{"acme", Gateway, "g-1"}
	client1  = Node{"acme", Client, "c-1"}
)

func chain(c ...*x509.Certificate) []*x509.Certificate { return c }

func TestVerify(t *testing.T) {
	acme, evil := newTestCA(t, "acme"), newTestCA(t, "acme") // evil calls itself acme, with the same serials
	key := mustKey(t).Public()
	good := acme.issue(gateway1, key, server, nil)
	spoilt := func(change func(*x509.Certificate)) []*x509.Certificate {
		return chain(acme.issue(gateway1, key, server, change), acme.ca)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri := func(ss ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range ss {
				u, err := url.Parse(s)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	notCA := acme.issue(gateway1, acme.key.Public(), server, nil) // a leaf that would issue
	forged := *acme
	forged.ca = notCA
	for _, c := range []struct {
		name  string
		chain []*x509.Certificate
		usage x509.ExtKeyUsage
		says  string // of the error; empty is success
	}{
		{"server", chain(good, acme.ca), server, ""},
		{"with its root", chain(good, acme.ca, acme.root), server, ""},
		{"any usage, for documents", chain(good, acme.ca), x509.ExtKeyUsageAny, ""},
		{"Ed25519", chain(acme.issue(gateway1, edKey, server, nil), acme.ca), server, ""},
		{"server that plays client", chain(good, acme.ca), client, "usage"},
		{"client that plays server", chain(acme.issue(client1, key, client, nil), acme.ca), server, "usage"},
		{"no usage", chain(acme.issue(gateway1, key, x509.ExtKeyUsageEmailProtection, nil), acme.ca), server, "usage"},
		{"nothing", nil, server, "no certificate"},
		{"without its intermediate", chain(good), server, "unknown authority"},
		{"another organization with the same names and serials", chain(evil.issue(gateway1, key, server, nil), evil.ca), server, "unknown authority"},
		{"another organization's leaf over our intermediate", chain(evil.issue(gateway1, key, server, nil), acme.ca), server, "unknown authority"},
		{"issued by a leaf", chain(forged.issue(gateway1, key, server, nil), notCA), server, "signed by unknown authority"},
		{"the intermediate itself", chain(acme.ca, acme.root), server, "0 URI names"},
		{"no URI, only a common name", spoilt(uri()), server, "0 URI names"},
		{"two URIs", spoilt(uri("spiffe://acme.sallyway/gateway/g-1", "spiffe://acme.sallyway/gateway/g-2")), server, "2 URI names"},
		{"a foreign URI", spoilt(uri("https://acme.example/g-1")), server, "SPIFFE"},
		{"DNS name in place of the URI", spoilt(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"g-1.acme.sallyway"} }), server, "0 URI names"},
		{"RSA leaf", chain(acme.issue(gateway1, rsaKey.Public(), server, nil), acme.ca), server, "P-256"},
		{"P-384 leaf", chain(acme.issue(gateway1, p384.Public(), server, nil), acme.ca), server, "P-256"},
		{"four certificates", chain(good, acme.ca, acme.root, evil.root), server, "limit 3"},
		{"a huge leaf", spoilt(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: make([]byte, MaxCertificate)}}
		}), server, "limit 8192"},
		{"an unknown critical extension", spoilt(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), server, "critical"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := acme.trust().Verify(c.chain, c.usage)
			switch {
			case c.says == "" && (err != nil || n != gateway1):
				t.Errorf("%v, %v", n, err)
			case c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
				t.Errorf("%v, %v, want an error that says %q", n, err, c.says)
			}
		})
	}
	if _, err := (&Trust{}).Verify(chain(good, acme.ca), server); err == nil {
		t.Error("the zero Trust trusts")
	}
}

// The CA key is pinned: the root alone is not enough, and during a rotation leaves of both CAs pass.
func TestVerifyPins(t *testing.T) {
	ca := newTestCA(t, "acme")
	key := mustKey(t).Public()
	old, oldCA := ca.issue(gateway1, key, server, nil), ca.ca
	ca.rotate()
	next, nextCA := ca.issue(gateway1, key, server, nil), ca.ca
	oldPin, nextPin := CertificateKeyHash(oldCA), CertificateKeyHash(nextCA)
	// The root may issue an intermediate for whoever asks it; only what is pinned counts.
	ca.rotate()
	stranger, strangerCA := ca.issue(gateway1, key, server, nil), ca.ca
	for _, c := range []struct {
		name                string
		pins                []KeyHash
		old, next, stranger bool
	}{
		{"before", []KeyHash{oldPin}, true, false, false},
		{"during", []KeyHash{oldPin, nextPin}, true, true, false},
		{"after", []KeyHash{nextPin}, false, true, false},
		{"no pins", nil, false, false, false},
		{"the leaf's own key", []KeyHash{CertificateKeyHash(old)}, false, false, false},
		{"the root's key", []KeyHash{CertificateKeyHash(ca.root)}, false, false, false},
	} {
		tr := &Trust{Roots: chain(ca.root), Pins: c.pins}
		for who, x := range map[string]struct {
			chain []*x509.Certificate
			ok    bool
		}{"old": {chain(old, oldCA), c.old}, "next": {chain(next, nextCA), c.next}, "stranger": {chain(stranger, strangerCA), c.stranger}} {
			if _, err := tr.Verify(x.chain, server); (err == nil) != x.ok {
				t.Errorf("%s: leaf of the %s CA: %v, want accepted %v", c.name, who, err, x.ok)
			} else if err != nil && !strings.Contains(err.Error(), "pinned") {
				t.Errorf("%s: %v does not say that the CA is not pinned", c.name, err)
			}
		}
	}
	// A leaf of an unpinned CA does not pass with a pinned one beside it.
	tr := &Trust{Roots: chain(ca.root), Pins: []KeyHash{nextPin}}
	if _, err := tr.Verify(chain(stranger, strangerCA, nextCA), server); err == nil {
		t.Error("a pinned CA that stands in the chain without having issued the leaf counts")
	}
}

func TestVerifyClock(t *testing.T) {
	ca := newTestCA(t, "acme")
	leaf := ca.issue(gateway1, mustKey(t).Public(), server, nil)
	for _, c := range []struct {
		name string
		now  time.Time
		says string
	}{
		{"in time", testTime, ""},
		{"first second", leaf.NotBefore, ""},
		{"last second", leaf.NotAfter, ""},
		{"4 min 59 s early", leaf.NotBefore.Add(-ClockSkew + time.Second), ""},
		{"5 min early", leaf.NotBefore.Add(-ClockSkew), ""},
		{"5 min 1 s early", leaf.NotBefore.Add(-ClockSkew - time.Second), "valid only from"},
		{"5 min late", leaf.NotAfter.Add(ClockSkew), ""},
		{"5 min 1 s late", leaf.NotAfter.Add(ClockSkew + time.Second), "expired at"},
		{"a year late", leaf.NotAfter.AddDate(1, 0, 0), "expired at"},
		{"1970", time.Unix(0, 0), "valid only from"},
	} {
		tr := ca.trust()
		tr.Now = func() time.Time { return c.now }
		_, err := tr.Verify(chain(leaf, ca.ca), server)
		if c.says == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: accepted", c.name)
			continue
		}
		bound := leaf.NotBefore
		if c.says == "expired at" {
			bound = leaf.NotAfter
		}
		for _, want := range []string{c.says, bound.UTC().Format(time.RFC3339), c.now.UTC().Format(time.RFC3339), "clock", "acme/gateway/g-1"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not say %q", c.name, err, want)
			}
		}
	}
	// An expired CA is no matter of skew.
	tr := ca.trust()
	young := ca.issue(gateway1, mustKey(t).Public(), server, func(c *x509.Certificate) { c.NotAfter = testTime.AddDate(0, 1, 0) })
	tr.Now = func() time.Time { return ca.ca.NotAfter.Add(time.Minute) }
	if _, err := tr.Verify(chain(young, ca.ca), server); err == nil {
		t.Error("a leaf of an expired CA is accepted")
	}
}

// A key is denied, not a certificate: a fresh certificate for it is denied as well.
func TestVerifyDenied(t *testing.T) {
	ca := newTestCA(t, "acme")
	key := mustKey(t).Public()
	tr := ca.trust()
	tr.Denied = []KeyHash{HashKey(mustKey(t).Public()), HashKey(key)}
	for _, serial := range []int64{7, 8} {
		leaf := ca.issue(client1, key, client, func(c *x509.Certificate) { c.SerialNumber.SetInt64(serial) })
		n, err := tr.Verify(chain(leaf, ca.ca), client)
		var revoked *RevokedError
		if !errors.As(err, &revoked) || revoked.Node != client1 || revoked.Key != HashKey(key) || n != client1 || !strings.Contains(err.Error(), "acme/client/c-1") {
			t.Errorf("%v, %v", n, err)
		}
	}
	if _, err := tr.Verify(chain(ca.issue(client1, mustKey(t).Public(), client, nil), ca.ca), client); err != nil {
		t.Errorf("another key of the same node: %v", err)
	}
	// Who is not ours is told that, not whether its key stands on the list.
	evil := newTestCA(t, "acme")
	var revoked *RevokedError
	if _, err := tr.Verify(chain(evil.issue(client1, key, client, nil), evil.ca), client); err == nil || errors.As(err, &revoked) {
		t.Errorf("%v", err)
	}
}

func TestDecodeCertificates(t *testing.T) {
	ca := newTestCA(t, "acme")
	b := EncodeCertificates(ca.ca, ca.root)
	certs, err := DecodeCertificates(append([]byte("a comment\n"), b...))
	if err != nil || len(certs) != 2 || !certs[0].Equal(ca.ca) || !certs[1].Equal(ca.root) {
		t.Fatalf("%d certificates, %v", len(certs), err)
	}
	key, err := EncodeKey(mustKey(t))
	if err != nil {
		t.Fatal(err)
	}
	one := EncodeCertificates(ca.root)
	many := func(n int) []byte { return []byte(strings.Repeat(string(one), n)) }
	huge := ca.issue(gateway1, mustKey(t).Public(), server, func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: make([]byte, MaxCertificate)}}
	})
	for name, bad := range map[string][]byte{
		"nothing": nil, "text": []byte("hello"), "a key": key, "17": many(17), "no DER": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
		"a key among them": append(append([]byte{}, one...), key...), "huge": EncodeCertificates(huge),
	} {
		if c, err := DecodeCertificates(bad); err == nil {
			t.Errorf("%s: %d certificates", name, len(c))
		} else if strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: the error repeats the input: %v", name, err)
		}
	}
	if c, err := DecodeCertificates(many(16)); err != nil || len(c) != 16 {
		t.Errorf("16: %d, %v", len(c), err)
	}
}

func FuzzDecodeCertificates(f *testing.F) {
	ca := newTestCA(f, "acme")
	f.Add(EncodeCertificates(ca.ca, ca.root))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, b []byte) {
		certs, err := DecodeCertificates(b)
		if err != nil {
			return
		}
		if len(certs) == 0 || len(certs) > 16 {
			t.Fatalf("%d certificates", len(certs))
		}
		for _, c := range certs {
			if len(c.Raw) > MaxCertificate {
				t.Fatalf("a certificate of %d bytes", len(c.Raw))
			}
			_, _ = CertificateNode(c)
		}
		back, err := DecodeCertificates(EncodeCertificates(certs...))
		if err != nil || len(back) != len(certs) {
			t.Fatalf("%d of %d survive: %v", len(back), len(certs), err)
		}
		_, _ = ca.trust().Verify(certs, server)
	})
}

func TestTLSCertificate(t *testing.T) {
	ca := newTestCA(t, "acme")
	key := mustKey(t)
	leaf := ca.issue(client1, key.Public(), client, nil)
	if _, err := TLSCertificate(chain(leaf, ca.ca), mustKey(t)); err == nil {
		t.Error("a certificate joins with another key")
	}
	if _, err := TLSCertificate(nil, key); err == nil {
		t.Error("an empty chain")
	}
	c, err := TLSCertificate(chain(leaf, ca.ca), key)
	if err != nil || len(c.Certificate) != 2 || c.Leaf != leaf {
		t.Errorf("%+v, %v", c, err)
	}
}
