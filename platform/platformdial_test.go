package platform

import (
	"crypto/x509"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/platform/registry"
)

// dialsAs has the platform issue itself a certificate for an organization.
func (l *lab) dialsAs(org string) (identity.Node, []*x509.Certificate, error) {
	l.t.Helper()
	key, err := identity.NewKey()
	must(l.t, err)
	n := identity.Node{Org: org, Kind: identity.Platform, ID: identity.NewID(identity.Platform)}
	chain, err := l.srv.Registry().IssuePlatform(l.t.Context(), n, key.Public())
	return n, chain, err
}

// TestPlatformAsANode: what the platform is as a node of an organization, and that it is nothing else: no client, gateway or relay, and nobody in
// another organization, on a relay that both share, too.
func TestPlatformAsANode(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	if status, p := w.do(w.admin.Token, "POST", "/api/v1/orgs", control.CreateOrganization{Name: "rival"}, nil); status != 201 {
		t.Fatalf("%+v", p)
	}
	rival := w.createIn("rival", identity.Gateway, "gw").join()
	w.inOrg("rival", "POST", "/resources", control.CreateResource{Name: "web", Gateways: []string{"gw"}, Address: "10.9.0.2", TCP: []policy.PortRange{{First: 80, Last: 80}}}, nil)
	w.inOrg("rival", "POST", "/policies", control.CreatePolicy{Subject: "platform", Resource: "web"}, nil)
	gw, other := w.gateway.stream(), rival.stream()
	target := policy.Target{Proto: policy.TCP, Host: "10.9.0.2", Addr: netip.MustParseAddr("10.9.0.2"), Port: 80}

	us, chain, err := w.dialsAs("default")
	must(t, err)
	if s := w.gateway.snapshot(gw.wait("its configuration", always)); s.Evaluate(us, target).Allowed {
		t.Error("the platform is let in without a policy")
	}
	var made control.PolicyRecord
	w.api("POST", "/policies", control.CreatePolicy{Subject: "platform", Resource: "web"}, &made)
	if made.Subject != "platform" || made.Name != "platform-web" {
		t.Errorf("policy %+v", made)
	}
	s := w.gateway.snapshot(gw.wait("the platform as a peer", func(c *control.Config) bool {
		_, known := w.gateway.snapshot(c).Peer(us)
		return known
	}))
	if d := s.Evaluate(us, target); !d.Allowed || d.Rule != "platform-web" {
		t.Errorf("the platform with a policy: %+v", d)
	}
	for _, n := range []identity.Node{
		{Org: "rival", Kind: identity.Platform, ID: us.ID},
		{Org: "default", Kind: identity.Client, ID: us.ID},
		{Org: "default", Kind: identity.Client, ID: "platform"},
		{Org: "default", Kind: identity.Site, ID: "platform"},
	} {
		if s.Evaluate(n, target).Allowed {
			t.Errorf("%v is taken for the platform", n)
		}
	}

	client, server := x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	if n, err := w.gateway.trust(identity.Client, identity.Site, identity.Platform).Verify(chain, client); err != nil || n != us {
		t.Errorf("a gateway verifies %v, %v", n, err)
	}
	for _, c := range []struct {
		who   string
		trust *identity.Trust
		usage x509.ExtKeyUsage
	}{
		{"a client", w.gateway.trust(identity.Client), client},
		{"a site", w.gateway.trust(identity.Site), client},
		{"a gateway", w.client.trust(identity.Gateway), server},
		{"a relay", w.client.trust(identity.Relay), server},
		{"whoever signs policies", w.client.trust(identity.Policy), x509.ExtKeyUsageAny},
		{"the platform, as a server", w.client.trust(identity.Platform), server},
		{"the platform in another organization", rival.trust(identity.Client, identity.Site, identity.Platform), client},
	} {
		if n, err := c.trust.Verify(chain, c.usage); err == nil {
			t.Errorf("the platform's certificate passes for that of %s: %v", c.who, n)
		}
	}
	// It is no node that the control plane knows: no assertion of it gets a token.
	thief := &node{l: w.lab, id: us, key: w.client.key}
	if token, p := thief.exchange(thief.assertion(nil)); token != "" || p.Status/100 != 4 {
		t.Errorf("an access token as the platform: %+v", p)
	}

	// Its sessions are shown as the platform's, and end by themselves.
	w.gateway.beat(control.Heartbeat{Sessions: []control.SessionReport{{Peer: us, Since: time.Now()}}})
	var open control.List[control.SessionRecord]
	if w.api("GET", "/sessions", nil, &open); len(open.Items) != 1 || open.Items[0].Peer != "platform" {
		t.Errorf("sessions %+v", open.Items)
	}
	if status, p := w.do(w.admin.Token, "DELETE", "/api/v1/orgs/default/sessions/platform", nil, nil); status != 409 || !strings.Contains(p.Remedy, "--platform-dial off") {
		t.Errorf("ending them: %d %+v", status, p)
	}

	// Switched off: revoked, no peer any more, none issued; what is another organization's stays.
	relay := w.relays[0].stream()
	w.api("PATCH", "", control.UpdateOrganization{PlatformDial: ptr(false)}, nil)
	key := identity.CertificateKeyHash(chain[0])
	c := gw.wait("the platform's key denied", func(c *control.Config) bool { return slices.Contains(c.Trust.Denied, key) })
	if _, known := w.gateway.snapshot(c).Peer(us); known {
		t.Error("the platform still is a peer")
	}
	relay.wait("the platform's node denied", func(c *control.Config) bool { return slices.Contains(c.Relay.Denied, us) })
	if _, _, err := w.dialsAs("default"); registry.Code(err) != registry.CodeSwitchedOff {
		t.Errorf("a certificate although it is off: %v", err)
	}
	var e control.Explanation
	w.api("POST", "/policies:explain", control.ExplainRequest{Subject: "platform", Resource: "web"}, &e)
	if e.Allowed || !strings.Contains(e.Remedy, "--platform-dial on") {
		t.Errorf("explained as %+v", e)
	}
	them, _, err := w.dialsAs("rival")
	must(t, err)
	if s := rival.snapshot(other.wait("its configuration", always)); !s.Evaluate(them, target).Allowed {
		t.Error("the other organization's switch was used, too")
	}
	w.api("PATCH", "", control.UpdateOrganization{PlatformDial: ptr(true)}, nil)
	gw.wait("the platform as a peer again, and the old key still denied", func(c *control.Config) bool {
		_, known := w.gateway.snapshot(c).Peer(us)
		return known && slices.Contains(c.Trust.Denied, key)
	})
}

// TestResourceTestRefusals: what the platform does not even try, and that it stands in the audit.
func TestResourceTestRefusals(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	w.api("POST", "/resources", control.CreateResource{Name: "lan", Gateways: []string{"gw"}, Address: "10.9.0.0/24", TCP: []policy.PortRange{policy.AllPorts}}, nil)
	w.api("POST", "/resources", control.CreateResource{Name: "dns", Gateways: []string{"gw"}, Address: "10.9.0.53", UDP: []policy.PortRange{{First: 53, Last: 53}}}, nil)
	test := func(name string, req control.TestResource) (control.ResourceTest, int) {
		var out control.ResourceTest
		status, _ := w.do(w.admin.Token, "POST", "/api/v1/orgs/default/resources/"+name+"/test", req, &out)
		return out, status
	}
	if out, _ := test("web", control.TestResource{}); !out.Refused || out.OK || !strings.Contains(out.Verdict, policy.DefaultDeny) || out.Remedy != "sallyway policy allow --from platform --resource web" {
		t.Errorf("without a policy: %+v", out)
	}
	w.api("POST", "/policies", control.CreatePolicy{Subject: "platform", Resource: "lan"}, nil)
	for _, c := range []struct {
		name string
		req  control.TestResource
		want int
	}{
		{"nothing", control.TestResource{}, 404},
		{"lan", control.TestResource{}, 422},                                           // which of its hosts?
		{"lan", control.TestResource{Host: "10.9.1.1", Port: 80}, 422},                 // not one of them
		{"lan", control.TestResource{Host: "169.254.169.254", Port: 80}, 422},          // nor this
		{"lan", control.TestResource{Host: "10.9.0.1", Port: 80, Gateway: "gww"}, 422}, // no such gateway
		{"dns", control.TestResource{}, 422},                                           // nothing over TCP
	} {
		if _, status := test(c.name, c.req); status != c.want {
			t.Errorf("%s %+v: %d, want %d", c.name, c.req, status, c.want)
		}
	}
	w.api("PATCH", "", control.UpdateOrganization{PlatformDial: ptr(false)}, nil)
	if out, _ := test("lan", control.TestResource{Host: "10.9.0.1", Port: 80}); !out.Refused || !strings.Contains(out.Remedy, "--platform-dial on") {
		t.Errorf("switched off: %+v", out)
	}
	for _, hostport := range []string{"10.9.0.1:80", "web.default.sallyway.internal:80", "127.0.0.1:80"} {
		if c, err := w.srv.dialler.Dial(t.Context(), "default", hostport); err == nil {
			_ = c.Close() // it must not be there
			t.Errorf("%s is dialled although it is off", hostport)
		}
	}
	w.api("PATCH", "", control.UpdateOrganization{PlatformDial: ptr(true)}, nil)
	// What a policy allows goes to the gateway's relays, which these are not: their names do not exist.
	eventually(t, "the gateway has relays, which are dialled", func() bool {
		_, err := w.srv.dialler.Dial(t.Context(), "default", "10.9.0.2:81")
		return err != nil && strings.Contains(err.Error(), "address of relay")
	})
	for _, hostport := range []string{"127.0.0.1:80", "10.8.0.1:80", "web.rival.sallyway.internal:80"} {
		_, err := w.srv.dialler.Dial(t.Context(), "default", hostport)
		if err == nil || !strings.Contains(err.Error(), "policy allow --from platform") && !strings.Contains(err.Error(), "resource") {
			t.Errorf("%s: %v", hostport, err)
		}
	}
	if _, err := w.srv.dialler.Dial(t.Context(), "rival", "10.9.0.2:80"); err == nil || !strings.Contains(err.Error(), "no organization") {
		t.Errorf("an organization that is not there: %v", err)
	}
	var entries control.List[control.AuditEntry]
	w.api("GET", "/audit?limit=1000", nil, &entries)
	refused := 0
	for _, e := range entries.Items {
		if e.Action == "resource.test" && e.Result == "refused" {
			refused++
		}
	}
	if refused != 2 {
		t.Errorf("%d refused tests in the audit, want 2", refused)
	}
	// Many at once are limited.
	limited := false
	for range 30 {
		_, status := test("web", control.TestResource{})
		limited = limited || status == 429
	}
	if !limited {
		t.Error("thirty tests in a row are not limited")
	}
}
