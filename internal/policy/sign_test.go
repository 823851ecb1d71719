package policy

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyway/internal/identity"
)

// authority is a root that issues one leaf.
type authority struct {
	root *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{root, key}
}

func (a *authority) signer(t *testing.T, n identity.Node) *Signer {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), URIs: []*url.URL{n.URI()}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.root, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &Signer{Key: key, Chain: []*x509.Certificate{leaf}}
}

func (a *authority) trust() *identity.Trust {
	return &identity.Trust{Roots: []*x509.Certificate{a.root}, Pins: []identity.KeyHash{identity.CertificateKeyHash(a.root)}}
}

func TestDocumentsAreBoundToSignerTypeAndAudience(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	policyKey := identity.Node{Org: "acme", Kind: identity.Policy, ID: "p-1"}
	gw := identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-one"}
	s := &Snapshot{Org: "acme", Audience: gw, Version: 7}
	text, err := ca.signer(t, policyKey).AppendSnapshot(nil, s)
	good := string(text)
	if err != nil {
		t.Fatal(err)
	}
	got, err := OpenSnapshot(good, ca.trust(), gw)
	if err != nil || got.Version != 7 {
		t.Fatalf("OpenSnapshot = %+v, %v", got, err)
	}
	sign := func(a *authority, n identity.Node, s *Snapshot) string {
		t.Helper()
		jws, err := a.signer(t, n).AppendSnapshot(nil, s)
		if err != nil {
			t.Fatal(err)
		}
		return string(jws)
	}
	untimed, err := Untimed(&Grant{Org: "acme", Node: gw})
	if err != nil {
		t.Fatal(err)
	}
	text, _, err = ca.signer(t, policyKey).AppendGrant(nil, untimed, nil, time.Now(), time.Now().Add(time.Hour), Kept{})
	if err != nil {
		t.Fatal(err)
	}
	grant := string(text)
	parts := strings.Split(good, ".")
	otherParts := strings.Split(sign(ca, policyKey, &Snapshot{Org: "acme", Audience: gw, Version: 8}), ".")
	other := identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-other"}
	for name, c := range map[string]struct {
		jws      string
		audience identity.Node
		says     string
	}{
		"foreign root":        {sign(foreign, policyKey, s), gw, "signer"},
		"signed by a gateway": {sign(ca, gw, s), gw, "want the policy key"},
		"policy of other org": {sign(ca, identity.Node{Org: "evil", Kind: identity.Policy, ID: "p-1"}, s), gw, "want the policy key"},
		"another audience":    {good, other, "snapshot is for"},
		"a grant":             {grant, gw, "document of type"},
		"payload swapped":     {parts[0] + "." + otherParts[1] + "." + parts[2], gw, "signature"},
		"garbage":             {"a.b.c", gw, "parse"},
	} {
		if _, err := OpenSnapshot(c.jws, ca.trust(), c.audience); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want an error that says %q", name, err, c.says)
		}
	}
}

func FuzzOpenSnapshot(f *testing.F) {
	f.Add("eyJhbGciOiJFUzI1NiJ9.e30.AA")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := OpenSnapshot(s, &identity.Trust{}, identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g"}); err == nil {
			t.Fatal("opened a snapshot without trusting anybody")
		}
	})
}

// TestAppendGrant: a grant whose content is the same goes out again as it was signed, and any other is signed.
func TestAppendGrant(t *testing.T) {
	ca := newAuthority(t)
	by := identity.Node{Org: "acme", Kind: identity.Policy, ID: "p-1"}
	signer, trust := ca.signer(t, by), ca.trust()
	node, gateway := identity.Node{Org: "acme", Kind: identity.Client, ID: "c-1"}, identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-1"}
	at := time.Now().UTC().Truncate(time.Second)
	grant := func(later time.Duration) *Grant {
		return &Grant{Org: "acme", Node: node, Gateway: gateway, Pins: []identity.KeyHash{{1}}, Issued: at.Add(later), NotAfter: at.Add(later + time.Hour)}
	}
	again := func(s *Signer, gr *Grant, kept Kept) (string, Kept, error) {
		untimed, err := Untimed(gr)
		if err != nil {
			t.Fatal(err)
		}
		b, kept, err := s.AppendGrant([]byte("before "), untimed[:20], untimed[20:], gr.Issued, gr.NotAfter, kept)
		jws, ok := strings.CutPrefix(string(b), "before ")
		if !ok {
			t.Errorf("%.20s", b)
		}
		return jws, kept, err
	}
	first, kept, err := again(signer, grant(0), Kept{})
	if err != nil {
		t.Fatal(err)
	}
	second, kept2, err := again(signer, grant(time.Minute), kept)
	if err != nil || second != first || kept2 != kept {
		t.Errorf("the same grant a minute later: %v\n%s\n%s", err, first, second)
	}
	if g, err := OpenGrant(second, trust, node); err != nil || !g.Issued.Equal(at) {
		t.Errorf("%+v, %v", g, err)
	}
	other := grant(time.Minute)
	other.Pins = append(other.Pins, identity.KeyHash{2})
	changed, _, err := again(signer, other, kept)
	if err != nil {
		t.Fatal(err)
	}
	if g, err := OpenGrant(changed, trust, node); err != nil || len(g.Pins) != 2 || !g.Issued.Equal(other.Issued) {
		t.Errorf("another grant: %+v, %v", g, err)
	}
	if anew, _, err := again(ca.signer(t, by), grant(0), kept); err != nil || anew == first {
		t.Errorf("another signer gives out what the first one signed: %v", err)
	}
}
