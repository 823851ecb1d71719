package agent_test

import (
	"context"
	"crypto/x509"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent"
	"sallyway/internal/identity"
	"sallyway/platform"
	"sallyway/platform/pki"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// clock is a clock that tests turn, for the platform and its nodes together.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// startPlatformAt serves a platform by a clock until the test ends.
func startPlatformAt(t *testing.T, c *clock) *registry.Registry {
	t.Helper()
	srv, err := platform.Open(t.Context(), platform.Config{Data: t.TempDir(), Listen: "127.0.0.1:0", Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("platform: %v", err)
		}
	})
	return srv.Registry()
}

// startNodeAt runs a node by a clock until stop.
func startNodeAt(t *testing.T, c *clock, dir, token string, kind identity.Kind) *node {
	t.Helper()
	log := new(safeBuffer)
	a, err := agent.Open(t.Context(), agent.Config{
		StateDir: dir, Kind: kind, Token: token, Version: "v1", EnrolTimeout: 5 * time.Second, Now: c.now,
		Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	n := &node{Agent: a, log: log, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("agent: %v", err)
		}
	})}
	t.Cleanup(func() {
		n.stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", n.Name(), log)
		}
	})
	return n
}

// TestSleptThroughRotations: a node whose leaf has ended, and whose root was followed by another and that by a third, shows its key, gets the
// new roots and pins and a leaf, and follows because each root signed the next. What it knew counts no more.
func TestSleptThroughRotations(t *testing.T) {
	c := new(clock)
	reg := startPlatformAt(t, c)
	made, err := reg.CreateNode(t.Context(), "default", identity.Gateway, control.CreateNode{Name: "office"})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	n := startNodeAt(t, c, dir, made.Token, identity.Gateway)
	eventually(t, "it has its configuration", func() bool { return n.Config() != nil })
	before := chain(t, n.Agent)
	n.stop()
	for range 2 {
		if _, err := reg.Rotate(t.Context(), "default", control.RotateAuthority{Kind: "root"}); err != nil {
			t.Fatal(err)
		}
		for range 4 {
			c.advance(control.LeafLife + time.Hour)
			if _, err := reg.AdvanceAuthorities(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	as, err := reg.Authorities(t.Context(), "default")
	if err != nil {
		t.Fatal(err)
	}
	current := map[string]string{}
	for _, a := range as {
		switch {
		case a.State == control.AuthorityCurrent:
			current[a.Kind] = a.Key
			if a.Kind != control.AuthoritySSH && a.Generation != 3 {
				t.Errorf("%s CA is of generation %d", a.Kind, a.Generation)
			}
		case a.State != control.AuthorityGone:
			t.Errorf("%s CA %d is %s", a.Kind, a.Generation, a.State)
		}
	}

	n = startNodeAt(t, c, dir, "", identity.Gateway)
	eventually(t, "it is connected, and has a leaf by the newest CA", func() bool {
		cert, err := n.Certificate()
		return n.Status().Connected && err == nil && len(cert.Certificate) == 2 && keyOf(t, cert.Certificate[1]) == current["gateway"]
	})
	var tr *identity.Trust
	eventually(t, "it trusts the newest root alone, and has policies", func() bool {
		st := n.Status()
		tr, err = n.Trust(identity.Gateway)
		return err == nil && len(tr.Roots) == 1 && identity.CertificateKeyHash(tr.Roots[0]).String() == current["root"] && st.ConfigError == "" && st.SnapshotError == ""
	})
	if _, err := tr.Verify(chain(t, n.Agent), x509.ExtKeyUsageServerAuth); err != nil {
		t.Errorf("its own new leaf: %v", err)
	}
	tr.Now = time.Now
	if _, err := tr.Verify(before, x509.ExtKeyUsageServerAuth); err == nil {
		t.Error("a leaf of before passes")
	}
	// What it follows now is on disk: without what it has cached it still knows the newest root alone.
	n.stop()
	n = startNodeAt(t, c, dir, "", identity.Gateway)
	eventually(t, "it starts again", func() bool { return n.Status().Connected && n.Status().ConfigError == "" })
}

func keyOf(t *testing.T, der []byte) string {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return identity.CertificateKeyHash(c).String()
}

// offline makes an organization whose root this test keeps.
func offline(t *testing.T, reg *registry.Registry, c *clock, org string) *pki.Authority {
	t.Helper()
	root, err := pki.NewRoot(org, c.now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := reg.CreateOrg(t.Context(), control.CreateOrganization{Name: org, Root: string(identity.EncodeCertificates(root.Certificate))}); err != nil {
		t.Fatal(err)
	}
	return root
}

// sign signs what is asked for, as the owner does.
func sign(t *testing.T, reg *registry.Registry, c *clock, org string, root *pki.Authority) error {
	t.Helper()
	as, err := reg.Authorities(t.Context(), org)
	if err != nil {
		t.Fatal(err)
	}
	var out control.SignedAuthorities
	for _, a := range as {
		if a.State != control.AuthorityRequested {
			continue
		}
		pub, err := pki.ParseIntermediateRequest([]byte(a.Request), org, identity.Kind(a.Kind), a.Generation)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := root.SignIntermediate(org, identity.Kind(a.Kind), a.Generation, pub, c.now(), 90*24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		out.Certificates = append(out.Certificates, string(identity.EncodeCertificates(cert)))
	}
	_, err = reg.SignAuthorities(t.Context(), org, out)
	return err
}

// withRoot is a token as the owner hands it on.
func withRoot(t *testing.T, token string, root *pki.Authority) string {
	t.Helper()
	tok, err := control.ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	tok.Root = identity.CertificateKeyHash(root.Certificate).String()
	return tok.String()
}

// TestHostilePlatform: the root of an organization is its owner's. A platform that makes up a root, an intermediate or a policy key is refused
// by nodes that are enrolled and by those that enrol with a token from the owner; and what the owner signs is followed.
func TestHostilePlatform(t *testing.T) {
	const org = "acme"
	c := new(clock)
	reg := startPlatformAt(t, c)
	root := offline(t, reg, c, org)
	create := func(name string) string {
		t.Helper()
		n, err := reg.CreateNode(t.Context(), org, identity.Gateway, control.CreateNode{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		return n.Token
	}
	first := create("office")
	if _, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: first, EnrolTimeout: time.Second, Now: c.now}); err == nil || !strings.Contains(err.Error(), "has not signed") {
		t.Fatalf("before the owner signed: %v", err)
	}
	stranger, err := pki.NewRoot(org, c.now())
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(t, reg, c, org, stranger); err == nil {
		t.Fatal("the platform takes certificates by another root")
	}
	if err := sign(t, reg, c, org, root); err != nil {
		t.Fatal(err)
	}
	n := startNodeAt(t, c, t.TempDir(), withRoot(t, first, root), identity.Gateway)
	eventually(t, "it has policies", func() bool { _, err := n.SnapshotProblem(); return err == nil && n.Config() != nil })
	good := n.Config().Trust

	// attack changes CAs behind the registry's back, and has nodes told.
	attack := func(change func(a *store.Authority)) (undo func()) {
		t.Helper()
		var was []store.Authority
		put := func(fn func(tx *registry.Change) error) {
			t.Helper()
			if err := reg.Transact(t.Context(), func(tx *registry.Change) error {
				if err := fn(tx); err != nil {
					return err
				}
				return tx.Bump(t.Context(), org)
			}); err != nil {
				t.Fatal(err)
			}
		}
		put(func(tx *registry.Change) error {
			was = nil
			as, err := tx.Authorities(t.Context(), org)
			if err != nil {
				return err
			}
			for _, a := range as {
				was = append(was, *a)
				change(a)
				if err := tx.UpdateAuthority(t.Context(), a); err != nil {
					return err
				}
			}
			return nil
		})
		return func() {
			put(func(tx *registry.Change) error {
				for _, a := range was {
					if err := tx.UpdateAuthority(t.Context(), &a); err != nil {
						return err
					}
				}
				return nil
			})
			eventually(t, "it is well again", func() bool {
				_, err := n.SnapshotProblem()
				return err == nil && n.Status().ConfigError == "" && n.Config().Trust.Roots == good.Roots
			})
		}
	}
	ca := func(by *pki.Authority, k identity.Kind) *pki.Authority {
		key, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := by.SignIntermediate(org, k, 1, key.Public(), c.now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return &pki.Authority{Certificate: cert, Key: key}
	}
	replace := func(a *store.Authority, with *pki.Authority) {
		key, err := identity.EncodeKey(with.Key)
		if err != nil {
			t.Fatal(err)
		}
		a.Certificate, a.Key = with.Certificate.Raw, reg.Seal.Seal("authority/acme/"+a.Kind+"/1", key)
	}

	t.Run("a root of its own", func(t *testing.T) {
		undo := attack(func(a *store.Authority) {
			if a.Kind == pki.KindRoot {
				a.Certificate = stranger.Certificate.Raw
			} else if k := identity.Kind(a.Kind); k.Valid() {
				replace(a, ca(stranger, k))
			}
		})
		defer undo()
		eventually(t, "the configuration is refused", func() bool { return strings.Contains(n.Status().ConfigError, "names the root") })
		if n.Config().Trust.Roots != good.Roots {
			t.Error("the roots changed")
		}
		_, err := agent.Open(t.Context(), agent.Config{StateDir: t.TempDir(), Kind: identity.Gateway, Token: withRoot(t, create("branch"), root), EnrolTimeout: 5 * time.Second, Now: c.now})
		if err == nil || !strings.Contains(err.Error(), "organization's owner") {
			t.Errorf("a node enrols with a token from the owner at a platform with another root: %v", err)
		}
	})
	t.Run("a root by one of its intermediates", func(t *testing.T) {
		var inter *pki.Authority
		if err := reg.Store.View(t.Context(), func(tx store.Tx) (err error) {
			inter, err = reg.Authority(t.Context(), tx, org, string(identity.Gateway))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		fake, err := inter.NextRoot(org, 1, c.now())
		if err != nil {
			t.Fatal(err)
		}
		undo := attack(func(a *store.Authority) {
			if a.Kind == pki.KindRoot {
				a.Certificate = fake.Certificate.Raw
			}
		})
		defer undo()
		eventually(t, "the configuration is refused", func() bool { return strings.Contains(n.Status().ConfigError, "names the root") })
	})
	t.Run("an intermediate of its own", func(t *testing.T) {
		fake := ca(stranger, identity.Client)
		undo := attack(func(a *store.Authority) {
			if a.Kind == string(identity.Client) {
				replace(a, fake)
			}
		})
		defer undo()
		pin := identity.CertificateKeyHash(fake.Certificate)
		eventually(t, "it is told to pin it", func() bool { return n.Config().Trust.Pins[identity.Client][0] == pin })
		key, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := fake.Leaf(identity.Node{Org: org, Kind: identity.Client, ID: "c-1"}, key.Public(), c.now(), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		tr, err := n.Trust(identity.Client)
		if err != nil {
			t.Fatal(err)
		}
		if who, err := tr.Verify([]*x509.Certificate{leaf, fake.Certificate}, x509.ExtKeyUsageClientAuth); err == nil {
			t.Errorf("a client by a made-up CA is let in as %v", who)
		}
	})
	t.Run("a policy key of its own", func(t *testing.T) {
		before, err := n.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		undo := attack(func(a *store.Authority) {
			if a.Kind == string(identity.Policy) {
				replace(a, ca(stranger, identity.Policy))
			}
		})
		defer undo()
		eventually(t, "its policies are refused", func() bool { return n.Status().SnapshotError != "" })
		if s, err := n.Snapshot(); err != nil || s.Version != before.Version {
			t.Errorf("snapshot %+v, %v", s, err)
		}
	})
	t.Run("what the owner signs is followed", func(t *testing.T) {
		next, err := root.NextRoot(org, 2, c.now())
		if err != nil {
			t.Fatal(err)
		}
		pem := string(identity.EncodeCertificates(next.Certificate))
		if _, err := reg.Rotate(t.Context(), org, control.RotateAuthority{Kind: "root"}); err == nil {
			t.Error("the platform made a root of its own for an organization whose root is offline")
		}
		if _, err := reg.Rotate(t.Context(), org, control.RotateAuthority{Kind: "root", Root: string(identity.EncodeCertificates(stranger.Certificate))}); err == nil {
			t.Error("the platform takes a root that the one before did not sign")
		}
		if _, err := reg.Rotate(t.Context(), org, control.RotateAuthority{Kind: "root", Root: pem}); err != nil {
			t.Fatal(err)
		}
		if err := sign(t, reg, c, org, next); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it trusts both", func() bool { tr, err := n.Trust(identity.Client); return err == nil && len(tr.Roots) == 2 })
		for _, finish := range []string{"the next ones issue", "the former ones are gone"} {
			n.HeartbeatNow()
			if _, err := reg.Rotate(t.Context(), org, control.RotateAuthority{Kind: "root", Action: control.RotationFinish}); err != nil {
				t.Fatal(finish, err)
			}
		}
		eventually(t, "it trusts the new one alone, and has policies under it", func() bool {
			tr, err := n.Trust(identity.Client)
			_, problem := n.SnapshotProblem()
			return err == nil && problem == nil && len(tr.Roots) == 1 && tr.Roots[0].Equal(next.Certificate)
		})
		// With a token that names the root of before, a new node follows to the present one.
		b := startNodeAt(t, c, t.TempDir(), withRoot(t, create("late"), root), identity.Gateway)
		eventually(t, "it enrols", func() bool { return b.Status().Connected && b.Config() != nil })
	})
}
