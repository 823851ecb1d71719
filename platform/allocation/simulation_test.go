package allocation

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// world is gateways and relays whose facts a test changes while it lets time pass.
type world struct {
	t      *testing.T
	in     Input
	memory *Memory
	got    map[string]Assignment
	rng    *rand.Rand
}

// newWorld has relays in five regions, each a failure domain of two relays; gateways have a region each, 10 ms from its relays and 80 ms and
// more from the others. A tenth of them measures nothing and has its region as a label alone.
func newWorld(t *testing.T, gateways, relays int) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(6, 7)), in: Input{Now: start}}
	for i := range relays {
		w.in.Relays = append(w.in.Relays, Relay{
			ID: fmt.Sprintf("r%02d", i), Name: fmt.Sprintf("relay-%d", i), Healthy: true, Region: fmt.Sprint(i % 5), Domain: fmt.Sprint("rack", i/10*5+i%5),
		})
	}
	for i := range gateways {
		g := Gateway{ID: fmt.Sprintf("g%05d", i), RTT: map[string]time.Duration{}}
		if i%10 == 2 {
			g.Region = fmt.Sprint(i % 5)
		}
		w.in.Gateways = append(w.in.Gateways, g)
	}
	w.noise(1)
	return w
}

// noise measures a share of the round trips anew: give or take 3 ms.
func (w *world) noise(share float64) {
	for i := range w.in.Gateways {
		if w.in.Gateways[i].Region != "" || share < 1 && w.rng.Float64() >= share {
			continue
		}
		for k, r := range w.in.Relays {
			d := 10 * time.Millisecond
			if k%5 != i%5 {
				d = time.Duration(80+10*((k+5-i%5)%5)) * time.Millisecond
			}
			w.in.Gateways[i].RTT[r.ID] = d + time.Duration(w.rng.Int64N(int64(6*time.Millisecond))) - 3*time.Millisecond
		}
	}
}

// step lets a minute pass and returns how many gateways changed a relay, and how many their active one.
func (w *world) step() (moved, activeMoved int) {
	w.in.Now = w.in.Now.Add(time.Minute)
	w.got, w.memory = Decide(w.in, w.memory)
	current := make(map[string][]string, len(w.got))
	for id, a := range w.got {
		if was := w.in.Current[id]; was != nil && !slices.Equal(was, a.Relays) {
			moved++
			if len(a.Relays) > 0 && was[0] != a.Relays[0] {
				activeMoved++
			}
		}
		current[id] = a.Relays
	}
	w.in.Current = current
	return moved, activeMoved
}

// even fails the test if a relay that takes gateways is more than a tenth off the even share, and checks what must always hold.
func (w *world) even(when string) {
	w.t.Helper()
	active, all, takers := map[string]int{}, map[string]int{}, 0
	byID := map[string]*Relay{}
	for i := range w.in.Relays {
		byID[w.in.Relays[i].ID] = &w.in.Relays[i]
		if w.in.Relays[i].takes() {
			takers++
		}
	}
	for id, a := range w.got {
		if len(a.Relays) != 2 || a.Relays[0] == a.Relays[1] || len(a.Why) != 2 {
			w.t.Fatalf("%s: %s has %v", when, id, a)
		}
		if shares(byID[a.Relays[0]], byID[a.Relays[1]]) {
			w.t.Fatalf("%s: %s has both relays in one failure domain: %v", when, id, a)
		}
		active[a.Relays[0]]++
		all[a.Relays[0]]++
		all[a.Relays[1]]++
	}
	for _, g := range w.in.Gateways {
		have := w.got[g.ID].Relays
		if len(g.Pin) > 0 && byID[g.Pin[0]].takes() && have[0] != g.Pin[0] {
			w.t.Errorf("%s: %s has %v, pinned to %s", when, g.ID, have, g.Pin[0])
		}
		if len(g.Exclude) > 0 && slices.Contains(have, g.Exclude[0]) {
			w.t.Errorf("%s: %s has the excluded %s", when, g.ID, g.Exclude[0])
		}
	}
	n := len(w.got)
	for _, r := range w.in.Relays {
		if !r.takes() {
			if all[r.ID] != 0 && r.Silent >= Patience {
				w.t.Errorf("%s: %s is unreachable and has %d places", when, r.ID, all[r.ID])
			}
			continue
		}
		for what, have := range map[string][2]float64{
			"active": {float64(active[r.ID]), float64(n) / float64(takers)}, "places": {float64(all[r.ID]), 2 * float64(n) / float64(takers)},
		} {
			if have[0] < 0.9*have[1] || have[0] > 1.1*have[1] {
				w.t.Errorf("%s: %s has %v %s, even is %.0f", when, r.ID, have[0], what, have[1])
			}
		}
	}
}

// flat makes all round trips alike but for the noise.
func (w *world) flat() {
	for i := range w.in.Gateways {
		for id := range w.in.Gateways[i].RTT {
			w.in.Gateways[i].RTT[id] = 12*time.Millisecond + time.Duration(w.rng.Int64N(int64(6*time.Millisecond)))
		}
	}
}

func TestSimulation(t *testing.T) {
	w := newWorld(t, 10_000, 50)
	// One in fifty has a relay of its region pinned, one in fifty excludes one; none of this is about the relay that is lost below.
	for i := range w.in.Gateways {
		relay := fmt.Sprintf("r%02d", i%5+5*(2+i/50%8))
		switch i % 50 {
		case 11, 33:
			w.in.Gateways[i].Pin = []string{relay}
		case 14:
			w.in.Gateways[i].Exclude = []string{relay}
		}
	}
	w.step()
	w.even("at first")
	regions := make(map[string]string)
	for _, r := range w.in.Relays {
		regions[r.ID] = r.Region
	}
	for i, g := range w.in.Gateways {
		a := w.got[g.ID].Relays
		if region := fmt.Sprint(i % 5); regions[a[0]] != region || regions[a[1]] != region {
			t.Fatalf("gateway %d has %v although it has ten relays at 10 ms, or of its region %s", i, a, region)
		}
	}
	for range 13 {
		w.noise(0.05)
		if moved, _ := w.step(); moved != 0 {
			t.Fatalf("%d gateways moved for noise", moved)
		}
	}

	// A relay is lost. Silent for less than Patience it keeps its places; then they go to all the others of its region.
	before := w.in.Current
	lost := &w.in.Relays[7]
	had, hadActive := 0, 0
	for _, rs := range before {
		if slices.Contains(rs, lost.ID) {
			had++
		}
		if rs[0] == lost.ID {
			hadActive++
		}
	}
	lost.Healthy, lost.Silent = false, Patience/2
	if moved, _ := w.step(); moved != 0 {
		t.Fatalf("%d gateways moved from a relay that is silent for a moment", moved)
	}
	lost.Silent = Patience
	moved, activeMoved := w.step()
	if moved != had || activeMoved != hadActive {
		t.Errorf("%d moved, %d of their active relay; %d had a place and %d an active one at the lost relay", moved, activeMoved, had, hadActive)
	}
	took := map[string]int{}
	for id, rs := range before {
		if rs[0] == lost.ID {
			took[w.in.Current[id][0]]++
		}
	}
	if len(took) < 8 { // ten in the region, one of them lost, one in its failure domain
		t.Errorf("the lost relay's active gateways went to %d relays: %v", len(took), took)
	}
	for id, n := range took {
		if n > hadActive/3 {
			t.Errorf("%s got %d of %d active gateways of the lost relay", id, n, hadActive)
		}
	}
	lost.Silent = time.Hour
	for range 3 {
		if moved, _ := w.step(); moved != 0 {
			t.Fatalf("%d gateways moved although nothing happened", moved)
		}
	}

	// It comes back: nothing for Long, then slowly, then nothing again.
	lost.Healthy, lost.Silent = true, 0
	total := 0
	for i := range 40 {
		moved, _ := w.step()
		if i < int(Long/time.Minute) && moved != 0 {
			t.Fatalf("%d gateways moved %d minutes after the return", moved, i)
		}
		if moved > 51 {
			t.Fatalf("%d gateways moved in a minute", moved)
		}
		total += moved
	}
	if total == 0 || total > had+2*hadActive {
		t.Errorf("%d moves filled a relay that had %d places", total, had)
	}
	t.Logf("lost: %d moves for %d places; return: %d moves", had, had, total)
	w.even("after the return")
	if moved, _ := w.step(); moved != 0 {
		t.Errorf("%d gateways still move", moved)
	}

	// A relay that gateways are pinned to drains, and is back: they go and come back at once, and nobody else with them.
	drained, pinned := &w.in.Relays[11], 0 // r11
	for _, g := range w.in.Gateways {
		if slices.Contains(g.Pin, drained.ID) {
			pinned++
		}
	}
	drained.Draining = true
	w.step()
	for _, g := range w.in.Gateways {
		if a := w.got[g.ID]; slices.Contains(a.Relays, drained.ID) {
			t.Fatalf("%s still has the drained relay", g.ID)
		} else if slices.Contains(g.Pin, drained.ID) && !strings.Contains(a.Why[0], "relay-11 is pinned, but draining") {
			t.Fatalf("%s: %q", g.ID, a.Why)
		}
	}
	drained.Draining = false
	if moved, _ := w.step(); pinned == 0 || moved != pinned {
		t.Errorf("%d gateways moved when the pinned relay of %d was back", moved, pinned)
	}
}

// TestLoad: what relays carry besides counts as places, and a change of it moves only who has to make room.
func TestLoad(t *testing.T) {
	w := newWorld(t, 600, 10)
	for i := range w.in.Gateways {
		w.in.Gateways[i].Region = ""
	}
	w.noise(1)
	w.flat()
	w.in.Relays[0].Load = 30 // heartbeats tell of as much traffic as thirty gateways more
	w.step()
	places, active := map[string]int{}, map[string]int{}
	for _, a := range w.got {
		active[a.Relays[0]]++
		places[a.Relays[0]]++
		places[a.Relays[1]]++
	}
	first := w.in.Relays[0].ID
	if even := (1200+30)/10 - 30; places[first] < even*9/10 || places[first] > even*11/10 {
		t.Errorf("the loaded relay has %d places, even is %d", places[first], even)
	}
	if even := (600+30)/10 - 30; active[first] < even*9/10 || active[first] > even*11/10 {
		t.Errorf("the loaded relay has %d active gateways, even is %d", active[first], even)
	}
	w.in.Relays[0].Load = 31 // a little more moves nobody
	for range 15 {
		if moved, _ := w.step(); moved != 0 {
			t.Fatalf("%d gateways moved for a little load", moved)
		}
	}
}

// TestEquals spreads gateways that are as near to every relay over all of them, through the loss and return of some.
func TestEquals(t *testing.T) {
	w := newWorld(t, 600, 10)
	w.flat()
	w.step()
	w.even("at first")
	for i := range w.in.Relays {
		if i < 3 {
			w.in.Relays[i].Healthy, w.in.Relays[i].Silent = false, 2*Patience
		}
	}
	w.step()
	n := map[string]int{}
	for _, a := range w.got {
		n[a.Relays[0]]++
		n[a.Relays[1]]++
	}
	for id, have := range n {
		if mean := 1200 / 7; have < mean*8/10 || have > mean*12/10 {
			t.Errorf("%s has %d places just after the loss of three of ten, even is %d", id, have, mean)
		}
	}
	for range 30 {
		w.step()
	}
	for i := range w.in.Relays {
		w.in.Relays[i].Healthy, w.in.Relays[i].Silent = true, 0
	}
	for range 300 {
		w.step()
	}
	w.even("after the return")
}

func TestTwoGatewaysOfEqualRTT(t *testing.T) {
	near := map[string]time.Duration{"a": 10 * time.Millisecond, "b": 10 * time.Millisecond}
	got, _ := Decide(Input{Now: start, Relays: healthy("a", "b"), Gateways: []Gateway{{ID: "g1", RTT: near}, {ID: "g2", RTT: near}}}, nil)
	if got["g1"].Relays[0] == got["g2"].Relays[0] {
		t.Errorf("both are active on the same relay: %v", got)
	}
}

// one is a world of a single gateway.
func one(t *testing.T, g Gateway, relays []Relay, current ...string) *world {
	g.ID = "g"
	w := &world{t: t, in: Input{Now: start, Gateways: []Gateway{g}, Relays: relays}}
	if len(current) > 0 {
		w.in.Current = map[string][]string{"g": current}
	}
	return w
}

func TestWishes(t *testing.T) {
	labelled := healthy("a", "b", "c")
	labelled[0].Domain, labelled[1].Domain = "x", "x"
	labelled[0].Region, labelled[1].Region, labelled[2].Region = "eu", "us", "us"
	down := healthy("a", "b", "c")
	down[0].Healthy, down[0].Silent = false, Patience
	rtts := map[string]time.Duration{"a": 50 * time.Millisecond, "b": 12 * time.Millisecond, "c": 14 * time.Millisecond}
	for name, tc := range map[string]struct {
		g       Gateway
		relays  []Relay
		current []string
		minutes int
		want    []string
		why     string // part of the first place's reason
	}{
		"nearest first":                   {g: Gateway{RTT: rtts, Exclude: []string{"c"}}, relays: healthy("a", "b", "c"), want: []string{"b", "a"}, why: "12 ms"},
		"pinned":                          {g: Gateway{RTT: rtts, Pin: []string{"a"}, Exclude: []string{"c"}}, relays: healthy("a", "b", "c"), want: []string{"a", "b"}, why: "pinned"},
		"pinned at once":                  {g: Gateway{Pin: []string{"c"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, want: []string{"c", "a"}, why: "pinned"},
		"pinned both":                     {g: Gateway{Pin: []string{"c", "a"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, want: []string{"c", "a"}, why: "pinned"},
		"pinned, for ever":                {g: Gateway{RTT: rtts, Pin: []string{"a"}, Exclude: []string{"c"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, minutes: 30, want: []string{"a", "b"}, why: "kept: pinned"},
		"pinned is unreachable":           {g: Gateway{Pin: []string{"a"}, Exclude: []string{"c"}}, relays: append(down, healthy("d")...), current: []string{"a", "b"}, want: []string{"b", "d"}, why: "kept"},
		"excluded, though pinned":         {g: Gateway{Pin: []string{"a"}, Exclude: []string{"a"}}, relays: healthy("a", "b"), current: []string{"a", "b"}, want: []string{"b"}, why: "kept"},
		"all excluded":                    {g: Gateway{Exclude: []string{"a"}}, relays: healthy("a"), current: []string{"a"}, why: "none: every usable relay is excluded"},
		"none":                            {why: "none: no relay is usable"},
		"preferred before nearer":         {g: Gateway{RTT: rtts, Prefer: []string{"a"}, Exclude: []string{"c"}}, relays: healthy("a", "b", "c"), want: []string{"a", "b"}, why: "preferred"},
		"preferred, soon":                 {g: Gateway{Prefer: []string{"c"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, minutes: 5, want: []string{"a", "b"}, why: "kept"},
		"preferred, later":                {g: Gateway{Prefer: []string{"c"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, minutes: 12, want: []string{"c", "a"}, why: "c: preferred to a"},
		"another failure domain":          {g: Gateway{Prefer: []string{"a", "b"}}, relays: labelled, current: []string{"a"}, want: []string{"a", "c"}, why: "kept"},
		"another failure domain, later":   {relays: labelled, current: []string{"a", "b"}, minutes: 12, want: []string{"a", "c"}, why: "kept"},
		"the only failure domain":         {relays: labelled[:2], current: []string{"a"}, want: []string{"a", "b"}},
		"own region, while none measured": {g: Gateway{Region: "eu", Exclude: []string{"b"}}, relays: labelled, want: []string{"a", "c"}},
		"much better, soon":               {g: Gateway{RTT: rtts, Exclude: []string{"c"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, minutes: 5, want: []string{"a", "b"}, why: "kept: healthy, 50 ms"},
		"much better, later":              {g: Gateway{RTT: rtts, Exclude: []string{"c"}}, relays: healthy("a", "b", "c"), current: []string{"a", "b"}, minutes: 12, want: []string{"b", "a"}, why: "12 ms, 38 ms better than a"},
		"a little better, never":          {g: Gateway{RTT: rtts}, relays: healthy("b", "c"), current: []string{"c", "b"}, minutes: 60, want: []string{"c", "b"}, why: "kept"},
		"not known is no reason":          {g: Gateway{RTT: map[string]time.Duration{"a": time.Second}}, relays: healthy("a", "b"), current: []string{"a", "b"}, minutes: 60, want: []string{"a", "b"}, why: "kept: healthy, 1000 ms"},
		"degraded, later":                 {relays: []Relay{{ID: "a", Degraded: true}, {ID: "b", Healthy: true}}, current: []string{"a", "b"}, minutes: 12, want: []string{"b", "a"}, why: "healthy, a has been degraded"},
		"pinned is deleted":               {g: Gateway{Pin: []string{"x"}}, relays: append(healthy("a", "b"), Relay{ID: "x", Name: "fra-1", Out: Deleted}), want: []string{"b", "a"}, why: "fra-1 is pinned, but deleted"},
		"pinned comes back":               {g: Gateway{Pin: []string{"c"}, RTT: rtts}, relays: healthy("a", "b", "c"), current: []string{"b", "a"}, want: []string{"c", "b"}, why: "pinned"},
		"pinned drains":                   {g: Gateway{Pin: []string{"a"}, Exclude: []string{"c"}}, relays: append([]Relay{{ID: "a", Draining: true}}, healthy("b", "d")...), current: []string{"a", "b"}, want: []string{"b", "d"}, why: "a is pinned, but draining"},
		"pinned of another domain first":  {g: Gateway{Pin: []string{"b"}}, relays: labelled, want: []string{"b", "c"}, why: "pinned"},
		"disabled":                        {relays: append(healthy("b"), Relay{ID: "a", Name: "fra-1", Out: Disabled}), current: []string{"a"}, want: []string{"b"}, why: "moved from fra-1: disabled"},
		"out, though all there is":        {relays: []Relay{{ID: "a", Out: "in us, and not allowed"}}, current: []string{"a"}, why: "none: no relay is usable, and a is in us, and not allowed"},
		"a doubt keeps new ones away":     {g: Gateway{RTT: rtts}, relays: []Relay{{ID: "b", Healthy: true, Doubt: "not reached"}, {ID: "a", Healthy: true}}, want: []string{"a", "b"}, why: "50 ms"},
		"a doubt moves nobody":            {relays: append(healthy("b", "c"), Relay{ID: "a", Healthy: true, Doubt: "not reached"}), current: []string{"a", "b"}, minutes: 60, want: []string{"a", "b"}, why: "kept: healthy"},
		"a doubt, but nothing else":       {relays: []Relay{{ID: "a", Healthy: true, Doubt: "not reached"}}, want: []string{"a"}, why: "not reached, but no better one is free"},
		"no move to a doubt":              {g: Gateway{RTT: rtts}, relays: append(healthy("a"), Relay{ID: "b", Healthy: true, Doubt: "not reached"}), current: []string{"a", "b"}, minutes: 30, want: []string{"a", "b"}, why: "kept"},
		"draining":                        {relays: []Relay{{ID: "f", Name: "fra-1", Draining: true}, {ID: "b", Healthy: true}}, current: []string{"f"}, want: []string{"b"}, why: "moved from fra-1: draining; b: "},
	} {
		w := one(t, tc.g, tc.relays, tc.current...)
		for range tc.minutes + 1 {
			w.step()
		}
		got := w.got["g"]
		if !slices.Equal(got.Relays, tc.want) || len(got.Why) != max(1, len(tc.want)) || !strings.Contains(got.Why[0], tc.why) {
			t.Errorf("%s: %v, want %v, %q", name, got, tc.want, tc.why)
		}
	}
}

// TestReasonStays says of a kept relay why it was chosen, and when.
func TestReasonStays(t *testing.T) {
	w := one(t, Gateway{}, []Relay{{ID: "a", Name: "fra-1", Draining: true}, {ID: "b", Healthy: true}}, "a")
	w.step()
	w.step()
	if why := w.got["g"].Why[0]; why != "kept: healthy (since 2026-05-04 12:01 UTC: moved from fra-1: draining; b: the best that is free)" {
		t.Error(why)
	}
}

// FuzzDecide checks what must hold for whatever happens.
func FuzzDecide(f *testing.F) {
	for i := range uint64(40) {
		f.Add(i, uint8(i%7), uint8(i%5))
	}
	f.Fuzz(func(t *testing.T, seed uint64, nRelays, nGateways uint8) {
		rng := rand.New(rand.NewPCG(seed, 1))
		in := Input{Now: start, Current: map[string][]string{}}
		var ids []string
		for i := range int(nRelays % 9) {
			ids = append(ids, fmt.Sprint("r", i))
			in.Relays = append(in.Relays, Relay{ID: ids[i]})
		}
		some := func() (out []string) {
			for _, id := range ids {
				if rng.IntN(5) == 0 {
					out = append(out, id)
				}
			}
			return out
		}
		for i := range int(nGateways % 9) {
			in.Gateways = append(in.Gateways, Gateway{ID: fmt.Sprint("g", i), Pin: some(), Exclude: some(), Prefer: some(), RTT: map[string]time.Duration{}})
		}
		var memory *Memory
		for range 30 {
			in.Now = in.Now.Add(time.Duration(rng.IntN(300)) * time.Second)
			for i := range in.Relays {
				r := &in.Relays[i]
				if rng.IntN(4) != 0 {
					continue
				}
				*r = Relay{ID: r.ID, Load: float64(rng.IntN(3)), Domain: []string{"", "x", "y"}[rng.IntN(3)]}
				switch rng.IntN(8) {
				case 3:
					r.Healthy, r.Out = true, Disabled
				case 4:
					r.Healthy, r.Doubt = true, "not reached"
				case 0:
					r.Silent = time.Duration(rng.IntN(120)+1) * time.Second
				case 1:
					r.Draining = true
				case 2:
					r.Degraded = true
				default:
					r.Healthy = true
				}
				for _, g := range in.Gateways {
					g.RTT[r.ID] = time.Duration(rng.IntN(200)) * time.Millisecond
				}
			}
			for i := range in.Gateways {
				g := &in.Gateways[i]
				for _, c := range Explain(in, g, nil) {
					if c.Why == "" {
						t.Fatalf("%s: no reason about %s", g.ID, c.ID)
					}
				}
			}
			got, next := Decide(in, memory)
			if again, _ := Decide(in, memory); fmt.Sprint(again) != fmt.Sprint(got) {
				t.Fatalf("two answers: %v, %v", got, again)
			}
			memory = next
			for _, g := range in.Gateways {
				check(t, in, g, got[g.ID])
				in.Current[g.ID] = got[g.ID].Relays
			}
		}
	})
}

func check(t *testing.T, in Input, g Gateway, a Assignment) {
	t.Helper()
	if len(a.Relays) > Legs || len(a.Relays) == Legs && a.Relays[0] == a.Relays[1] || len(a.Why) != max(1, len(a.Relays)) || slices.Contains(a.Why, "") {
		t.Fatalf("%s: %v", g.ID, a)
	}
	byID, usable, free := map[string]*Relay{}, 0, 0
	for i := range in.Relays {
		r := &in.Relays[i]
		byID[r.ID] = r
		if slices.Contains(g.Exclude, r.ID) {
			continue
		}
		if r.takes() {
			usable++
		}
		if r.takes() && !slices.Contains(a.Relays, r.ID) {
			free++
		}
	}
	if len(a.Relays) < min(Legs, usable) {
		t.Fatalf("%s has %v although %d relays are usable", g.ID, a, usable)
	}
	for _, id := range a.Relays {
		if slices.Contains(g.Exclude, id) {
			t.Fatalf("%s has the excluded %s", g.ID, id)
		}
		if byID[id].Out != "" {
			t.Fatalf("%s has %s, which is out: %v", g.ID, id, a)
		}
		if r := byID[id]; !r.keeps() && (free > 0 || len(a.Relays) > 1) {
			t.Fatalf("%s has %s, %s, while another is usable: %v", g.ID, id, r.state(), a)
		}
	}
	for _, id := range g.Pin {
		if r := byID[id]; r.takes() && !slices.Contains(g.Exclude, id) {
			if len(a.Relays) == 0 || (a.Relays[0] != id && !slices.Contains(g.Pin[:slices.Index(g.Pin, id)], a.Relays[0])) {
				t.Fatalf("%s has %v, pinned %v", g.ID, a, g.Pin)
			}
			break
		}
	}
}
