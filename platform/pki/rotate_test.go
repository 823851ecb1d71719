package pki

import (
	"crypto/x509"
	"testing"
	"time"

	"sallyway/internal/identity"
)

// TestRootsFollowOneAnother: a root that a known one signed is followed, through any number that were in between; nothing else is, and an
// intermediate makes no roots.
func TestRootsFollowOneAnother(t *testing.T) {
	o, stranger := newOrg("acme"), newOrg("acme")
	second := must(o.root.NextRoot("acme", 2, now))
	third := must(second.NextRoot("acme", 3, now))
	forged := must((&Authority{Certificate: o.cas[identity.Gateway].Certificate, Key: o.cas[identity.Gateway].Key}).NextRoot("acme", 2, now))
	renamed := must(stranger.root.NextRoot("acme", 2, now))
	list := func(as ...*Authority) (out []*x509.Certificate) {
		for _, a := range as {
			out = append(out, a.Certificate)
		}
		return out
	}
	for name, tc := range map[string]struct {
		known, shown, links []*x509.Certificate
		ok                  bool
	}{
		"the same":                          {list(o.root), list(o.root), nil, true},
		"the next":                          {list(o.root), list(second), nil, true},
		"both":                              {list(o.root), list(second, o.root), nil, true},
		"one later":                         {list(o.root), list(third), list(second), true},
		"one later, the link not told":      {list(o.root), list(third), nil, false},
		"the one before":                    {list(second), list(o.root), nil, false},
		"a stranger":                        {list(o.root), list(stranger.root), nil, false},
		"a stranger beside":                 {list(o.root), list(o.root, stranger.root), nil, false},
		"a stranger's next":                 {list(o.root), list(renamed), list(stranger.root), false},
		"made by an intermediate":           {list(o.root), list(forged), list(o.cas[identity.Gateway]), false},
		"an intermediate itself":            {list(o.root), list(o.cas[identity.Gateway]), nil, false},
		"made by an intermediate it knows?": {list(o.root, o.cas[identity.Gateway]), list(forged), nil, false},
	} {
		if err := identity.Succession(tc.known, tc.shown, tc.links); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	// As a root the next one is as good as one that is signed by itself.
	ca := &Authority{Key: newKey()}
	ca.Certificate = must(second.SignIntermediate("acme", identity.Gateway, 2, ca.Key.Public(), now, time.Hour))
	chain := []*x509.Certificate{must(ca.Leaf(o.node(identity.Gateway), newKey().Public(), now, time.Hour)), ca.Certificate}
	trust := &identity.Trust{Roots: list(o.root, second), Pins: []identity.KeyHash{identity.CertificateKeyHash(ca.Certificate)}}
	if _, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth); err != nil {
		t.Errorf("below the next root: %v", err)
	}
	trust.Roots = list(second)
	if _, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth); err != nil {
		t.Errorf("below the next root alone: %v", err)
	}
	trust.Roots = list(o.root)
	if _, err := trust.Verify(chain, x509.ExtKeyUsageServerAuth); err == nil {
		t.Error("below a root that is not known")
	}
}

// TestWhatAnOwnerSigns: requests and certificates are held to what they are for.
func TestWhatAnOwnerSigns(t *testing.T) {
	o, other := newOrg("acme"), newOrg("rival")
	key := newKey()
	csr := must(IntermediateRequest("acme", identity.Client, 2, key))
	pub := must(ParseIntermediateRequest(csr, "acme", identity.Client, 2))
	for name, err := range map[string]error{
		"another organization": func() error { _, err := ParseIntermediateRequest(csr, "rival", identity.Client, 2); return err }(),
		"another kind":         func() error { _, err := ParseIntermediateRequest(csr, "acme", identity.Gateway, 2); return err }(),
		"another generation":   func() error { _, err := ParseIntermediateRequest(csr, "acme", identity.Client, 3); return err }(),
		"noise":                func() error { _, err := ParseIntermediateRequest(csr[:40], "acme", identity.Client, 2); return err }(),
	} {
		if err == nil {
			t.Errorf("a request for %s passes", name)
		}
	}
	good := must(o.root.SignIntermediate("acme", identity.Client, 2, pub, now, time.Hour))
	check := func(c *x509.Certificate) error {
		return CheckIntermediate(c, o.root.Certificate, "acme", identity.Client, pub, now)
	}
	if err := check(good); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]*x509.Certificate{
		"another key":          must(o.root.SignIntermediate("acme", identity.Client, 2, newKey().Public(), now, time.Hour)),
		"another kind":         must(o.root.SignIntermediate("acme", identity.Gateway, 2, pub, now, time.Hour)),
		"another organization": must(o.root.SignIntermediate("rival", identity.Client, 2, pub, now, time.Hour)),
		"another root":         must(other.root.SignIntermediate("acme", identity.Client, 2, pub, now, time.Hour)),
		"the past":             must(o.root.SignIntermediate("acme", identity.Client, 2, pub, now.Add(-2*time.Hour), time.Hour)),
		"a root":               must(certify(must(caTemplate("acme", "x", now, time.Hour, 1)), o.root.Certificate, pub, o.root.Key)),
	} {
		if err := check(c); err == nil {
			t.Errorf("a certificate for %s passes", name)
		}
	}
	if err := CheckRoot(o.root.Certificate, "acme", nil, now); err != nil {
		t.Error(err)
	}
	second := must(o.root.NextRoot("acme", 2, now))
	if err := CheckRoot(second.Certificate, "acme", o.root.Certificate, now); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"of another organization":  CheckRoot(other.root.Certificate, "acme", nil, now),
		"an intermediate":          CheckRoot(good, "acme", o.root.Certificate, now),
		"signed by another":        CheckRoot(second.Certificate, "acme", other.root.Certificate, now),
		"not signed by itself":     CheckRoot(second.Certificate, "acme", nil, now),
		"the end of its life past": CheckRoot(o.root.Certificate, "acme", nil, now.Add(RootLife+time.Hour)),
	} {
		if err == nil {
			t.Errorf("a root that is %s passes", name)
		}
	}
}
