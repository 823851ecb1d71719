package policy

import (
	"net/netip"
	"strings"
	"testing"

	"sallyway/internal/identity"
)

var (
	alice = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-alice"}
	bob   = identity.Node{Org: "acme", Kind: identity.Client, ID: "c-bob"}
	site  = identity.Node{Org: "acme", Kind: identity.Site, ID: "g-two"}
)

func snapshot() *Snapshot {
	gw := identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-two"}
	return &Snapshot{
		Org:   "acme",
		Peers: []Peer{{Node: alice}, {Node: bob}, {Node: gw}, {Node: Platform("acme")}},
		Resource: []Resource{
			{ID: "r1", Name: "db", Address: "db.internal", TCP: []PortRange{{5432, 5432}}, Domains: []string{"internal"}},
			{ID: "r2", Name: "lan", Address: "10.0.3.0/24", TCP: []PortRange{AllPorts}, UDP: []PortRange{{53, 53}}, ICMP: true},
			{ID: "r3", Name: "web", Address: "*.corp.example", TCP: []PortRange{{80, 80}, {8000, 8100}}},
		},
		Rules: []Rule{
			{ID: "p1", Name: "dba", Resource: "r1", Subjects: []identity.Node{alice}},
			{ID: "p2", Name: "ops", Resource: "r2", Subjects: []identity.Node{alice, gw}},
			{ID: "p3", Resource: "r3", Subjects: []identity.Node{alice}},
			{ID: "p4", Name: "hooks", Resource: "r3", Subjects: []identity.Node{Platform("acme")}},
		},
	}
}

func TestEvaluate(t *testing.T) {
	in := netip.MustParseAddr("10.0.3.7")
	for _, c := range []struct {
		who    identity.Node
		target Target
		rule   string // empty: denied
		reason string
	}{
		{alice, Target{TCP, "db.internal", netip.Addr{}, 5432}, "dba", ""},
		{alice, Target{TCP, "DB.Internal.", netip.Addr{}, 5432}, "dba", ""},
		{alice, Target{TCP, "db.internal", netip.Addr{}, 5433}, "", "does not include tcp port 5433"},
		{alice, Target{UDP, "db.internal", netip.Addr{}, 5432}, "", "does not include udp port"},
		{bob, Target{TCP, "db.internal", netip.Addr{}, 5432}, "", `resource "db"`},
		{identity.Node{Org: "acme", Kind: identity.Platform, ID: "p-7"}, Target{TCP, "a.corp.example", netip.Addr{}, 80}, "hooks", ""},
		{identity.Node{Org: "acme", Kind: identity.Platform, ID: "p-8"}, Target{TCP, "db.internal", netip.Addr{}, 5432}, "", `resource "db"`},
		{identity.Node{Org: "evil", Kind: identity.Platform, ID: "p-7"}, Target{TCP, "a.corp.example", netip.Addr{}, 80}, "", "not among the nodes"},
		{identity.Node{Org: "acme", Kind: identity.Client, ID: "platform"}, Target{TCP, "a.corp.example", netip.Addr{}, 80}, "", "not among the nodes"},
		{alice, Target{TCP, "10.0.3.7", in, 22}, "ops", ""},
		{alice, Target{TCP, "::ffff:10.0.3.7", netip.MustParseAddr("::ffff:10.0.3.7"), 22}, "ops", ""},
		{site, Target{ICMP, "10.0.3.7", in, 0}, "ops", ""},
		{site, Target{UDP, "10.0.3.7", in, 53}, "ops", ""},
		{site, Target{UDP, "10.0.3.7", in, 54}, "", "udp port 54"},
		{alice, Target{TCP, "10.0.4.7", netip.MustParseAddr("10.0.4.7"), 22}, "", "no resource"},
		{alice, Target{TCP, "x.corp.example", netip.Addr{}, 8050}, "p3", ""},
		{alice, Target{TCP, "corp.example", netip.Addr{}, 80}, "", "no resource"},
		{alice, Target{TCP, "evilcorp.example", netip.Addr{}, 80}, "", "no resource"},
		{alice, Target{DNS, "a.internal", netip.Addr{}, 0}, "dba", ""},
		{bob, Target{DNS, "a.internal", netip.Addr{}, 0}, "", "no policy"},
		{identity.Node{Org: "other", Kind: identity.Client, ID: "c-alice"}, Target{TCP, "db.internal", netip.Addr{}, 5432}, "", "not among"},
		// A name that is not a resource but resolves into one is the resource's.
		{alice, Target{TCP, "host.lan", in, 22}, "ops", ""},
	} {
		d := snapshot().Evaluate(c.who, c.target)
		if d.Allowed != (c.rule != "") || (d.Allowed && d.Rule != c.rule) || (!d.Allowed && d.Rule != DefaultDeny) || !strings.Contains(d.Reason, c.reason) {
			t.Errorf("%v to %v: %+v, want rule %q reason %q", c.who, c.target, d, c.rule, c.reason)
		}
	}
}

func TestPortRanges(t *testing.T) {
	for in, want := range map[string]string{"5432,8000-8100": "5432 8000-8100", "all": "all", "": "", "1-65535": "all", " 22 , 23": "22 23"} {
		got, err := ParsePorts(in)
		var s []string
		for _, r := range got {
			s = append(s, r.String())
		}
		if err != nil || strings.Join(s, " ") != want {
			t.Errorf("ParsePorts(%q) = %v, %v, want %s", in, s, err, want)
		}
	}
	for _, bad := range []string{"0", "70000", "9-8", "x", "1-2-3", "-1"} {
		if got, err := ParsePorts(bad); err == nil {
			t.Errorf("ParsePorts(%q) = %v, want an error", bad, got)
		}
	}
}
