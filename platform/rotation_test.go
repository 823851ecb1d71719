package platform

import (
	"crypto/x509"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// at logs a node in by the clock of a test.
func (n *node) loginAt(c *clock) {
	n.l.t.Helper()
	token, p := n.exchange(n.assertion(func(k *jwt.Claims) {
		k.IssuedAt, k.Expiry = jwt.NewNumericDate(c.now()), jwt.NewNumericDate(c.now().Add(time.Minute))
	}))
	if token == "" {
		n.l.t.Fatalf("access token of %s: %+v", n.name, p)
	}
	n.bearer = token
}

// renew returns the chains of fresh leaves.
func (n *node) renewAt(c *clock) (leaf, site []*x509.Certificate) {
	n.l.t.Helper()
	n.loginAt(c)
	req := n.request()
	var out control.RenewResponse
	if status, p := n.l.do(n.bearer, "POST", "/api/v1/node/renew", control.RenewRequest{CSR: req.CSR, SiteCSR: req.SiteCSR}, &out); status != 200 {
		n.l.t.Fatalf("renew %s: %d %+v", n.name, status, p)
	}
	leaf, err := identity.DecodeCertificates([]byte(out.Certificates.Leaf))
	must(n.l.t, err)
	if out.Certificates.Site != "" {
		site, err = identity.DecodeCertificates([]byte(out.Certificates.Site))
		must(n.l.t, err)
	}
	return leaf, site
}

// authorities are the CAs of the organization default in a state, by kind.
func (l *lab) authorities(state control.AuthorityState) map[string]control.AuthorityRecord {
	l.t.Helper()
	var all control.List[control.AuthorityRecord]
	l.api("GET", "/authorities", nil, &all)
	out := map[string]control.AuthorityRecord{}
	for _, a := range all.Items {
		if a.State == state {
			out[a.Kind] = a
		}
	}
	return out
}

func (l *lab) advanceAuthorities() {
	l.t.Helper()
	_, err := l.srv.Registry().AdvanceAuthorities(l.t.Context())
	must(l.t, err)
}

func roots(t *testing.T, c *control.Config) int {
	t.Helper()
	r, err := identity.DecodeCertificates([]byte(c.Trust.Roots))
	must(t, err)
	return len(r)
}

// TestRotation: a root and every CA below it are followed by new ones. Nobody refuses anybody at any time, no step is taken before every node
// has heard, and in the end what the former ones issued counts no more.
func TestRotation(t *testing.T) {
	t.Parallel()
	c := new(clock)
	w := populate(t, start(t, func(cfg *Config) { cfg.Now = c.now }))
	nodes := []*node{w.gateway, w.client, w.relays[0], w.relays[1]}
	feeds := map[*node]*feed{}
	for _, n := range nodes {
		feeds[n] = n.stream()
		feeds[n].wait("its configuration", func(*control.Config) bool { return true })
	}
	before := w.authorities(control.AuthorityCurrent)
	oldGateway, oldSite := w.gateway.renewAt(c)
	oldClient, _ := w.client.renewAt(c)

	var plan control.RotationPlan
	w.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "root", Plan: true}, &plan)
	if len(plan.Unheard) != len(nodes) || len(plan.Steps) < 4 || len(w.authorities(control.AuthorityNext)) != 0 {
		t.Fatalf("a plan: %+v, next %v", plan, w.authorities(control.AuthorityNext))
	}
	w.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "root"}, &plan)
	both := func(cfg *control.Config) bool {
		return roots(t, cfg) == 2 && len(cfg.Trust.Pins[identity.Gateway]) == 2
	}
	for _, n := range nodes {
		cfg := feeds[n].wait("two roots, and two pins of each kind", both)
		for _, k := range identity.Kinds {
			if len(cfg.Trust.Pins[k]) != 2 {
				t.Errorf("%s: %d pins of %s", n.name, len(cfg.Trust.Pins[k]), k)
			}
		}
		known, err := identity.DecodeCertificates([]byte(n.enrol.Trust.Roots))
		must(t, err)
		shown, err := identity.DecodeCertificates([]byte(cfg.Trust.Roots))
		must(t, err)
		if err := identity.Succession(known, shown, nil); err != nil {
			t.Errorf("%s would not follow: %v", n.name, err)
		}
	}
	if status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs/default/authorities:rotate", control.RotateAuthority{Kind: "gateway"}, nil); status != 409 || p.Remedy == "" {
		t.Errorf("a second rotation beside the first: %d %+v", status, p)
	}

	// All but one have heard.
	for _, n := range nodes[:3] {
		n.loginAt(c)
		n.beat(control.Heartbeat{ConfigVersion: feeds[n].last.Version})
	}
	nodes[3].loginAt(c)
	nodes[3].beat(control.Heartbeat{ConfigVersion: feeds[nodes[3]].last.Version - 1})
	w.advanceAuthorities()
	w.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "root", Plan: true}, &plan)
	if len(plan.Unheard) != 1 || plan.Unheard[0].Node != nodes[3].id {
		t.Errorf("who has not heard: %+v", plan.Unheard)
	}
	if leaf, _ := w.client.renewAt(c); identity.CertificateKeyHash(leaf[1]).String() != before["client"].Key {
		t.Error("the next CA issues while a node has not heard of it")
	}
	nodes[3].beat(control.Heartbeat{ConfigVersion: feeds[nodes[3]].last.Version})
	w.advanceAuthorities()
	after := w.authorities(control.AuthorityCurrent)
	for kind, a := range before {
		if kind != "ssh" && (after[kind].Key == a.Key || after[kind].Generation != 2) {
			t.Errorf("%s: %+v after %+v", kind, after[kind], a)
		}
		if kind != "ssh" && kind != "root" && after[kind].Issuer != after["root"].Key {
			t.Errorf("the %s CA is not by the new root", kind)
		}
	}

	newGateway, newSite := w.gateway.renewAt(c)
	newClient, _ := w.client.renewAt(c)
	trust := func(n *node, kinds ...identity.Kind) *identity.Trust {
		tr, err := feeds[n].last.Trust.For(kinds...)
		must(t, err)
		tr.Now = c.now
		return tr
	}
	for what, chain := range map[string][]*x509.Certificate{"old": oldGateway, "new": newGateway} {
		if _, err := trust(w.client, identity.Gateway).Verify(chain, x509.ExtKeyUsageServerAuth); err != nil {
			t.Errorf("the client refuses the gateway's %s leaf: %v", what, err)
		}
	}
	for what, chain := range map[string][]*x509.Certificate{"client's old": oldClient, "client's new": newClient, "site's old": oldSite, "site's new": newSite} {
		if _, err := trust(w.gateway, identity.Client, identity.Site).Verify(chain, x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("the gateway refuses the %s leaf: %v", what, err)
		}
	}
	// The next documents are signed under the new policy CA, and are read by who knows both.
	w.api("POST", "/resources", control.CreateResource{Name: "more", Gateways: []string{"gw"}, Address: "10.9.0.3", ICMP: true}, nil)
	signed := feeds[w.gateway].wait("a snapshot by the new policy CA", func(cfg *control.Config) bool {
		pins := []identity.KeyHash{}
		for _, p := range cfg.Trust.Pins[identity.Policy] {
			if p.String() == after["policy"].Key {
				pins = append(pins, p)
			}
		}
		tr, err := cfg.Trust.For()
		must(t, err)
		tr.Pins, tr.Now = pins, c.now
		_, err = policy.OpenSnapshot(cfg.Gateway.Snapshot, tr, w.gateway.id)
		return err == nil
	})
	if !both(signed) {
		t.Error("the former pins are gone at once")
	}

	// Everybody renews within the life of a leaf; then the former ones are gone.
	c.advance(control.LeafLife / 2)
	w.advanceAuthorities()
	if len(w.authorities(control.AuthorityRetiring)) == 0 {
		t.Fatal("the former CAs are gone while leaves by them live")
	}
	for _, n := range nodes {
		n.renewAt(c)
	}
	c.advance(control.LeafLife/2 + 20*time.Minute)
	w.advanceAuthorities()
	w.advanceAuthorities()
	if left := w.authorities(control.AuthorityRetiring); len(left) != 0 {
		t.Fatalf("still there: %v", left)
	}
	cfg := feeds[w.client].wait("one root", func(cfg *control.Config) bool {
		return roots(t, cfg) == 1 && len(cfg.Trust.Pins[identity.Gateway]) == 1
	})
	if tr := trust(w.client, identity.Gateway); true {
		tr.Now = time.Now // the old leaf is valid by its own times
		if _, err := tr.Verify(oldGateway, x509.ExtKeyUsageServerAuth); err == nil {
			t.Error("a leaf by the former CA passes after its end")
		}
	}
	fresh, _ := w.gateway.renewAt(c)
	if _, err := trust(w.client, identity.Gateway).Verify(fresh, x509.ExtKeyUsageServerAuth); err != nil {
		t.Errorf("a fresh leaf: %v", err)
	}
	if err := func() error {
		known, err := identity.DecodeCertificates([]byte(w.client.enrol.Trust.Roots))
		must(t, err)
		shown, err := identity.DecodeCertificates([]byte(cfg.Trust.Roots))
		must(t, err)
		return identity.Succession(known, shown, nil)
	}(); err != nil {
		t.Errorf("a node that slept through it would not follow: %v", err)
	}
	must(t, w.srv.Registry().Store.View(t.Context(), func(tx store.Tx) error {
		as, err := tx.Authorities(t.Context(), "default")
		for _, a := range as {
			if (a.State == store.Gone) != (len(a.Key) == 0) {
				t.Errorf("%s CA %d is %s, and its key has %d bytes", a.Kind, a.Generation, a.State, len(a.Key))
			}
		}
		return err
	}))
	for _, action := range []string{"authority.rotate", "authority.current", "authority.gone"} {
		if !slices.ContainsFunc(w.auditDirect("default"), func(e control.AuditEntry) bool { return e.Action == action && strings.HasPrefix(e.Object, "root") }) {
			t.Errorf("no audit entry %s for the root", action)
		}
	}
}

// TestRotationWaitsForNobodyForever: a node that is away is waited for until its leaf has ended, an old one that acknowledges nothing until
// leaf and documents have.
func TestRotationWaitsForNobodyForever(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	g := l.create(identity.Gateway, "gw").join()
	l.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "client"}, nil)
	c.advance(control.LeafLife - time.Minute)
	l.advanceAuthorities()
	if _, waits := l.authorities(control.AuthorityNext)["client"]; !waits {
		t.Fatal("it did not wait for a node with a good leaf")
	}
	g.renewAt(c) // of an older release: it renews, and acknowledges nothing
	c.advance(control.LeafLife - time.Minute)
	l.advanceAuthorities()
	if _, waits := l.authorities(control.AuthorityNext)["client"]; !waits {
		t.Fatal("it did not wait for a node that renewed")
	}
	c.advance(3 * time.Minute)
	l.advanceAuthorities()
	if _, waits := l.authorities(control.AuthorityNext)["client"]; waits {
		t.Error("it waits for a node for ever")
	}
}

// TestRotationOfSSH: both SSH CAs are told to relays and nodes while either has certificates out; abort and finish do what they say.
func TestRotationOfSSH(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	r := l.create(identity.Relay, "relay-1").join()
	f := r.stream()
	cas := func(n int) func(*control.Config) bool {
		return func(cfg *control.Config) bool { return len(cfg.Relay.Orgs[0].SSHCAs) == n }
	}
	f.wait("one SSH CA", cas(1))
	l.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "ssh"}, nil)
	f.wait("two SSH CAs", cas(2))
	l.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "ssh", Action: control.RotationAbort}, nil)
	f.wait("the next one taken back", cas(1))
	l.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "ssh"}, nil)
	f.wait("two SSH CAs again", cas(2))
	l.api("POST", "/authorities:rotate", control.RotateAuthority{Kind: "ssh", Action: control.RotationFinish}, nil)
	if a := l.authorities(control.AuthorityCurrent)["ssh"]; a.Generation != 3 {
		t.Errorf("finish: %+v", a)
	}
	if status, _ := l.do(l.admin.Token, "POST", "/api/v1/orgs/default/authorities:rotate", control.RotateAuthority{Kind: "ssh", Action: control.RotationAbort}, nil); status != 409 {
		t.Errorf("one that issues is taken back: %d", status)
	}
	c.advance(control.LeafLife + time.Hour)
	l.advanceAuthorities()
	f.wait("the former one gone", cas(1))
}

// TestRotationOfSharedRelays: the CA of relays that organizations share is pinned by nodes of every organization, so all of them are waited for.
func TestRotationOfSharedRelays(t *testing.T) {
	t.Parallel()
	c := new(clock)
	l := start(t, func(cfg *Config) { cfg.Now = c.now })
	var made control.CreatedNode
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/shared/relays", control.CreateNode{Name: "eu-1", Host: "eu-1.example"}, &made); status != 201 {
		t.Fatalf("%d %+v", status, p)
	}
	r := l.fromToken(made.Token).join()
	r.beat(control.Heartbeat{})
	g := l.create(identity.Gateway, "gw").join()
	f := g.stream()
	pins := func(n int) func(*control.Config) bool {
		return func(cfg *control.Config) bool {
			return len(cfg.Gateway.Relays) == 1 && cfg.Gateway.Relays[0].Node == r.id && len(cfg.Gateway.Relays[0].Pins) == n
		}
	}
	f.wait("the shared relay", pins(1))
	var plan control.RotationPlan
	rotate := func(req control.RotateAuthority) {
		t.Helper()
		if status, p := l.do(l.admin.Token, "POST", "/api/v1/shared/authorities:rotate", req, &plan); status != 200 {
			t.Fatalf("%d %+v", status, p)
		}
	}
	rotate(control.RotateAuthority{Kind: "relay"})
	f.wait("two pins of the shared relay", pins(2))
	r.beat(control.Heartbeat{ConfigVersion: 1 << 60})
	l.advanceAuthorities()
	rotate(control.RotateAuthority{Kind: "relay", Plan: true})
	if len(plan.Unheard) != 1 || plan.Unheard[0].Node != g.id {
		t.Errorf("who has not heard: %+v", plan.Unheard)
	}
	g.beat(control.Heartbeat{ConfigVersion: f.last.Version})
	l.advanceAuthorities()
	before := r.enrol.Certificates.Leaf
	if leaf, _ := r.renewAt(c); strings.Contains(before, string(identity.EncodeCertificates(leaf[1]))) {
		t.Error("the new CA does not issue")
	}
	if status, _ := l.do(l.admin.Token, "GET", "/api/v1/orgs/platform.shared/authorities", nil, nil); status != 404 {
		t.Errorf("the platform's own CAs under the name of an organization: %d", status)
	}
}

// TestRotationAtOnce: of many who start a rotation one does, and of many who take a step one does.
func TestRotationAtOnce(t *testing.T) {
	t.Parallel()
	l := start(t)
	reg := l.srv.Registry()
	const many = 16
	var started atomic.Int32
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			_, err := reg.Rotate(t.Context(), "default", control.RotateAuthority{Kind: "root"})
			switch code := registry.Code(err); {
			case err == nil:
				started.Add(1)
			case code != control.CodeConflict:
				t.Errorf("refused with %q: %v", code, err)
			}
		})
	}
	wg.Wait()
	if n := started.Load(); n != 1 {
		t.Errorf("%d rotations began", n)
	}
	for range many {
		wg.Go(func() {
			if _, err := reg.AdvanceAuthorities(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	count := map[string]int{}
	for _, e := range l.auditDirect("default") {
		count[e.Action+" "+e.Object]++
	}
	for _, kind := range []string{"root", "gateway", "policy"} {
		if got := count["authority.rotate "+kind+" CA 2"] + count["authority.current "+kind+" CA 2"]; got != 2 {
			t.Errorf("%s: %d steps in the audit, want 2: %v", kind, got, count)
		}
	}
	current := 0
	must(t, reg.Store.View(t.Context(), func(tx store.Tx) error {
		current = 0
		as, err := tx.Authorities(t.Context(), "default")
		for _, a := range as {
			if a.State == store.Current {
				current++
			}
		}
		return err
	}))
	if current != 8 {
		t.Errorf("%d CAs issue, want one of each of eight kinds", current)
	}
}
