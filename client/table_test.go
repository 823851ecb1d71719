package client

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

func ports(s string) []policy.PortRange {
	p, err := policy.ParsePorts(s)
	if err != nil {
		panic(err)
	}
	return p
}

func addrs(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// testDialling has two gateways and a resource of every shape. gateway-less is reached by a gateway that the node does not know.
func testDialling() *control.Dialling {
	one, two := []control.ServingGateway{{Node: gateway1}}, []control.ServingGateway{{Node: gateway2}}
	fqdn := func(n string) string { return n + ".acme.sallyway.internal" }
	return &control.Dialling{
		Virtual: addrs("100.112.0.2", "fd77::2"),
		Range:   []netip.Prefix{netip.MustParsePrefix("100.112.0.0/12"), netip.MustParsePrefix("fd77::/48")},
		Gateways: []control.GatewayRef{
			{Node: gateway1, Name: "office", FQDN: fqdn("office"), Virtual: addrs("100.112.0.5", "fd77::5")},
			{Node: gateway2, Name: "lab", FQDN: fqdn("lab")},
		},
		Resources: []control.ReachableResource{
			{
				Resource: policy.Resource{Name: "db", Address: "DB.corp.example.", TCP: ports("5432"), Virtual: addrs("100.112.0.10", "fd77::10"), Domains: []string{"intra.example", "Corp.Example."}},
				FQDN:     fqdn("db"), Gateways: []control.ServingGateway{{Node: gateway1, Priority: 2}, {Node: gateway2, Priority: 1}},
			},
			{Resource: policy.Resource{Name: "lan", Address: "10.0.0.0/8", TCP: ports("22,443")}, FQDN: fqdn("lan"), Gateways: one},
			{Resource: policy.Resource{Name: "rack", Address: "10.0.3.0/24", TCP: ports("5432")}, FQDN: fqdn("rack"), Gateways: two},
			{Resource: policy.Resource{Name: "host", Address: "10.0.3.7", UDP: ports("53"), ICMP: true, Virtual: addrs("100.112.0.11")}, FQDN: fqdn("host"), Gateways: two},
			{Resource: policy.Resource{Name: "apps", Address: "*.apps.example", TCP: ports("443")}, FQDN: fqdn("apps"), Gateways: one},
			{Resource: policy.Resource{Name: "apps-ssh", Address: "*.apps.example", TCP: ports("22")}, FQDN: fqdn("apps-ssh"), Gateways: two},
			{Resource: policy.Resource{Name: "shop", Address: "shop.apps.example", TCP: ports("443")}, FQDN: fqdn("shop"), Gateways: two},
			{Resource: policy.Resource{Name: "db-ssh", Address: "db.corp.example", TCP: ports("22")}, FQDN: fqdn("db-ssh"), Gateways: one},
			{Resource: policy.Resource{Name: "six", Address: "2001:db8:1::/48", TCP: ports("all"), Domains: []string{"six.example"}}, FQDN: fqdn("six"), Gateways: one},
			{Resource: policy.Resource{Name: "six-host", Address: "2001:db8:1::7", TCP: ports("443"), Virtual: addrs("fd77::11")}, FQDN: fqdn("six-host"), Gateways: two},
			{Resource: policy.Resource{Name: "mapped", Address: "::ffff:192.168.9.9", TCP: ports("80")}, FQDN: fqdn("mapped"), Gateways: one},
			{
				Resource: policy.Resource{Name: "far", Address: "172.16.0.0/12", TCP: ports("80")}, FQDN: fqdn("far"),
				Gateways: []control.ServingGateway{{Node: identity.Node{Org: "acme", Kind: identity.Gateway, ID: "g-unknown"}}},
			},
			{
				Resource: policy.Resource{Name: "weighed", Address: "192.168.1.1", TCP: ports("80")}, FQDN: fqdn("weighed"),
				Gateways: []control.ServingGateway{{Node: gateway1, Weight: 0}, {Node: gateway2, Weight: 10}},
			},
		},
	}
}

func TestLookup(t *testing.T) {
	tab := newTable(testDialling())
	for _, c := range []struct {
		host  string
		proto policy.Proto
		port  uint16
		res   string // empty: a gateway itself
		want  string // what to ask the gateway for; empty is no route
		first identity.Node
	}{
		// by name
		{"db", policy.TCP, 5432, "db", "DB.corp.example.", gateway2}, // lower priority first
		{"DB", policy.TCP, 5432, "db", "DB.corp.example.", gateway2},
		{"db.acme.sallyway.internal", policy.TCP, 5432, "db", "DB.corp.example.", gateway2},
		{"DB.Acme.Sallyway.Internal.", policy.TCP, 5432, "db", "DB.corp.example.", gateway2},
		{"db.corp.example", policy.TCP, 5432, "db", "db.corp.example", gateway2},
		{"db.corp.example", policy.TCP, 22, "db-ssh", "db.corp.example", gateway1}, // the resource that has the port
		{"db.corp.example", policy.TCP, 80, "db", "db.corp.example", gateway2},     // the gateway says no
		{"rack", policy.TCP, 5432, "rack", "rack", gateway2},
		{"host", policy.UDP, 53, "host", "10.0.3.7", gateway2},
		{"weighed", policy.TCP, 80, "weighed", "192.168.1.1", gateway2}, // heavier first
		// by virtual address
		{"100.112.0.10", policy.TCP, 5432, "db", "DB.corp.example.", gateway2},
		{"100.112.0.10", policy.TCP, 22, "db-ssh", "DB.corp.example.", gateway1}, // what db.corp.example was resolved to
		{"100.112.0.10", policy.TCP, 80, "db", "DB.corp.example.", gateway2},
		{"fd77::10", policy.TCP, 5432, "db", "DB.corp.example.", gateway2},
		{"100.112.0.11", policy.ICMP, 0, "host", "10.0.3.7", gateway2},
		{"fd77::11", policy.TCP, 443, "six-host", "2001:db8:1::7", gateway2},
		{"::ffff:100.112.0.10", policy.TCP, 5432, "db", "DB.corp.example.", gateway2},
		{"100.112.0.99", policy.TCP, 80, "", "", identity.Node{}}, // of the range, nobody's
		// by address: the port, then the longest prefix
		{"10.9.9.9", policy.TCP, 443, "lan", "10.9.9.9", gateway1},
		{"10.0.3.9", policy.TCP, 5432, "rack", "10.0.3.9", gateway2},
		{"10.0.3.9", policy.TCP, 443, "lan", "10.0.3.9", gateway1},
		{"10.0.3.9", policy.TCP, 9, "rack", "10.0.3.9", gateway2},
		{"10.0.3.7", policy.TCP, 5432, "rack", "10.0.3.7", gateway2},
		{"10.0.3.7", policy.TCP, 443, "lan", "10.0.3.7", gateway1},
		{"10.0.3.7", policy.UDP, 53, "host", "10.0.3.7", gateway2},
		{"10.0.3.7", policy.ICMP, 0, "host", "10.0.3.7", gateway2},
		{"::ffff:10.0.3.9", policy.TCP, 5432, "rack", "10.0.3.9", gateway2},
		{"192.168.9.9", policy.TCP, 80, "mapped", "192.168.9.9", gateway1},
		{"2001:db8:1::7", policy.TCP, 443, "six-host", "2001:db8:1::7", gateway2},
		{"2001:db8:1::7", policy.TCP, 80, "six", "2001:db8:1::7", gateway1},
		{"2001:DB8:1:0:0::7", policy.TCP, 80, "six", "2001:db8:1::7", gateway1},
		{"2001:db8:2::7", policy.TCP, 80, "", "", identity.Node{}},
		{"192.0.2.1", policy.TCP, 80, "", "", identity.Node{}},
		{"172.16.0.1", policy.TCP, 80, "far", "172.16.0.1", identity.Node{}}, // covered, and no gateway serves it
		// by wild card and domain
		{"a.apps.example", policy.TCP, 443, "apps", "a.apps.example", gateway1},
		{"a.b.Apps.Example.", policy.TCP, 443, "apps", "a.b.Apps.Example.", gateway1},
		{"a.apps.example", policy.TCP, 22, "apps-ssh", "a.apps.example", gateway2},
		{"shop.apps.example", policy.TCP, 443, "shop", "shop.apps.example", gateway2}, // the closest name
		{"shop.apps.example", policy.TCP, 22, "apps-ssh", "shop.apps.example", gateway2},
		{"apps.example", policy.TCP, 443, "", "", identity.Node{}},
		{"evilapps.example", policy.TCP, 443, "", "", identity.Node{}},
		{"x.corp.example", policy.TCP, 5432, "db", "x.corp.example", gateway2},
		{"corp.example", policy.TCP, 5432, "db", "corp.example", gateway2},
		{"x.six.example", policy.TCP, 443, "six", "x.six.example", gateway1},
		// gateways
		{"office.acme.sallyway.internal", policy.ICMP, 0, "", "100.112.0.5", gateway1},
		{"100.112.0.5", policy.ICMP, 0, "", "100.112.0.5", gateway1},
		{"fd77::5", policy.ICMP, 0, "", "fd77::5", gateway1},
		{"lab.acme.sallyway.internal", policy.ICMP, 0, "", "", identity.Node{}}, // has no address
		// nothing
		{"", policy.TCP, 80, "", "", identity.Node{}},
		{".", policy.TCP, 80, "", "", identity.Node{}},
		{"example.com", policy.TCP, 80, "", "", identity.Node{}},
	} {
		r, err := tab.lookup(c.host, c.proto, c.port)
		if c.want == "" {
			var none *NoRouteError
			if !errors.As(err, &none) || !strings.Contains(err.Error(), "policy explain") {
				t.Errorf("%s %s:%d: %+v, %v, want no route", c.proto, c.host, c.port, r, err)
			}
			continue
		}
		got := ""
		if err == nil && r.Resource != nil {
			got = r.Resource.Name
		}
		if err != nil || got != c.res || r.Host != c.want {
			t.Errorf("%s %s:%d: resource %q, ask for %q, %v; want %q, %q", c.proto, c.host, c.port, got, r.Host, err, c.res, c.want)
			continue
		}
		if (c.first == identity.Node{}) != (len(r.Gateways) == 0) || (len(r.Gateways) > 0 && r.Gateways[0] != c.first) {
			t.Errorf("%s %s:%d: gateways %v, want %v first", c.proto, c.host, c.port, r.Gateways, c.first)
		}
	}
	if _, err := newTable(nil).lookup("db", policy.TCP, 1); err == nil {
		t.Error("an empty table has a route")
	}
	if msg := (&NoRouteError{strings.Repeat("x", 1<<16)}).Error(); len(msg) > 400 {
		t.Errorf("an error of %d bytes", len(msg))
	}
}

func TestRoutesAndDomains(t *testing.T) {
	tab := newTable(testDialling())
	var got []string
	for _, p := range tab.routes() {
		got = append(got, p.String())
	}
	want := []string{
		"100.112.0.0/12", "fd77::/48", "10.0.0.0/8", "10.0.3.0/24", "10.0.3.7/32", "2001:db8:1::/48", "2001:db8:1::7/128", "192.168.9.9/32", "172.16.0.0/12", "192.168.1.1/32",
	}
	if !slices.Equal(got, want) {
		t.Errorf("routes %v, want %v", got, want)
	}
	wantDomains := []string{"intra.example", "corp.example", "db.corp.example", "apps.example", "shop.apps.example", "six.example", "acme.sallyway.internal"}
	if got := tab.domains(); !slices.Equal(got, wantDomains) {
		t.Errorf("domains %v, want %v", got, wantDomains)
	}
	if e := newTable(nil); len(e.routes()) != 0 || len(e.domains()) != 0 || len(e.stubAddrs()) != 0 {
		t.Error("an empty table has routes, domains or stubs")
	}
	d := testDialling()
	d.Resources[1].Virtual = nil
	before := slices.Clone(d.Range)
	_ = append(newTable(d).routes(), netip.MustParsePrefix("1.2.3.4/32"))
	if !slices.Equal(d.Range, before) {
		t.Error("routes shares its array with the configuration")
	}
}

func TestStubAddr(t *testing.T) {
	for prefix, want := range map[string]string{
		"100.112.0.0/12": "100.127.255.254", "100.112.5.9/12": "100.127.255.254", "10.0.0.0/8": "10.255.255.254", "192.0.2.0/30": "192.0.2.2",
		"192.0.2.0/24": "192.0.2.254", "fd77::/48": "fd77::ffff:ffff:ffff:ffff:fffe", "fd77::/126": "fd77::2",
	} {
		p := netip.MustParsePrefix(prefix)
		if got := control.StubAddr(p); got != netip.MustParseAddr(want) || !p.Contains(got) {
			t.Errorf("StubAddr(%s) = %v, want %s", prefix, got, want)
		}
	}
	if got := newTable(testDialling()).stubAddrs(); !slices.Equal(got, addrs("100.127.255.254", "fd77::ffff:ffff:ffff:ffff:fffe")) {
		t.Errorf("stubs %v", got)
	}
}

func TestTrimRelays(t *testing.T) {
	d := testDialling()
	for _, name := range []string{"a", "b", "c"} {
		d.Gateways[0].Relays = append(d.Gateways[0].Relays, control.RelayRef{Name: name})
	}
	for n, want := range map[int]int{-1: 1, 0: 1, 1: 1, 2: 2, 3: 3, 9: 3} {
		got := TrimRelays(d, n)
		if len(got.Gateways[0].Relays) != want || got.Gateways[0].Relays[0].Name != "a" || len(got.Gateways[1].Relays) != 0 {
			t.Errorf("TrimRelays(%d) leaves %d", n, len(got.Gateways[0].Relays))
		}
	}
	if len(d.Gateways[0].Relays) != 3 {
		t.Error("the original is changed")
	}
	if TrimRelays(nil, 1) != nil {
		t.Error("nothing becomes something")
	}
}
