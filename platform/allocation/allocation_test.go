package allocation

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"
)

func healthy(ids ...string) []Relay {
	var out []Relay
	for _, id := range ids {
		out = append(out, Relay{ID: id, Healthy: true})
	}
	return out
}

// assign is one decision of gateways without measurements.
func assign(ids []string, relays []Relay, current map[string][]string) map[string][]string {
	in := Input{Now: start, Relays: relays, Current: current}
	for _, id := range ids {
		in.Gateways = append(in.Gateways, Gateway{ID: id})
	}
	got, _ := Decide(in, nil)
	out := make(map[string][]string)
	for g, a := range got {
		if len(a.Relays) > 0 {
			out[g] = a.Relays
		}
	}
	return out
}

var start = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func TestSpread(t *testing.T) {
	var gateways []string
	for i := range 30 {
		gateways = append(gateways, fmt.Sprintf("g%02d", i))
	}
	relays := healthy("a", "b", "c")
	got := assign(gateways, relays, nil)
	active, all := map[string]int{}, map[string]int{}
	for g, rs := range got {
		if len(rs) != Legs || rs[0] == rs[1] {
			t.Fatalf("%s: %v", g, rs)
		}
		active[rs[0]]++
		all[rs[0]]++
		all[rs[1]]++
	}
	for _, r := range relays {
		if active[r.ID] != 10 || all[r.ID] < 19 || all[r.ID] > 21 {
			t.Errorf("relay %s: %d active, %d in all, want 10 and about 20", r.ID, active[r.ID], all[r.ID])
		}
	}
	slices.Reverse(gateways)
	slices.Reverse(relays)
	if again := assign(gateways, relays, nil); !reflect.DeepEqual(got, again) {
		t.Error("another order of input, another answer")
	}
	if again := assign(gateways, append(relays, healthy("d")...), got); !reflect.DeepEqual(got, again) {
		t.Error("a new relay moved somebody")
	}
}

func TestAssign(t *testing.T) {
	silent := func(d time.Duration) Relay { return Relay{ID: "a", Silent: d} }
	for name, tc := range map[string]struct {
		relays  []Relay
		current []string
		want    []string
	}{
		"no relay":                  {nil, nil, nil},
		"one relay":                 {healthy("a"), nil, []string{"a"}},
		"a second comes":            {healthy("a", "b"), []string{"b"}, []string{"b", "a"}},
		"healthy before degraded":   {[]Relay{{ID: "a", Degraded: true}, {ID: "b", Healthy: true}}, nil, []string{"b", "a"}},
		"less load first":           {[]Relay{{ID: "a", Healthy: true, Load: 3}, {ID: "b", Healthy: true}}, nil, []string{"b", "a"}},
		"silent for a while":        {append(healthy("b", "c"), silent(Patience-1)), []string{"a", "b"}, []string{"a", "b"}},
		"silent for too long":       {append(healthy("b", "c"), silent(Patience)), []string{"a", "b"}, []string{"b", "c"}},
		"silent takes nobody":       {append(healthy("b"), silent(1)), nil, []string{"b"}},
		"draining is left":          {append(healthy("b", "c"), Relay{ID: "a", Draining: true}), []string{"a", "b"}, []string{"b", "c"}},
		"draining takes nobody":     {[]Relay{{ID: "a", Healthy: true, Draining: true}}, nil, nil},
		"draining but all there is": {[]Relay{{ID: "a", Draining: true}}, []string{"a"}, []string{"a"}},
		"silent but all there is":   {[]Relay{silent(time.Hour)}, []string{"a"}, []string{"a"}},
		"deleted":                   {healthy("b"), []string{"a"}, []string{"b"}},
		"degraded keeps its place":  {append(healthy("b"), Relay{ID: "a", Degraded: true}), []string{"a", "b"}, []string{"a", "b"}},
		"never the same twice":      {healthy("a"), []string{"a", "a"}, []string{"a"}},
	} {
		var current map[string][]string
		if tc.current != nil {
			current = map[string][]string{"g": tc.current}
		}
		if got := assign([]string{"g"}, tc.relays, current)["g"]; !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
