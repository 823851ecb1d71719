package allocation

import (
	"strings"
	"testing"
	"time"
)

// TestExplain: every relay has a reason that names what decides.
func TestExplain(t *testing.T) {
	const m = time.Millisecond
	relays := []Relay{
		{ID: "a", Name: "fra-1", Healthy: true, Domain: "x"},
		{ID: "b", Name: "fra-2", Healthy: true, Domain: "y"},
		{ID: "c", Name: "fra-3", Healthy: true, Domain: "x"},
		{ID: "d", Name: "ams-1", Healthy: true},
		{ID: "e", Name: "lon-1", Draining: true},
		{ID: "f", Name: "nyc-1", Silent: time.Hour},
		{ID: "g", Name: "par-1", Out: Disabled},
		{ID: "h", Name: "sin-1", Degraded: true},
		{ID: "i", Name: "syd-1", Healthy: true},
		{ID: "j", Name: "mad-1", Healthy: true, Doubt: "not reached from outside"},
		{ID: "k", Name: "zrh-1", Healthy: true},
		{ID: "l", Name: "vie-1", Healthy: true},
		{ID: "m", Name: "prg-1", Healthy: true},
		{ID: "n", Name: "osl-1"},
	}
	g := Gateway{ID: "g1", Exclude: []string{"i"}, RTT: map[string]time.Duration{"a": 30 * m, "b": 60 * m, "c": 12 * m, "d": 64 * m, "h": 10 * m, "j": 30 * m, "k": 100 * m, "l": 20 * m, "m": 45 * m}}
	in := Input{Now: start, Gateways: []Gateway{g, {ID: "g2"}}, Relays: relays, Current: map[string][]string{"g1": {"a", "b"}, "g2": {"d", "b"}}}
	want := map[string]string{
		"fra-1": "kept: healthy", "fra-2": "the second", "fra-3": "may fail together with fra-1: both are of the failure domain x", "ams-1": "alike: it has 1 gateways, fra-2 2",
		"lon-1": "draining", "nyc-1": "unreachable for 1h0m0s", "par-1": "disabled", "sin-1": "degraded, and healthy ones are there", "syd-1": "excluded for this gateway",
		"mad-1": "not reached from outside", "zrh-1": "40 ms farther than fra-2", "vie-1": "40 ms nearer than fra-2: the gateway moves when that has held for 10m0s",
		"prg-1": "15 ms nearer than fra-2, too little for a move: that takes 20 ms", "osl-1": "not in service",
	}
	got := Explain(in, &g, []string{"kept: healthy", "the second"})
	if len(got) != len(relays) || got[0].Place != Active || got[1].Place != Standby || got[0].Active != 1 || got[1].Places != 2 || got[1].RTT != 60*m {
		t.Errorf("%+v", got)
	}
	for _, c := range got {
		if !strings.HasPrefix(c.Why, want[c.Name]) {
			t.Errorf("%s: %q, want %q", c.Name, c.Why, want[c.Name])
		}
	}
	for name, tc := range map[string]struct {
		g       Gateway
		current []string
		relay   string
		why     string
	}{
		"pinned elsewhere":     {Gateway{Pin: []string{"a", "b"}}, []string{"a", "b"}, "d", "fra-1 and fra-2 are pinned"},
		"preferred elsewhere":  {Gateway{Prefer: []string{"a", "b"}}, []string{"a", "b"}, "d", "fra-1 and fra-2 are preferred"},
		"preferred":            {Gateway{Prefer: []string{"d"}}, []string{"a", "b"}, "d", "preferred: the gateway moves to it"},
		"none yet":             {Gateway{}, nil, "d", "free: the gateway gets it next"},
		"one yet":              {Gateway{}, []string{"a"}, "d", "free: the gateway gets a second relay next"},
		"does not answer":      {Gateway{RTT: map[string]time.Duration{"a": m, "b": m}}, []string{"a", "b"}, "d", "its distance is not known: it does not answer"},
		"nothing was measured": {Gateway{}, []string{"a", "b"}, "d", "alike"},
	} {
		tc.g.ID = "g1"
		in.Current = map[string][]string{"g1": tc.current}
		for _, c := range Explain(in, &tc.g, nil) {
			if c.ID == tc.relay && !strings.HasPrefix(c.Why, tc.why) {
				t.Errorf("%s: %q, want %q", name, c.Why, tc.why)
			}
			if c.Why == "" {
				t.Errorf("%s: %s has no reason", name, c.Name)
			}
		}
	}
}
