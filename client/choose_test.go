package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"

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
	g2.set(h.session, nil)
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
