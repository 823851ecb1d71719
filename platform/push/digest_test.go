package push

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/store"
	"sallyway/platform/view"
	"sallyway/relay/wire"
)

// TestDigest: whatever changes what a node is told changes its digest, and what does not concern a node leaves its digest as it was.
func TestDigest(t *testing.T) {
	b := newBench(t, Config{})
	ctx, org := t.Context(), "default"
	nodes := map[string]identity.Node{}
	for kind, names := range map[identity.Kind][]string{identity.Relay: {"r1", "r2"}, identity.Gateway: {"g1", "g2", "g3"}, identity.Client: {"c1", "c2", "c3"}} {
		for _, name := range names {
			who, _, _ := b.join(kind, name)
			nodes[name] = who.Node
		}
	}
	tcp := []policy.PortRange{{First: 80, Last: 80}}
	resource := func(name string, gateways ...string) {
		t.Helper()
		_, err := b.reg.CreateResource(ctx, org, control.CreateResource{Name: name, Address: "10.0.0.1", TCP: tcp, Gateways: gateways})
		must(t, err)
	}
	resource("one", "g1")
	resource("two", "g1", "g2")
	resource("three", "g3")
	_, err := b.reg.PutGroup(ctx, org, "team", &[]string{"client:c1", "client:c2"}, true)
	must(t, err)
	for _, p := range []control.CreatePolicy{{Name: "p1", Subject: "group:team", Resource: "one"}, {Name: "p2", Subject: "client:c1", Resource: "two"}, {Name: "p3", Subject: "gateway:g2", Resource: "three"}} {
		_, err := b.reg.CreatePolicy(ctx, org, p)
		must(t, err)
	}
	must(t, b.reg.Store.Update(ctx, func(tx store.Tx) error {
		for _, g := range []string{"g1", "g2", "g3"} {
			if err := tx.PutAssignment(ctx, nodes[g].ID, []string{nodes["r1"].ID, nodes["r2"].ID}); err != nil {
				return err
			}
		}
		_, err := tx.BumpVersion(ctx, org, 0)
		return err
	}))
	must(t, b.reg.RotateRelayKeys(ctx, org, 0))

	type told struct {
		hash   [32]byte
		digest view.Sum
	}
	now := func() map[string]told {
		t.Helper()
		var v *view.View
		must(t, b.reg.Store.View(ctx, func(tx store.Tx) (err error) {
			v, err = view.Load(ctx, tx, b.reg.Seal, org, time.Now())
			return err
		}))
		out := map[string]told{}
		for name, n := range nodes {
			c := b.tell(v, n)
			d, there, err := v.Digest(n.ID, time.Time{})
			must(t, err)
			if (c == nil) == there {
				t.Fatalf("%s: a configuration or a digest, not both", name)
			}
			if c == nil {
				continue
			}
			out[name] = told{b.content(c), d}
		}
		return out
	}
	direct := func(change func(tx store.Tx) error) func() error {
		return func() error { return b.reg.Store.Update(ctx, change) }
	}
	node := func(name string, change func(n *store.Node)) func() error {
		return direct(func(tx store.Tx) error {
			n, err := tx.Node(ctx, nodes[name].ID)
			if err != nil {
				return err
			}
			change(n)
			return tx.UpdateNode(ctx, n)
		})
	}
	on, off := true, false
	keys := []string{"c1", "c2", "c3", "g1", "g2", "g3", "r1", "r2"}
	before := now()
	for _, step := range []struct {
		what  string
		do    func() error
		still string // some that it does not concern
	}{
		{"nothing but the version", direct(func(tx store.Tx) error { _, err := tx.BumpVersion(ctx, org, 0); return err }), "c1 c2 c3 g1 g2 g3 r1 r2"},
		{"a node was heard of", node("c1", func(n *store.Node) { n.LastSeen = time.Now() }), "c1 c2 c3 g1 g2 g3 r1 r2"},
		{"another policy", func() error {
			_, err := b.reg.CreatePolicy(ctx, org, control.CreatePolicy{Name: "p4", Subject: "client:c2", Resource: "three"})
			return err
		}, "c1 c3 g1 g2 r1 r2"},
		{"a policy is switched off", func() error {
			_, err := b.reg.UpdatePolicy(ctx, org, "p4", control.UpdatePolicy{Disabled: &on})
			return err
		}, "c1 c3 g1 g2"},
		{"a member leaves", func() error { _, err := b.reg.PutGroup(ctx, org, "team", &[]string{"client:c1"}, false); return err }, "c1 c3 g2 g3"},
		{"a resource has more ports", func() error {
			_, err := b.reg.UpdateResource(ctx, org, "two", control.UpdateResource{UDP: &tcp})
			return err
		}, "c2 c3 g3"},
		{"a resource moves to another gateway", func() error {
			_, err := b.reg.UpdateResource(ctx, org, "two", control.UpdateResource{Gateways: &[]string{"g3"}})
			return err
		}, "c2 c3"},
		{"a client has another name", node("c1", func(n *store.Node) { n.Name = "c1-new" }), "c2 c3 g2"},
		{"a client has another address", node("c1", func(n *store.Node) { n.Address += 1000 }), "c2 c3 g2"},
		{"a gateway has another name", node("g2", func(n *store.Node) { n.Name = "g2-new" }), "c2 c3"},
		{"a gateway is disabled", func() error { _, err := b.reg.DisableNode(ctx, org, identity.Gateway, "g2-new"); return err }, ""},
		{"a relay is elsewhere", node("r1", func(n *store.Node) { n.Host = "192.0.2.9" }), "c3"},
		{"a relay drains", node("r1", func(n *store.Node) { n.Draining = true }), "c1 c3 r2"},
		{"relays have new keys", func() error { return b.reg.RotateRelayKeys(ctx, org, 0) }, "c3"},
		{"other relays", direct(func(tx store.Tx) error { return tx.PutAssignment(ctx, nodes["g1"].ID, []string{nodes["r2"].ID}) }), "c3 r1 r2"},
		{"the last rung", direct(func(tx store.Tx) error {
			return tx.PutRelayRungs(ctx, &store.RelayRungs{Relay: nodes["r2"].ID, SSHPort: 22, TLSPort: 443})
		}), "c3 r1"},
		{"a client wishes for another order", direct(func(tx store.Tx) error {
			return tx.PutWishes(ctx, &store.Wishes{Node: nodes["c1"].ID, Prefer: []string{nodes["r2"].ID}})
		}), "c2 c3 g1 g2 g3 r1 r2"},
		{"a leaf was renewed", direct(func(tx store.Tx) error {
			all, err := tx.Keys(ctx, nodes["c1"].ID)
			if err != nil {
				return err
			}
			all[0].NotAfter = all[0].NotAfter.Add(time.Hour)
			return tx.PutKey(ctx, all[0])
		}), "c2 c3 g1 g2 g3 r1 r2"},
		{"sessions end", direct(func(tx store.Tx) error {
			return tx.PutSessionEnd(ctx, &store.SessionEnd{Org: org, Node: nodes["c1"].ID, Before: time.Now()})
		}), "c1 c2 c3 r1 r2"},
		{"direct paths", func() error {
			_, err := b.reg.UpdateOrg(ctx, org, control.UpdateOrganization{Direct: &off})
			return err
		}, "r1 r2"},
		{"a client is revoked", func() error { _, err := b.reg.RevokeNode(ctx, org, identity.Client, "c2"); return err }, ""},
		{"a policy is deleted", func() error { return b.reg.DeletePolicy(ctx, org, "p1") }, "c2 c3 g3"},
	} {
		must(t, step.do())
		after := now()
		var changed []string
		for _, name := range keys {
			old, is := before[name], after[name]
			if old.hash != is.hash {
				changed = append(changed, name)
			}
			if old.hash != is.hash && old.digest == is.digest {
				t.Errorf("%s: %s is told something else, and its digest is the same", step.what, name)
			}
			if slices.Contains(strings.Fields(step.still), name) && old.digest != is.digest {
				t.Errorf("%s: the digest of %s is another one", step.what, name)
			}
		}
		if len(changed) == 0 && step.what != "nothing but the version" && step.what != "a node was heard of" {
			t.Errorf("%s: nobody is told anything", step.what)
		}
		before = after
	}
}

// tell makes what a node is told; nil when the view does not have it. The text is what encoding/json makes of its content, relays have credentials that
// they take, and grants are for the node, its key and those relays.
func (b *bench) tell(v *view.View, node identity.Node) *control.Config {
	b.t.Helper()
	signer, err := b.reg.Signer(b.t.Context(), node.Org)
	must(b.t, err)
	line, err := v.AppendEvent([]byte("before "), node.ID, time.Time{}, view.Signing{Signer: signer, Now: time.Now(), Life: time.Hour})
	if err != nil {
		if !strings.Contains(err.Error(), "is not one of organization") {
			b.t.Error(err)
		}
		return nil
	}
	line, _ = bytes.CutPrefix(line, []byte("before "))
	var ev control.Event
	must(b.t, json.Unmarshal(line, &ev))
	same, err := json.Marshal(ev)
	must(b.t, err)
	if same = append(same, '\n'); !bytes.Equal(line, same) {
		b.t.Errorf("%v is told\n%s, which is not\n%s", node, line, same)
	}
	c := ev.Config
	if ev.Type != control.EventConfig || c.Node != node || c.Version != v.Org.Version || c.Trust.Roots != v.Trust.Roots {
		b.t.Errorf("%v is told %s", node, line)
	}
	if c.Dialling == nil {
		return c
	}
	as := node
	if as.Kind == identity.Gateway {
		as.Kind = identity.Site
	}
	trust, err := c.Trust.For(identity.Policy)
	must(b.t, err)
	var key identity.KeyHash // the newest that is good
	must(b.t, b.reg.Store.View(b.t.Context(), func(tx store.Tx) error {
		own, err := tx.Keys(b.t.Context(), node.ID)
		if i := slices.IndexFunc(own, func(k *store.Key) bool { return v.Speaks(node.ID, k.Hash) }); i >= 0 {
			key = own[i].Hash
		}
		return err
	}))
	for _, g := range c.Dialling.Gateways {
		b.credentials(v, as, g.Relays)
		grant, err := policy.OpenGrant(g.Grant, trust, as)
		must(b.t, err)
		var relays []identity.Node
		for _, r := range g.Relays {
			relays = append(relays, r.Node)
		}
		if grant.Node != as || grant.Key != key || grant.Gateway != g.Node || !slices.Equal(grant.Relays, relays) ||
			!slices.Equal(grant.Pins, c.Trust.Pins[identity.Gateway]) {
			b.t.Errorf("%v is granted %+v for %+v", node, grant, g)
		}
	}
	if c.Gateway != nil {
		b.credentials(v, node, c.Gateway.Relays)
	}
	return c
}

// credentials looks at a node's credentials for relays.
func (b *bench) credentials(v *view.View, as identity.Node, relays []control.RelayRef) {
	b.t.Helper()
	for _, r := range relays {
		var own []*store.Key
		var keys []control.RelayKey
		must(b.t, b.reg.Store.View(b.t.Context(), func(tx store.Tx) (err error) {
			if own, err = tx.Keys(b.t.Context(), as.ID); err == nil {
				keys, err = view.RelayKeys(b.t.Context(), tx, b.reg.Seal, r.Node.ID)
			}
			return err
		}))
		good := slices.ContainsFunc(own, func(k *store.Key) bool { return v.Speaks(as.ID, k.Hash) })
		if !good || len(keys) == 0 {
			if r.Username != "" || r.Password != "" {
				b.t.Errorf("%v has the credential %q although it has no key, or %v has none", as, r.Username, r.Node)
			}
			continue
		}
		u, err := wire.ParseUsername(r.Username)
		must(b.t, err)
		if u.Node != as || !u.Expiry.After(time.Now()) || r.Password != wire.Password(keys[0].Secret, r.Username) {
			b.t.Errorf("%v has the credential %+v at %v", as, u, r.Node)
		}
	}
}

// content is a hash over what a node is told without the version, signatures, and their times.
func (b *bench) content(c *control.Config) [sha256.Size]byte {
	b.t.Helper()
	trust, err := c.Trust.For(identity.Policy)
	must(b.t, err)
	documents := []any{}
	if c.Gateway != nil {
		s, err := policy.OpenSnapshot(c.Gateway.Snapshot, trust, c.Node)
		must(b.t, err)
		s.Version, s.Issued, s.NotAfter = 0, time.Time{}, time.Time{}
		c.Gateway.Snapshot = ""
		documents = append(documents, s)
	}
	if c.Dialling != nil {
		as := c.Node
		if as.Kind == identity.Gateway {
			as.Kind = identity.Site
		}
		for i, g := range c.Dialling.Gateways {
			grant, err := policy.OpenGrant(g.Grant, trust, as)
			must(b.t, err)
			grant.Issued, grant.NotAfter = time.Time{}, time.Time{}
			c.Dialling.Gateways[i].Grant = ""
			documents = append(documents, grant)
		}
	}
	c.Version = 0
	text, err := json.Marshal([]any{c, documents})
	must(b.t, err)
	return sha256.Sum256(text)
}

// TestDigestKnowsEverything fails when something new is told to nodes: view.AppendEvent has to say it, view.Digest to hash it, and TestDigest to change it.
func TestDigestKnowsEverything(t *testing.T) {
	for _, known := range []struct {
		v      any
		fields string
	}{
		{control.Config{}, "Version Node Name Trust Relay Gateway Dialling"},
		{control.Dialling{}, "Virtual Range Gateways Resources Direct"},
		{control.GatewayRef{}, "Node Name FQDN Virtual Relays Grant"},
		{policy.Snapshot{}, "Org Audience Version Issued NotAfter Peers Resource Rules Denied"},
		{policy.Peer{}, "Node Name Virtual"},
		// These are put together of pieces.
		{policy.Grant{}, "Org Node Key Gateway Relays Pins Issued NotAfter"},
		{control.Event{}, "Type Config Version"},
	} {
		typ := reflect.TypeOf(known.v)
		var fields []string
		for i := range typ.NumField() {
			fields = append(fields, typ.Field(i).Name)
		}
		if want := strings.Fields(known.fields); !slices.Equal(fields, want) {
			t.Errorf("%v has the fields %v, and view.Digest knows %v", typ, fields, want)
		}
	}
}
