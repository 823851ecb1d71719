package web

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
)

// TestPlaces sets where nodes are and which relays they are to have in the browser, and reads why they have them.
func TestPlaces(t *testing.T) {
	s := newSite(t)
	s.owner()
	b := s.browser().logIn("ada")
	const org = registry.DefaultOrg
	base := "/orgs/" + org + "/networking"
	for _, name := range []string{"fra-1", "ams-1"} {
		_, err := s.reg.CreateNode(t.Context(), org, identity.Relay, control.CreateNode{Name: name, Host: name + ".example"})
		must(t, err)
	}
	_, err := s.reg.CreateNode(t.Context(), org, identity.Gateway, control.CreateNode{Name: "office"})
	must(t, err)
	enrol(t, s.reg, org, identity.Relay, "fra-1", "ams-1")
	enrol(t, s.reg, org, identity.Gateway, "office")
	token := tokenIn(b.get(base + "/relays"))
	for name, domain := range map[string]string{"fra-1": "rack-a", "ams-1": "rack-b"} {
		if a := b.post(base+"/relays/"+name+"/places", token, "region", "EU-West", "failure_domain", domain); a.status != 200 || !strings.Contains(a.body, "are saved") {
			t.Fatalf("%s: %d %s", name, a.status, a.body)
		}
		n, err := s.reg.Node(t.Context(), org, identity.Relay, name)
		must(t, err)
		s.reg.Board.Put(n.ID, presence.Beat{At: time.Now(), Heartbeat: control.Heartbeat{State: "ready"}})
	}
	if a := b.post(base+"/gateways/office/places", token, "pin_relays", "ams-1, fra-1", "exclude_relays", "", "prefer_relays", "", "region", ""); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	must(t, s.reg.Allocate(t.Context(), org, time.Now()))
	a := b.get(base + "/gateways/office")
	for _, want := range []string{"Why these relays", "ams-1", "fra-1", "active", "standby", "pinned", "rack-a", `value="ams-1, fra-1"`} {
		if !strings.Contains(a.body, want) {
			t.Errorf("the gateway's page lacks %q", want)
		}
	}
	if a := b.get(base + "/relays/ams-1"); !strings.Contains(a.body, "Gateways that have it") || !strings.Contains(a.body, ">office</a>") || !strings.Contains(a.body, `value="eu-west"`) {
		t.Error("the relay's page lacks its gateway, or its region")
	}
	// A name that is not there: what there is, and nothing typed is lost.
	a = b.post(base+"/gateways/office/places", token, "pin_relays", "fra-9", "exclude_relays", "ams-1", "prefer_relays", "", "region", "")
	if a.status != 422 || !strings.Contains(a.body, "relays that there are: ams-1, fra-1") || !strings.Contains(a.body, `value="fra-9"`) {
		t.Errorf("%d %s", a.status, a.body)
	}
	// At creation, too.
	if a := b.post(base+"/gateways/new", token, "name", "annex", "region", "eu-west", "pin_relays", "fra-1", "exclude_relays", "", "prefer_relays", ""); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if n, err := s.reg.Node(t.Context(), org, identity.Gateway, "annex"); err != nil || n.Region != "eu-west" || len(n.PinRelays) != 1 {
		t.Errorf("%+v %v", n, err)
	}
	// What was found from outside.
	n, err := s.reg.Node(t.Context(), org, identity.Relay, "fra-1")
	must(t, err)
	addr := netip.MustParseAddr("203.0.113.7")
	must(t, s.reg.FoundOutside(t.Context(), map[string]control.Outside{n.ID: {
		State: control.OutsidePartly, At: time.Now(), Address: &addr, Why: "not reached from outside by STUN 5349/udp (no answer in 3s)", Remedy: "open 5349/udp in the firewall of fra-1",
		Checks: []control.OutsideCheck{{Name: "STUN 5349/udp", Detail: "no answer in 3s"}, {Name: "TLS 5349/tcp", OK: true, Detail: "handshake in 8.1 ms"}},
	}}))
	a = b.get(base + "/relays/fra-1")
	for _, want := range []string{"Degraded", "open 5349/udp in the firewall of fra-1", "Partly reached", "203.0.113.7", "handshake in 8.1 ms"} {
		if !strings.Contains(a.body, want) {
			t.Errorf("the relay's page lacks %q", want)
		}
	}
	if a := b.get(base + "/relays"); !strings.Contains(a.body, "Degraded") || !strings.Contains(a.body, "eu-west") {
		t.Error("the list does not say that the relay is degraded, or where it is")
	}
	// Regions of shared relays.
	if a := b.post("/orgs/"+org+"/organization/regions", token, "relay_regions", "eu-west, eu-central"); a.status != 200 || !strings.Contains(a.body, `value="eu-central, eu-west"`) {
		t.Errorf("%d %s", a.status, a.body)
	}
}
