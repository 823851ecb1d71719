package platform

import (
	"context"
	"crypto/x509"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/relay/wire"
)

// quiet fails when a configuration arrives within a while in which one would have come.
func (f *feed) quiet(what string) {
	f.t.Helper()
	deadline := time.After(500 * time.Millisecond)
	for {
		select {
		case ev, ok := <-f.events:
			if !ok {
				f.t.Fatalf("stream ended: %s", what)
			}
			if ev.Type == control.EventConfig {
				f.t.Errorf("pushed although nothing concerns %s: %s", f.node.name, what)
			}
		case <-deadline:
			return
		}
	}
}

// settled waits until the node has what populate made and pushes have stopped.
func (f *feed) settled() *feed {
	f.t.Helper()
	f.wait("two relays", func(c *control.Config) bool {
		if c.Gateway != nil {
			return len(c.Gateway.Relays) == 2
		}
		return len(c.Dialling.Gateways) > 0 && len(c.Dialling.Gateways[0].Relays) == 2
	})
	return f
}

func TestChangesArePushed(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	gw, cl := w.gateway.stream().settled(), w.client.stream().settled()
	rules := func(n int) func(*control.Config) bool {
		return func(c *control.Config) bool { return len(w.gateway.snapshot(c).Rules) == n }
	}
	reach := func(n int) func(*control.Config) bool {
		return func(c *control.Config) bool { return len(c.Dialling.Resources) == n }
	}
	for _, step := range []struct {
		what         string
		method, path string
		body         any
		rules, reach int
	}{
		{"policy disabled", "PATCH", "/policies/client-laptop-web", control.UpdatePolicy{Disabled: ptr(true)}, 0, 0},
		{"policy enabled", "PATCH", "/policies/client-laptop-web", control.UpdatePolicy{Disabled: ptr(false)}, 1, 1},
		{"resource disabled", "PATCH", "/resources/web", control.UpdateResource{Disabled: ptr(true)}, 0, 0},
		{"resource enabled", "PATCH", "/resources/web", control.UpdateResource{Disabled: ptr(false)}, 1, 1},
		{"policy deleted", "DELETE", "/policies/client-laptop-web", nil, 0, 0},
	} {
		before := time.Now()
		w.api(step.method, step.path, step.body, nil)
		gw.wait(step.what, rules(step.rules))
		cl.wait(step.what, reach(step.reach))
		if d := time.Since(before); d > time.Second {
			t.Errorf("%s took %v", step.what, d)
		}
	}
	// Groups: an empty one allows nobody, membership pushes.
	w.api("POST", "/groups", control.CreateGroup{Name: "staff"}, nil)
	w.api("POST", "/policies", control.CreatePolicy{Name: "staff-web", Subject: "group:staff", Resource: "web"}, nil)
	cl.quiet("a policy for an empty group")
	w.api("PATCH", "/groups/staff", control.UpdateGroup{Members: &[]string{"client:laptop"}}, nil)
	cl.wait("a member of the group", reach(1))
	w.api("DELETE", "/groups/staff", nil, nil)
	cl.wait("the group is gone", reach(0))
}

func ptr[T any](v T) *T { return &v }

func TestNothingIsPushedWithoutNeed(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	w.create(identity.Gateway, "gw2").join()
	cl := w.client.stream().settled()
	version := cl.last.Version
	w.api("POST", "/resources", control.CreateResource{Name: "other", Gateways: []string{"gw2"}, Address: "10.1.0.0/16", TCP: []policy.PortRange{policy.AllPorts}}, nil)
	w.api("POST", "/clients", control.CreateNode{Name: "somebody"}, nil)
	cl.quiet("another gateway's resource and another client")
	w.api("PATCH", "/resources/web", control.UpdateResource{Name: ptr("intranet")}, nil)
	c := cl.wait("the new name", func(c *control.Config) bool { return c.Dialling.Resources[0].Name == "intranet" })
	if c.Version <= version {
		t.Errorf("version %d after %d", c.Version, version)
	}
}

func TestRevocationReachesEverybody(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"disable", "revoke", "delete"} {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			w := populate(t, start(t))
			gw, relay := w.gateway.stream().settled(), w.relays[0].stream()
			relay.wait("its configuration", always)
			bystander := w.create(identity.Client, "bystander").join()
			by := bystander.stream()
			by.wait("its configuration", always)
			cl := w.client.stream()
			cl.wait("its configuration", always)
			key := identity.HashKey(w.client.key.Public())

			before := time.Now()
			code := control.CodeNodeDisabled
			switch verb {
			case "delete":
				w.api("DELETE", "/clients/laptop", nil, nil)
				code = control.CodeNodeUnknown
			case "revoke":
				code = control.CodeNodeRevoked
				fallthrough
			default:
				w.api("POST", "/clients/laptop/"+verb, nil, nil)
			}
			denied := func(c *control.Config) bool { return slices.Contains(c.Trust.Denied, key) }
			c := gw.wait("the key denied", denied)
			s := w.gateway.snapshot(c)
			if !slices.Contains(s.Denied, key) {
				t.Error("the signed snapshot does not deny the key")
			}
			if _, known := s.Peer(w.client.id); known {
				t.Error("the client still is a peer")
			}
			by.wait("the key denied", denied)
			relay.wait("the node denied", func(c *control.Config) bool { return slices.Contains(c.Relay.Denied, w.client.id) })
			cl.ended()
			if d := time.Since(before); d > 5*time.Second {
				t.Errorf("revocation took %v", d)
			}
			for _, path := range []string{"/control", "/heartbeat", "/renew"} {
				method := "POST"
				if path == "/control" {
					method = "GET"
				}
				if status, p := w.do(w.client.bearer, method, "/api/v1/node"+path, struct{}{}, nil); status != 403 || p.Code != code {
					t.Errorf("%s: %d %+v", path, status, p)
				}
			}
			if token, p := w.client.exchange(w.client.assertion(nil)); token != "" || p.Status != 403 || p.Code != code {
				t.Errorf("a new access token: %+v", p)
			}
			if verb == "disable" {
				w.api("POST", "/clients/laptop/enable", nil, nil)
				gw.wait("the key allowed again", func(c *control.Config) bool { return !slices.Contains(c.Trust.Denied, key) })
				w.client.stream().wait("its configuration", always)
			}
		})
	}
}

func TestRevokedNodeComesBackWithANewKeyOnly(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop").join()
	old := n.key
	l.api("POST", "/clients/laptop/revoke", nil, nil)
	if status, p := l.do(l.admin.Token, "POST", "/api/v1/orgs/default/clients/laptop/enable", nil, nil); status != 409 || p.Code != control.CodeNodeRevoked {
		t.Errorf("a revoked node was enabled: %d %+v", status, p)
	}
	var made control.CreatedNode
	l.api("POST", "/clients/laptop/token", nil, &made)
	n = l.fromToken(made.Token)
	n.key = old
	if status, p := l.do("", "POST", "/api/v1/enroll", n.request(), nil); status != 403 || p.Code != "key_denied" {
		t.Errorf("the revoked key enrolled: %d %+v", status, p)
	}
	fresh := l.fromToken(made.Token).join() // the refusal did not spend the token
	c := fresh.stream().wait("its configuration", always)
	if !slices.Contains(c.Trust.Denied, identity.HashKey(old.Public())) {
		t.Error("the revoked key is not denied any more")
	}
}

func TestRelayCredentials(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	c := w.client.stream().settled().last
	keys := w.relayKeys(c.Dialling.Gateways[0].Relays[0].Node)
	for i, f := range []*feed{w.client.stream().settled(), w.gateway.stream().settled()} {
		refs := f.last.Gateway
		var all []control.RelayRef
		if refs != nil {
			all = refs.Relays
		} else {
			all = f.last.Dialling.Gateways[0].Relays
		}
		for _, ref := range all {
			u, err := wire.ParseUsername(ref.Username)
			must(t, err)
			n := []*node{w.client, w.gateway}[i]
			chain, err := identity.DecodeCertificates([]byte(n.enrol.Certificates.Leaf))
			must(t, err)
			if u.Node != n.id || !u.Flags.Has(wire.FlagPlainData) || u.Expiry.After(chain[0].NotAfter) {
				t.Errorf("user name %+v, leaf until %v", u, chain[0].NotAfter)
			}
			if got := w.relayKeys(ref.Node); ref.Password != wire.Password(got[0].Secret, ref.Username) {
				t.Error("the relay would refuse the password")
			}
			if ref.Port != wire.Port || !strings.HasSuffix(ref.Host, ".example") {
				t.Errorf("relay at %s:%d", ref.Host, ref.Port)
			}
			roots, err := identity.DecodeCertificates([]byte(ref.Roots))
			must(t, err)
			relay := w.relays[slices.IndexFunc(w.relays, func(r *node) bool { return r.id == ref.Node })]
			leaf, err := identity.DecodeCertificates([]byte(relay.enrol.Certificates.Leaf))
			must(t, err)
			tr := &identity.Trust{Roots: roots, Pins: ref.Pins}
			if who, err := tr.Verify(leaf, x509.ExtKeyUsageServerAuth); err != nil || who != ref.Node {
				t.Errorf("the relay's certificate: %v %v", who, err)
			}
		}
	}
	// For standard software.
	var cred control.TURNCredential
	w.api("POST", "/relays/relay-1/credential", control.CreateTURNCredential{Client: "laptop"}, &cred)
	u, err := wire.ParseUsername(cred.Username)
	must(t, err)
	if u.Node != w.client.id || u.Flags != "" || cred.Realm != wire.Realm || len(cred.URIs) != 4 || time.Until(cred.Expires) > time.Hour {
		t.Errorf("credential %+v", u)
	}
	if cred.Password != wire.Password(w.relayKeys(w.relays[0].id)[0].Secret, cred.Username) {
		t.Error("the relay would refuse the standard password")
	}
	// Rotation: a new key first, the one before still there; the third takes the first away.
	relay := w.relays[0].stream()
	relay.wait("its key", func(c *control.Config) bool { return len(c.Relay.Keys) == 1 })
	for range 2 {
		must(t, w.srv.Registry().RotateRelayKeys(t.Context(), "default", 0))
	}
	now := relay.wait("two keys", func(c *control.Config) bool { return len(c.Relay.Keys) == 2 && c.Relay.Keys[1].ID != keys[0].ID })
	w.client.stream().wait("a credential by the newest key", func(c *control.Config) bool {
		for _, ref := range c.Dialling.Gateways[0].Relays {
			if ref.Node == w.relays[0].id {
				return ref.Password == wire.Password(now.Relay.Keys[0].Secret, ref.Username)
			}
		}
		return false
	})
}

// relayKeys asks as the relay itself.
func (w *world) relayKeys(relay identity.Node) []control.RelayKey {
	for _, r := range w.relays {
		if r.id == relay {
			f := r.stream()
			defer f.close()
			return f.wait("its keys", always).Relay.Keys
		}
	}
	w.t.Fatalf("no relay %v", relay)
	return nil
}

func TestGatewaysReachEachOther(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	other := w.create(identity.Gateway, "gw2").join()
	f := other.stream()
	c := f.wait("the other gateway on two relays", func(c *control.Config) bool {
		return len(c.Dialling.Gateways) == 1 && len(c.Dialling.Gateways[0].Relays) == 2 && len(c.Gateway.Relays) == 2
	})
	ref := c.Dialling.Gateways[0]
	if ref.Node != w.gateway.id || ref.FQDN != "gw.default.sallyway.internal" || len(c.Dialling.Resources) != 0 {
		t.Errorf("%+v", c.Dialling)
	}
	if g, err := policy.OpenGrant(ref.Grant, other.trust(identity.Policy), other.id); err != nil || g.Node.Kind != identity.Site {
		t.Errorf("grant %+v: %v", g, err)
	}
	// It dials as site: another allocation than the one it serves on.
	if u, err := wire.ParseUsername(ref.Relays[0].Username); err != nil || u.Node.Kind != identity.Site || u.Node.ID != other.id.ID {
		t.Errorf("credential of %v: %v", u.Node, err)
	}
	gw := w.gateway.stream()
	s := w.gateway.snapshot(gw.wait("a gateway as a peer", func(c *control.Config) bool {
		_, known := w.gateway.snapshot(c).Peer(other.id)
		return known
	}))
	target := policy.Target{Proto: policy.TCP, Addr: netip.MustParseAddr("10.9.0.2"), Port: 80}
	if d := s.Evaluate(other.id, target); d.Allowed {
		t.Error("a gateway reaches a resource without a policy")
	}
	w.api("POST", "/policies", control.CreatePolicy{Subject: "gateway:gw2", Resource: "web"}, nil)
	f.wait("the resource of the other gateway", func(c *control.Config) bool { return len(c.Dialling.Resources) == 1 })
	s = w.gateway.snapshot(gw.wait("the rule", func(c *control.Config) bool { return len(w.gateway.snapshot(c).Rules) == 2 }))
	site := identity.Node{Org: "default", Kind: identity.Site, ID: other.id.ID}
	if d := s.Evaluate(site, target); !d.Allowed {
		t.Errorf("%+v", d)
	}
}

func TestRelayAssignmentFollowsHealth(t *testing.T) {
	t.Parallel()
	c := new(clock)
	w := populate(t, start(t, func(cfg *Config) { cfg.Now = c.now }))
	third := w.create(identity.Relay, "relay-3").join()
	third.beat(control.Heartbeat{})
	gw := w.gateway.stream().settled()
	names := func(c *control.Config) []string {
		var out []string
		for _, r := range c.Gateway.Relays {
			out = append(out, r.Name)
		}
		return out
	}
	first := names(&gw.last)
	gw.quiet("a third relay is no reason to move")
	// A draining relay is left at once.
	var active *node
	for _, r := range append(w.relays, third) {
		if r.name == first[0] {
			active = r
		}
	}
	active.beat(control.Heartbeat{State: "draining"})
	conf := gw.wait("the draining relay left", func(c *control.Config) bool {
		return !slices.Contains(names(c), active.name) && len(c.Gateway.Relays) == 2
	})
	if names(conf)[0] != first[1] {
		t.Errorf("relays %v before, %v after: the standby is not the active one now", first, names(conf))
	}
	// Silence: shorter than the patience nothing moves, longer it does.
	var live []*node
	for _, r := range append(w.relays, third) {
		if slices.Contains(names(conf), r.name) {
			live = append(live, r)
		}
	}
	active.beat(control.Heartbeat{})
	beat := func() {
		for _, r := range []*node{active, live[1]} {
			r.login()
			r.beat(control.Heartbeat{})
		}
	}
	silent := live[0]
	c.advance(45 * time.Second)
	beat()
	var rec control.NodeRecord
	w.api("GET", "/relays/"+silent.name, nil, &rec)
	if rec.State != control.StateUnreachable {
		t.Errorf("silent for 45 s: %s", rec.State)
	}
	gw.quiet("a relay that is silent for 45 s")
	c.advance(50 * time.Second)
	beat()
	gw.wait("the silent relay left", func(c *control.Config) bool {
		return !slices.Contains(names(c), silent.name) && len(c.Gateway.Relays) == 2
	})
}

func TestSessions(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	gw := w.gateway.stream().settled()
	report := control.SessionReport{Peer: w.client.id, Relay: "relay-1", Since: time.Now().Add(-time.Minute).UTC(), Flows: 3, SentBytes: 7}
	foreign := control.SessionReport{Peer: identity.Node{Org: "elsewhere", Kind: identity.Client, ID: "c-1"}}
	w.gateway.beat(control.Heartbeat{Sessions: []control.SessionReport{report, foreign}})
	var l control.List[control.SessionRecord]
	w.api("GET", "/sessions", nil, &l)
	if len(l.Items) != 1 || l.Items[0].Gateway != "gw" || l.Items[0].Peer != "laptop" || l.Items[0].Flows != 3 {
		t.Errorf("sessions %+v", l.Items)
	}
	w.api("DELETE", "/sessions/"+w.client.id.ID, nil, nil)
	c := gw.wait("the end of sessions", func(c *control.Config) bool { return len(c.Gateway.EndSessions) == 1 })
	if e := c.Gateway.EndSessions[0]; e.Node != w.client.id || e.Before.Before(report.Since) || slices.Contains(c.Trust.Denied, identity.HashKey(w.client.key.Public())) {
		t.Errorf("%+v", e)
	}
	var st control.OrgStatus
	w.api("GET", "/status", nil, &st)
	if len(st.Relays) != 2 || len(st.Gateways) != 1 || len(st.Clients) != 1 || st.Resources != 1 || st.Policies != 1 || st.Sessions != 1 {
		t.Errorf("status %+v", st)
	}
	if len(st.Gateways[0].Relays) != 2 || st.Gateways[0].State != control.StateHealthy {
		t.Errorf("gateway %+v", st.Gateways[0])
	}
}

func TestRestart(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	gw := w.gateway.stream().settled()
	version, pin, assigned := gw.last.Version, w.srv.Pin(), gw.last.Gateway.Relays
	w.stop()
	gw.ended()
	w.run()
	if w.srv.Pin() != pin {
		t.Error("the CA changed")
	}
	w.gateway.login()
	again := w.gateway.stream().wait("its configuration", always)
	if again.Version < version || len(again.Gateway.Relays) != 2 || again.Gateway.Relays[0].Node != assigned[0].Node {
		t.Errorf("version %d after %d, relays %v", again.Version, version, again.Gateway.Relays)
	}
	w.gateway.snapshot(again)
	if s, err := policy.OpenSnapshot(gw.last.Gateway.Snapshot, w.gateway.trust(identity.Policy), w.gateway.id); err != nil || s.Version > w.gateway.snapshot(again).Version {
		t.Errorf("the snapshot from before: %v", err)
	}
	// An assertion from before the restart is still used up.
	a := w.client.assertion(nil)
	if token, p := w.client.exchange(a); token == "" {
		t.Fatalf("%+v", p)
	}
	w.stop()
	w.run()
	if token, _ := w.client.exchange(a); token != "" {
		t.Error("an assertion works again after a restart")
	}
	w.api("POST", "/clients/laptop/disable", nil, nil)
	v := w.gateway
	v.login()
	if c := v.stream().wait("its configuration", always); c.Version <= again.Version {
		t.Errorf("version %d after %d", c.Version, again.Version)
	}
}

func TestOneStreamForEachNode(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop").join()
	first := n.stream()
	first.wait("its configuration", always)
	second := n.stream()
	first.ended()
	second.wait("its configuration", always)
	resp, err := l.http.Get(l.srv.URL() + "/api/v1/node/control")
	must(t, err)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("without a token: %d", resp.StatusCode)
	}
}

// TestStreamsOfOneNode opens many at once: the newest stays, and those that never began are told why, not that the platform failed.
func TestStreamsOfOneNode(t *testing.T) {
	t.Parallel()
	l := start(t)
	n := l.create(identity.Client, "laptop").join()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	const streams = 60
	var replaced, over atomic.Int32
	for range streams {
		wg.Go(func() {
			defer over.Add(1)
			req, err := http.NewRequestWithContext(ctx, "GET", l.at()+"/api/v1/node/control", nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+n.bearer)
			resp, err := l.http.Do(req)
			if err != nil {
				return // the test is over
			}
			defer resp.Body.Close()
			b, _ := io.ReadAll(resp.Body) // until it is replaced, or the test is over
			switch resp.StatusCode {
			case http.StatusOK:
			case http.StatusConflict:
				replaced.Add(1)
				if !strings.Contains(string(b), "newer stream") || !strings.Contains(string(b), "remedy") {
					t.Errorf("%s", b)
				}
			default:
				t.Errorf("%d %s", resp.StatusCode, b)
			}
		})
	}
	eventually(t, "one stream is left", func() bool { return over.Load() == streams-1 })
	n.stream().wait("its configuration", always)
	cancel()
	wg.Wait()
	t.Logf("%d were replaced before they began", replaced.Load())
}
