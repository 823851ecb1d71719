package platform

import (
	"slices"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
)

// TestServingGateways gives gateways priorities and weights, and shows what their probes found.
func TestServingGateways(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	w.create(identity.Gateway, "gw2").join()
	web := []policy.PortRange{{First: 80, Last: 80}}
	var r control.ResourceRecord
	w.api("POST", "/resources", control.CreateResource{
		Name: "spread", Gateways: []string{"gw2:0:3", "gw:0"}, Address: "10.9.0.3", TCP: web, Health: policy.Health{Kind: policy.HealthHTTP, Path: "/ok"},
	}, &r)
	if !slices.Equal(r.Names, []string{"gw2", "gw"}) || r.Gateways[0].Weight != 3 || r.Gateways[1].Weight != 1 || r.Gateways[0].Priority != 0 || r.Gateways[1].Priority != 0 {
		t.Errorf("gateways %v %+v", r.Names, r.Gateways)
	}
	if r.Health.String() != "http/ok" || len(r.Reached) != 0 {
		t.Errorf("health %q, reached %+v", r.Health, r.Reached)
	}
	since := time.Now().Add(-time.Minute).UTC().Truncate(time.Second)
	w.gateway.beat(control.Heartbeat{Resources: []control.ResourceHealth{{ID: r.ID, Reason: "connection refused", Since: since}, {ID: "r-none", OK: true}}})
	// A change of something else keeps what was set.
	w.api("PATCH", "/resources/spread", control.UpdateResource{ICMP: new(true)}, &r)
	if r.Gateways[0].Weight != 3 || r.Health.String() != "http/ok" || !r.ICMP {
		t.Errorf("after an update: %+v", r)
	}
	if len(r.Reached) != 1 || r.Reached[0].Gateway != "gw" || r.Reached[0].OK || r.Reached[0].Reason != "connection refused" || !r.Reached[0].Since.Equal(since) {
		t.Errorf("reached %+v", r.Reached)
	}
	cl := w.client.stream()
	w.api("POST", "/policies", control.CreatePolicy{Subject: "client:laptop", Resource: "spread"}, nil)
	cl.wait("weights and no probe of the platform's", func(c *control.Config) bool {
		for _, got := range c.Dialling.Resources {
			if got.Name == "spread" {
				return len(got.Gateways) == 2 && got.Gateways[0].Weight == 3 && got.Gateways[0].Priority == 0
			}
		}
		return false
	})
	for _, bad := range []control.CreateResource{
		{Gateways: []string{"gw:x"}},
		{Gateways: []string{"gw:0:0"}},
		{Gateways: []string{"gw:-1"}},
		{Gateways: []string{"gw:0", "gw:1"}},
		{Gateways: []string{"gw"}, Health: policy.Health{Kind: policy.HealthTCP, Port: 81}},
		{Gateways: []string{"gw"}, Address: "10.9.0.0/24", Health: policy.Health{Kind: policy.HealthTCP, Port: 80}},
	} {
		bad.Name, bad.TCP = "bad", web
		if bad.Address == "" {
			bad.Address = "10.9.0.4"
		}
		if status, _ := w.do(w.admin.Token, "POST", "/api/v1/orgs/default/resources", bad, nil); status != 422 && status != 400 {
			t.Errorf("%+v: %d", bad, status)
		}
	}
}

// TestAnnouncedAddress: a relay's new address is announced, taken back, announced again, and comes into force by itself.
func TestAnnouncedAddress(t *testing.T) {
	t.Parallel()
	w := populate(t, start(t))
	host := func(h string) *string { return &h }
	show := func() (r control.NodeRecord) {
		w.api("GET", "/relays/relay-1", nil, &r)
		return r
	}
	before := show().Host
	later := time.Now().Add(time.Hour)
	w.api("PATCH", "/relays/relay-1", control.UpdateNode{Host: host("192.0.2.77"), From: &later}, nil)
	if r := show(); r.Host != before || r.NextHost != "192.0.2.77" || !r.NextFrom.Equal(later.UTC().Truncate(time.Microsecond)) {
		t.Errorf("announced: %+v", r)
	}
	w.api("PATCH", "/relays/relay-1", control.UpdateNode{Host: &before, From: &later}, nil)
	if r := show(); r.Host != before || r.NextHost != "" || r.NextFrom != nil {
		t.Errorf("taken back: %+v", r)
	}
	soon := time.Now().Add(300 * time.Millisecond)
	w.api("PATCH", "/relays/relay-1", control.UpdateNode{Host: host("192.0.2.78"), From: &soon}, nil)
	deadline := time.Now().Add(30 * time.Second)
	for show().Host != "192.0.2.78" {
		if time.Now().After(deadline) {
			t.Fatalf("the announced address is not in force: %+v", show())
		}
		time.Sleep(50 * time.Millisecond)
	}
	if time.Now().Before(soon) {
		t.Error("too early")
	}
	far := time.Now().Add(500 * 24 * time.Hour)
	for _, bad := range []control.UpdateNode{{From: &later}, {Host: host("192.0.2.79"), From: &far}} {
		if status, _ := w.do(w.admin.Token, "PATCH", "/api/v1/orgs/default/relays/relay-1", bad, nil); status != 422 {
			t.Errorf("%+v: %d", bad, status)
		}
	}
}
