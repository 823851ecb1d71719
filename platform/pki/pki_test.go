package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
)

var now = time.Now()

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// org is an organization's PKI.
type org struct {
	name string
	root *Authority
	cas  map[identity.Kind]*Authority
}

func newOrg(name string) *org {
	o := &org{name: name, root: must(NewRoot(name, now)), cas: make(map[identity.Kind]*Authority)}
	for _, k := range identity.Kinds {
		o.cas[k] = must(o.root.NewIntermediate(name, k, now))
	}
	return o
}

func (o *org) trust(kinds ...identity.Kind) *identity.Trust {
	t := &identity.Trust{Roots: []*x509.Certificate{o.root.Certificate}}
	for _, k := range kinds {
		t.Pins = append(t.Pins, identity.CertificateKeyHash(o.cas[k].Certificate))
	}
	return t
}

func (o *org) node(k identity.Kind) identity.Node {
	return identity.Node{Org: o.name, Kind: k, ID: string(k[0]) + "-aaaaaaaaaaaa"}
}

func newKey() crypto.Signer { return must(identity.NewKey()) }

func TestLeavesProveTheirKindOnly(t *testing.T) {
	o := newOrg("acme")
	server, client, document := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny
	want := map[identity.Kind]x509.ExtKeyUsage{
		identity.Relay: server, identity.Gateway: server, identity.Client: client, identity.Site: client, identity.Platform: client, identity.Policy: document,
	}
	for kind, usage := range want {
		leaf := must(o.cas[kind].Leaf(o.node(kind), newKey().Public(), now, 24*time.Hour))
		chain := []*x509.Certificate{leaf, o.cas[kind].Certificate}
		if n, err := o.trust(kind).Verify(chain, usage); err != nil || n != o.node(kind) {
			t.Errorf("%s: %v %v", kind, n, err)
		}
		for _, other := range []x509.ExtKeyUsage{server, client} {
			if other == usage {
				continue
			}
			if _, err := o.trust(kind).Verify(chain, other); err == nil {
				t.Errorf("%s passes with usage %v", kind, other)
			}
		}
		for _, other := range identity.Kinds {
			if other == kind {
				continue
			}
			if _, err := o.trust(other).Verify(chain, document); err == nil {
				t.Errorf("%s passes where only %s is pinned", kind, other)
			}
		}
		if leaf.SerialNumber.BitLen() < 64 || len(leaf.Raw) > identity.MaxCertificate {
			t.Errorf("%s: serial of %d bits, %d bytes", kind, leaf.SerialNumber.BitLen(), len(leaf.Raw))
		}
	}
}

// TestAnIntermediateIssuesForItsOrganizationOnly: a stolen CA key is worth its own names and kind alone.
func TestAnIntermediateIssuesForItsOrganizationOnly(t *testing.T) {
	a, b := newOrg("acme"), newOrg("rival")
	ca := a.cas[identity.Gateway]
	forge := func(change func(*x509.Certificate)) []*x509.Certificate {
		c := &x509.Certificate{
			SerialNumber: must(serial()), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, URIs: []*url.URL{a.node(identity.Gateway).URI()}, BasicConstraintsValid: true,
		}
		change(c)
		der := must(x509.CreateCertificate(rand.Reader, c, ca.Certificate, newKey().Public(), ca.Key))
		return []*x509.Certificate{must(x509.ParseCertificate(der)), ca.Certificate}
	}
	if _, err := a.trust(identity.Gateway).Verify(forge(func(*x509.Certificate) {}), x509.ExtKeyUsageServerAuth); err != nil {
		t.Fatalf("the plain one: %v", err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"another organization": func(c *x509.Certificate) { c.URIs = []*url.URL{b.node(identity.Gateway).URI()} },
		"the platform":         func(c *x509.Certificate) { c.URIs[0].Host = "platform.shared.sallyway" },
		"a foreign DNS name":   func(c *x509.Certificate) { c.DNSNames = []string{"www.example.com"} },
		"an address":           func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1)} },
		"another usage":        func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} },
	} {
		usage := x509.ExtKeyUsageServerAuth
		chain := forge(change)
		if name == "another usage" {
			usage = x509.ExtKeyUsageClientAuth
		}
		if n, err := a.trust(identity.Gateway).Verify(chain, usage); err == nil {
			t.Errorf("%s: proves %v", name, n)
		}
	}
	// No CA below an intermediate, by its own constraint and by the root's.
	if c := ca.Certificate; c.MaxPathLen != 0 || !c.MaxPathLenZero || a.root.Certificate.MaxPathLen != 1 {
		t.Errorf("path lengths: intermediate %d (%t), root %d", c.MaxPathLen, c.MaxPathLenZero, a.root.Certificate.MaxPathLen)
	}
	sub := &Authority{Key: newKey()}
	der := must(x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: must(serial()), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, ca.Certificate, sub.Key.Public(), ca.Key))
	sub.Certificate = must(x509.ParseCertificate(der))
	leaf := must(sub.Leaf(a.node(identity.Gateway), newKey().Public(), now, time.Hour))
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(a.root.Certificate)
	inter.AddCert(ca.Certificate)
	inter.AddCert(sub.Certificate)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
		t.Error("a CA below an intermediate is accepted")
	}
}

// TestRotation: while two CA keys are pinned, leaves of both pass; afterwards only the new one's.
func TestRotation(t *testing.T) {
	o := newOrg("acme")
	old := o.cas[identity.Client]
	next := must(o.root.NewIntermediate("acme", identity.Client, now))
	chain := func(ca *Authority) []*x509.Certificate {
		return []*x509.Certificate{must(ca.Leaf(o.node(identity.Client), newKey().Public(), now, time.Hour)), ca.Certificate}
	}
	both := o.trust(identity.Client)
	both.Pins = append(both.Pins, identity.CertificateKeyHash(next.Certificate))
	for _, ca := range []*Authority{old, next} {
		if _, err := both.Verify(chain(ca), x509.ExtKeyUsageClientAuth); err != nil {
			t.Error(err)
		}
	}
	after := o.trust()
	after.Pins = []identity.KeyHash{identity.CertificateKeyHash(next.Certificate)}
	if _, err := after.Verify(chain(old), x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("the old CA's leaf passes after the rotation")
	}
}

func request(key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	r := &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "acme.sallyway", Path: "/client/c-1"}}}
	if change != nil {
		change(r)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: must(x509.CreateCertificateRequest(rand.Reader, r, key))})
}

func TestParseRequest(t *testing.T) {
	key := newKey()
	r, err := ParseRequest(request(key, nil))
	if err != nil || r.Node != (identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}) || r.Key != identity.HashKey(key.Public()) {
		t.Fatalf("%+v %v", r, err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseRequest(request(ed, nil)); err != nil {
		t.Errorf("Ed25519: %v", err)
	}
	forged := func() []byte {
		block, _ := pem.Decode(request(key, nil))
		other := must(x509.ParseCertificateRequest(block.Bytes))
		i := bytes.Index(block.Bytes, other.RawSubjectPublicKeyInfo)
		spki := must(x509.MarshalPKIXPublicKey(newKey().Public()))
		copy(block.Bytes[i:], spki) // somebody else's key, our signature
		return pem.EncodeToMemory(block)
	}
	for name, b := range map[string][]byte{
		"nothing":            nil,
		"too large":          bytes.Repeat([]byte("A"), MaxRequest+1),
		"two requests":       append(request(key, nil), request(key, nil)...),
		"a key not held":     forged(),
		"RSA":                request(must(rsa.GenerateKey(rand.Reader, 2048)), nil),
		"P-384":              request(must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)), nil),
		"no name":            request(key, func(r *x509.CertificateRequest) { r.URIs = nil }),
		"two names":          request(key, func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, r.URIs[0]) }),
		"a DNS name too":     request(key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"www.example.com"} }),
		"an address too":     request(key, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 1)} }),
		"not a name of ours": request(key, func(r *x509.CertificateRequest) { r.URIs[0].Host = "example.com" }),
		"an unknown kind":    request(key, func(r *x509.CertificateRequest) { r.URIs[0].Path = "/root/c-1" }),
	} {
		if r, err := ParseRequest(b); err == nil {
			t.Errorf("%s: accepted as %v", name, r.Node)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(request(newKey(), nil))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ParseRequest(b); err == nil && r.Node.Validate() != nil {
			t.Errorf("accepted %v", r.Node)
		}
	})
}

func TestSealer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "master.key")
	if _, err := LoadMaster(path, false); err == nil {
		t.Error("made a key where none was asked for")
	}
	m, err := LoadMaster(path, true)
	if err != nil {
		t.Fatal(err)
	}
	s := m.Sealer()
	sealed := s.Seal("a", []byte("secret"))
	if bytes.Contains(sealed, []byte("secret")) || bytes.Equal(sealed, s.Seal("a", []byte("secret"))) {
		t.Error("not sealed, or not by a fresh nonce")
	}
	m2, err := LoadMaster(path, true)
	if err != nil || m2.ID() != m.ID() || NewMaster().ID() == m.ID() {
		t.Fatal(err)
	}
	again := m2.Sealer()
	if b, err := again.Open("a", sealed); err != nil || string(b) != "secret" {
		t.Errorf("%q %v", b, err)
	}
	if _, err := again.Open("b", sealed); err == nil {
		t.Error("a value opens under another label")
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if _, err := s.Open("a", bad); err == nil {
			t.Fatalf("opens with byte %d changed", i)
		}
	}
	if _, err := s.Open("a", sealed[:5]); err == nil {
		t.Error("a stump opens")
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadMaster(path, false); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others can read: %v", err)
	}
}
