package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"testing"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/tunnel"
)

// Every draw keeps priorities apart and every gateway in; the first places go by weight.
func TestRanked(t *testing.T) {
	node := func(id string) identity.Node { return identity.Node{Org: "acme", Kind: identity.Gateway, ID: id} }
	serving := []control.ServingGateway{
		{Node: node("last"), Priority: 9, Weight: 100}, {Node: node("a"), Priority: 1, Weight: 3}, {Node: node("b"), Priority: 1, Weight: 1}, {Node: node("never"), Priority: 1},
	}
	const draws = 4000
	first := map[string]int{}
	for range draws {
		out := ranked(serving)
		if len(out) != len(serving) || out[3].Node.ID != "last" {
			t.Fatalf("order %+v", out)
		}
		seen := map[string]bool{}
		for _, s := range out {
			seen[s.Node.ID] = true
		}
		if len(seen) != len(serving) {
			t.Fatalf("lost a gateway: %+v", out)
		}
		first[out[0].Node.ID]++
	}
	// Three in four: ten standard deviations are 7 %.
	if a := float64(first["a"]) / draws; a < 0.68 || a > 0.82 || first["never"] > 0 {
		t.Errorf("first places %v of %d, want three quarters for a and none for a weight of 0", first, draws)
	}
	if got := ranked(nil); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	if serving[0].Node.ID != "last" {
		t.Error("the configuration was reordered")
	}
}

func TestFitFirst(t *testing.T) {
	h := newHarness(t)
	d := anyDialling()
	d.Gateways = append(d.Gateways, control.GatewayRef{Node: gateway2, Name: "lab"})
	g1 := h.Sessions.gateways[gateway1]
	g2 := h.newLink(&d.Gateways[1], nil)
	h.Sessions.gateways[gateway2] = g2
	resource := &control.ReachableResource{Resource: policy.Resource{ID: "r1"}}
	order := func(want ...identity.Node) {
		t.Helper()
		got := h.Sessions.fitFirst(Route{Resource: resource, Gateways: []identity.Node{gateway1, gateway2}})
		if !slices.Equal(got, want) {
			t.Errorf("asked in order %v, want %v", got, want)
		}
	}
	unreached := func(u Unreached) {
		b, err := json.Marshal(u)
		if err != nil {
			t.Fatal(err)
		}
		g1.notice(tunnel.Notice{Type: NoticeUnreached, Data: b})
	}
	order(gateway1, gateway2)
	unreached(Unreached{"r2": "refused"})
	order(gateway1, gateway2)
	unreached(Unreached{"r1": "refused"})
	order(gateway2, gateway1)
	g1.notice(tunnel.Notice{Type: NoticeUnreached, Data: []byte("{")}) // changes nothing
	order(gateway2, gateway1)
	g2.set(nil, errors.New("not reached"))
	order(gateway1, gateway2) // both are unfit: as they stand
	unreached(Unreached{})
	order(gateway1, gateway2)
	g1.set(nil, errors.New("not reached"))
	g2.set(h.session, nil)
	g2.notice(tunnel.Notice{Type: NoticeUnreached, Data: []byte(`{"r1":"refused"}`)})
	order(gateway2, gateway1) // one that is there may be mistaken about the resource
	g2.notice(tunnel.Notice{Type: NoticeUnreached, Data: []byte("{}")})
	g1.set(h.session, nil)
	g1.notice(tunnel.Notice{Type: tunnel.NoticeDraining, Reason: "upgrade"})
	order(gateway2, gateway1)
	if st := g1.status(); !st.Draining {
		t.Errorf("status %+v", st)
	}
	g1.set(nil, errors.New("over"))
	g1.set(h.session, nil) // a new session knows nothing of the former one
	order(gateway1, gateway2)
}

func TestTellsMore(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&tunnel.ProxyError{Type: tunnel.ConnectionRefused}, false},
		{tunnel.Denied("r", "no"), false},
		{&tunnel.ProxyError{Type: tunnel.DestinationProhibited}, true},
		{&tunnel.ProxyError{Type: tunnel.ConnectionTimeout}, true},
		{&tunnel.ProxyError{Type: tunnel.DestinationUnroutable}, true},
		{&tunnel.ProxyError{Type: tunnel.ConnectionLimit}, true},
		{&tunnel.ProxyError{Type: tunnel.RequestError}, false},
		{fmt.Errorf("x: %w", tunnel.ErrNoSession), true},
		{errors.New("x"), false},
	} {
		if got := tellsMore(fmt.Errorf("gateway office: %w", c.err)); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

// A destination keeps its order, destinations share the gateways of one priority by weight, and priorities stay apart.
func TestSteady(t *testing.T) {
	node := func(id string) identity.Node { return identity.Node{Org: "acme", Kind: identity.Gateway, ID: id} }
	route := Route{
		Resource: &control.ReachableResource{Gateways: []control.ServingGateway{
			{Node: node("last"), Priority: 9, Weight: 100},
			{Node: node("a"), Priority: 1, Weight: 3},
			{Node: node("gone"), Priority: 0},
			{Node: node("b"), Priority: 1, Weight: 1},
			{Node: node("never"), Priority: 1},
		}},
		Gateways: []identity.Node{node("b"), node("never"), node("a"), node("last")},
	}
	seed := maphash.MakeSeed()
	const destinations = 4000
	first := map[string]int{}
	for i := range destinations {
		dst := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		out := steady(seed, route, dst).Gateways
		if len(out) != 4 || out[3].ID != "last" || out[2].ID != "never" {
			t.Fatalf("order %v", out)
		}
		if again := steady(seed, route, dst).Gateways; !slices.Equal(out, again) {
			t.Fatalf("%v was %v", again, out)
		}
		first[out[0].ID]++
	}
	if a := float64(first["a"]) / destinations; a < 0.68 || a > 0.82 {
		t.Errorf("first places %v of %d, want three quarters for a", first, destinations)
	}
	if route.Gateways[0].ID != "b" || route.Resource.Gateways[0].Node.ID != "last" {
		t.Error("the route was reordered")
	}
	itself := Route{Gateways: []identity.Node{node("x"), node("y")}}
	if got := steady(seed, itself, netip.Addr{}); !slices.Equal(got.Gateways, itself.Gateways) {
		t.Errorf("%v", got)
	}
}

// Packets take the gateway that new flows would, but for one whose exchange does not open.
func TestExchangeFor(t *testing.T) {
	h := newHarness(t)
	d := anyDialling()
	d.Gateways = append(d.Gateways, control.GatewayRef{Node: gateway2, Name: "lab"})
	g1 := h.Sessions.gateways[gateway1]
	h.Sessions.gateways[gateway2] = h.newLink(&d.Gateways[1], h.session)
	c := &capture{sessions: h.Sessions, ip: map[identity.Node]*ipExchange{gateway1: {gateway: gateway1}, gateway2: {gateway: gateway2}}}
	x1 := c.ip[gateway1]
	route := Route{Resource: &control.ReachableResource{Resource: policy.Resource{ID: "r1"}}, Gateways: []identity.Node{gateway1, gateway2}}
	taken := func(want identity.Node, when string) {
		t.Helper()
		if got := c.exchangeFor(route).gateway; got != want {
			t.Errorf("%s: packets go to %v, want %v", when, got, want)
		}
	}
	taken(gateway1, "at first")
	g1.notice(tunnel.Notice{Type: tunnel.NoticeDraining})
	taken(gateway2, "while the first drains")
	g1.set(nil, errors.New("over"))
	taken(gateway2, "while the first is not there")
	g1.set(h.session, nil)
	taken(gateway1, "when it is there again")
	x1.opening.Store(time.Now().UnixNano())
	taken(gateway1, "while its exchange opens")
	x1.opening.Store(time.Now().Add(-2 * ipPatience).UnixNano())
	taken(gateway2, "while its exchange does not open")
	x1.opening.Store(0)
	x1.failed.Store(time.Now().UnixNano())
	taken(gateway2, "after its exchange was refused")
	c.ip[gateway2].failed.Store(time.Now().UnixNano())
	taken(gateway1, "when both were refused")
	c.ip[gateway2].failed.Store(0)
	x1.failed.Store(time.Now().Add(-2 * ipShun).UnixNano())
	taken(gateway1, "a while after its exchange was refused")
}
