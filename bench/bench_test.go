package bench

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// sample is a result with something of every kind.
func sample() *Result {
	relay := &Outcome{
		Scenario: OneRelay, About: "One relay.", MTU: 1500,
		Throughput: []Throughput{
			{Way: Raw, Flows: 1, BitsPerSecond: 10e9, Bytes: 1e9},
			{Way: Sallyway, Flows: 1, BitsPerSecond: 400e6, Bytes: 2e9, CPU: map[string]float64{"office": 10, "laptop": 12}, Relay: &Bundles{Packet: 9000, Read: 20000, Write: 30000, Dropped: 4}},
			{Way: Sallyway, Flows: 1, BitsPerSecond: 600e6, Bytes: 1e9, CPU: map[string]float64{"office": 7, "laptop": 8}},
			{Way: Sallyway, Flows: 1, BitsPerSecond: 500e6, Bytes: 1e9, CPU: map[string]float64{"office": 6, "laptop": 8}},
			{Way: Raw, Flows: 1, Down: true, BitsPerSecond: 8e9, Bytes: 1e9},
			{Way: Sallyway, Flows: 1, Down: true, BitsPerSecond: 200e6, Bytes: 0, CPU: map[string]float64{"office": 1}},
			{Way: WireGuardGo, Flows: 1, BitsPerSecond: 250e6, Bytes: 1e9, CPU: map[string]float64{"hub": 3, "agent": 4, "client": 5}},
			{Way: OpenSSH, Flows: 1, BitsPerSecond: 1e9},
		},
		Rates: []Rate{
			{Way: Raw, Wanted: 50e6, BitsPerSecond: 50e6},
			{Way: Sallyway, Wanted: 50e6, BitsPerSecond: 49e6, Lost: 2, Jitter: 0.5, Bytes: 1e9, CPU: map[string]float64{"office": 20}},
			{Way: Sallyway, Wanted: 50e6, BitsPerSecond: 47e6, Lost: 6, Jitter: 0.7, Bytes: 1e9, CPU: map[string]float64{"office": 30}},
		},
		Latency:   []Latency{{Way: Raw, RTT50: 0.04, RTT99: 0.1}, {Way: Sallyway, RTT50: 0.8, RTT99: 2}},
		Datagrams: []Datagram{{Way: Raw, RTT50: 0.02, Sent: 10}, {Way: Sallyway, RTT50: 0.15, Sent: 10, Lost: 1}, {Way: ForwardedUDP, RTT50: 0.05, Sent: 10}},
		Loaded:    []Loaded{{Way: Sallyway, RTT50: 3, RTT99: 25, Beats: 100}},
		Setup:     []Setup{{Way: Sallyway, Warm50: 0.5, Cold: []float64{20, 22, 30}, Many: 1000, ManyTook: 200}},
		Memory:    []Memory{{Way: Sallyway, Process: "office", Idle: 30 << 20, Loaded: 60 << 20}},
		Again:     []string{OpenVPN + ": a hiccup\nmore"},
		Missing:   []Missing{{Nebula, "nebula is not installed: apt-get install nebula\nmore"}},
	}
	relay.Standings = standings(relay.Throughput)
	long := &Outcome{
		Scenario: longLink(80, 0.5, 100).Name, Link: linkOf(longLink(80, 0.5, 100).Lab.Access),
		Throughput: []Throughput{{Way: Raw, Flows: 1, BitsPerSecond: 5e6}, {Way: Sallyway, Flows: 1, BitsPerSecond: 20e6}},
		Ceiling:    []Ceiling{{BitsPerSecond: 97e6}},
	}
	long.Standings = standings(long.Throughput)
	two := &Outcome{
		Scenario: TwoRelays,
		Spread:   []Spread{{Alone: [2]float64{1e9, 2e9}, Together: [2]float64{1e9, 1.5e9}, Paths: [2]string{"relay-1 | udp", "relay-2"}}},
		Moves:    []Move{{How: Killed, Load: "up", Silence: 80, Before: 10, Lived: true}, {How: Killed, Load: "up", Silence: 400, Before: 12}},
	}
	return &Result{
		Format: format, Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Command: []string{"bench", "--quick"}, Scenarios: []*Outcome{relay, long, two},
		Versions: map[string]string{"gatewayd": "v1"},
	}
}

func TestStandings(t *testing.T) {
	o := sample().Scenarios[0]
	own := o.standing(Sallyway, 1, false)
	if own.Median != 500e6 || own.Low != 400e6 || own.High != 600e6 || own.Runs != 3 || own.OfRaw != 0.05 || own.OfWireGuard != 2 || own.SallywayTimes != 1 || own.CPUPerGB != 14 {
		t.Errorf("Sallyway: %+v", own)
	}
	if wg := o.standing(WireGuardGo, 1, false); wg.CPUPerGB != 12 || wg.SallywayTimes != 2 || wg.OfWireGuard != 1 {
		t.Errorf("wireguard-go: %+v", wg)
	}
	if down := o.standing(Sallyway, 1, true); down.OfWireGuard != 0 || down.CPUPerGB != 0 || down.OfRaw != 0.025 {
		t.Errorf("down, without a peer and without bytes: %+v", down)
	}
	if o.Standings[0].Down || !o.Standings[len(o.Standings)-1].Down {
		t.Errorf("up does not come first: %+v", o.Standings)
	}
	rows := o.perProcess(Sallyway)
	if len(rows) != 1 || rows[0].perGB["office"] != 6 || rows[0].perGB["laptop"] != 8 {
		t.Errorf("processes: %+v", rows)
	}
	if got := median([]float64{4, 1, 3, 2}); got != 2.5 {
		t.Errorf("median of an even number: %v", got)
	}
}

func TestMarkdown(t *testing.T) {
	md := sample().markdown("x")
	for _, want := range []string{
		"| one-relay | 1 | 500 / 200 | 5.0 % / 2.5 % | 2.00 / – | 14.0 / – | 0.80 / 2.00 |",
		"| " + WireGuardGo + " | 1 | up | 250 | 250–250 | 1 | 12.0 | 2.5 % | 1.00 | 2.00 × |",
		"| " + OpenSSH + " | 1 | up | 1000 | 1000–1000 | 1 | – | 10.0 % | 4.00 | 0.50 × |",
		"| 1 flow | up | 8.0 | 6.0 |",
		"| 1 flow | up | 9000 | 20000 | 30000 | 4 |",
		"| Sallyway | 0.150 | 0.000 | 1 of 10 | 100 |",
		"| raw UDP | 50 | up | 50.0 | 0.00 | 0.000 | – |",
		"| Sallyway | 50 | up | 48.0 | 4.00 | 0.600 | 25.0 |",
		"| Sallyway | 0.50 | 22 | 1000 | 200 | 0 |",
		"| 80 ms, 0.5 %, 100 Mbit/s | 97.0 / – | 5.00 / – | 20.0 / – | 400.0 % / – |",
		"| one flow each | up | 1000 | 2000 | 2500 | relay-1 \\| udp and relay-2 |",
		"| killed | up | 240 (400) | 11 | 1 | 2 |",
		"| added to raw UDP forwarding, idle, p50 | ≤ 150 µs | 100 µs | holds |",
		"| exchange beside one flow up, p99 | ≤ 20.0 ms | 25.0 ms | missed |",
		"| one flow up next to " + WireGuardGo + " | ≥ 0.80 × | 2.00 × | holds |",
		"- " + Nebula + " (one-relay): nebula is not installed: apt-get install nebula\n",
		"- " + OpenVPN + ": a hiccup (one-relay)\n",
		"![TCP throughput through a relay](x-throughput.svg)",
		"- gatewayd: v1\n",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if t.Failed() {
		t.Log(md)
	}
	if strings.Contains(sample().Markdown(), "![") {
		t.Error("without a folder, pictures are named")
	}
}

func TestWriteAndRead(t *testing.T) {
	dir := t.TempDir()
	paths, err := sample().Write(dir)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(filepath.Base(p), "20260102-030405")
		kinds = append(kinds, name)
		if strings.HasSuffix(p, ".svg") {
			wellFormed(t, p, string(b))
		}
		if strings.HasSuffix(p, ".json") {
			back, err := Read(p)
			if err != nil || len(back.Scenarios) != 3 || back.Scenarios[0].standing(Sallyway, 1, false).Median != 500e6 {
				t.Errorf("%s: %v", p, err)
			}
		}
	}
	want := []string{"-latency.svg", "-links.svg", "-moves.svg", "-processor.svg", "-scenarios.svg", "-throughput.svg", ".json", ".md"}
	slices.Sort(kinds)
	if !slices.Equal(kinds, want) {
		t.Errorf("files %q, want %q", kinds, want)
	}
	for name, doc := range map[string]any{"older": map[string]any{"throughput": []Throughput{{Way: Raw}}}, "other": map[string]any{"format": 99, "scenarios": []Outcome{{}}}} {
		b, _ := json.Marshal(doc) // of plain values
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(path); err == nil {
			t.Errorf("%s is read", name)
		}
	}
}

// wellFormed checks that a picture is XML, and returns its texts.
func wellFormed(t *testing.T, name, svg string) []string {
	t.Helper()
	var texts []string
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		tok, err := d.Token()
		if errors.Is(err, io.EOF) {
			return texts
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if c, ok := tok.(xml.CharData); ok && strings.TrimSpace(string(c)) != "" {
			texts = append(texts, string(c))
		}
	}
}

func TestChart(t *testing.T) {
	evil := `<script>"a" & 'b'</script>`
	c := chart{
		title: evil, about: evil, where: evil, unit: evil, format: "%.0f", legend: []legendEntry{{ownStrong, evil}},
		rows: []chartRow{{label: evil, marks: []mark{{parts: []part{{value: 5, colour: ownStrong, label: "x<y"}}, text: evil, low: 4, high: 6}, {dots: []float64{3}, colour: ownPale}, {low: 1, high: 2, colour: ownPale}}}},
	}
	for _, logarithmic := range []bool{false, true} {
		c.log = logarithmic
		texts := wellFormed(t, "chart", c.svg())
		n := 0
		for _, s := range texts {
			if s == evil {
				n++
			}
		}
		if n != 7 || !slices.Contains(texts, "x<y") {
			t.Errorf("log %v: the texts come out as %q", logarithmic, texts)
		}
	}
	wellFormed(t, "empty", chart{rows: []chartRow{{label: "nothing", marks: []mark{{}}}}}.svg())
}

func TestAxis(t *testing.T) {
	for _, c := range []struct {
		low, high   float64
		log         bool
		first, last float64
	}{
		{3, 10, false, 0, 10}, {1, 4321, false, 0, 4000}, {0.01, 0.07, false, 0, 0.07}, {0.04, 320, true, 0.01, 1000}, {0, 0, true, 1, 10}, {1, 10, true, 1, 10},
	} {
		a := newAxis(c.low, c.high, c.log)
		ticks := a.ticks()
		if n := len(ticks); n < 2 || n > 12 || ticks[0] != c.first || ticks[n-1] < c.last*0.999 || ticks[n-1] > c.last*1.001 {
			t.Errorf("%v to %v, log %v: ticks %v", c.low, c.high, c.log, ticks)
		}
		if a.x(c.low) < plotLabels || a.x(c.high) > plotWidth-plotRight {
			t.Errorf("%v to %v, log %v: drawn at %v to %v", c.low, c.high, c.log, a.x(c.low), a.x(c.high))
		}
	}
}

func TestCompare(t *testing.T) {
	a, b := sample(), sample()
	b.Machine.Kernel = "7.0"
	for i := range b.Scenarios[0].Throughput {
		b.Scenarios[0].Throughput[i].BitsPerSecond *= 2
	}
	b.Scenarios[0].Rates = nil
	a.Relay = []Forwarded{{Server: OwnRelay, Link: Veth, Pairs: 1, Segments: 44, Runs: 5, BitsPerSecond: 9e9, Low: 8e9, High: 10e9, CPUPerGB: 0.5}}
	b.Join(&Result{Relay: []Forwarded{{Server: OwnRelay, Link: Veth, Pairs: 1, Segments: 44, Runs: 4, BitsPerSecond: 6e9, Low: 5e9, High: 7e9, CPUPerGB: 0.5}}})
	var text strings.Builder
	if err := Compare(&text, a, b, false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"The kernel differs:  and 7.0.",
		"| one-relay | Sallyway | 1 flow up | Mbit/s | 500.0 (400.0–600.0, 3) | 1000.0 (800.0–1200.0, 3) | +100.0 % | beyond |",
		"| one-relay | Sallyway | 1 flow up, processor | s/GB | 14.00 (11.00–15.00, 3) | 14.00 (11.00–15.00, 3) | +0.0 % |  |",
		"| one-relay | Sallyway | 1 flow down | Mbit/s | 200.0 | 400.0 | +100.0 % |  |",
		"| two-relays | Sallyway | silence, relay killed, load up | ms | 240 (80–400, 2) | 240 (80–400, 2) | +0.0 % |  |",
		"| relay alone | Sallyway relay | veth, 1 pairs, 44 segments | Gbit/s | 9.00 (8.00–10.00, 5) | 6.00 (5.00–7.00, 4) | -33.3 % | beyond |",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(text.String(), "UDP at") || strings.Contains(text.String(), WireGuardGo) {
		t.Error("it lists what only one has, or the ways of others")
	}
	if t.Failed() {
		t.Log(text.String())
	}
	text.Reset()
	if err := Compare(&text, a, b, true); err != nil || !strings.Contains(text.String(), "| one-relay | "+WireGuardGo+" | 1 flow up | Mbit/s | 250.0 | 500.0 | +100.0 % |  |") {
		t.Errorf("all ways: %v\n%s", err, text.String())
	}
	text.Reset()
	if err := Compare(&text, a, &Result{}, true); err != nil || !strings.Contains(text.String(), "no figure in common") {
		t.Errorf("nothing in common: %v\n%s", err, text.String())
	}
}

func TestScenarios(t *testing.T) {
	known := Topologies()
	var names []string
	for _, p := range peers() {
		names = append(names, p.name)
	}
	for what, all := range map[string][]Scenario{"full": Full(), "quick": Quick()} {
		seen := make(map[string]bool)
		for _, s := range all {
			if seen[s.Name] || strings.ContainsAny(s.Name, " ,/") {
				t.Errorf("%s: %q is twice there, or is no name for a command line", what, s.Name)
			}
			seen[s.Name] = true
			if _, ok := find(known, s.Name); !ok || s.About == "" {
				t.Errorf("%s: %q is no topology, or says nothing about itself", what, s.Name)
			}
			if !slices.ContainsFunc(steps, func(st step) bool { return st.wanted(s.Load) }) || s.Load.Time < time.Second || s.Load.Time%time.Second != 0 {
				t.Errorf("%s: %q measures nothing, or not for whole seconds: %+v", what, s.Name, s.Load)
			}
			for _, p := range s.Beside {
				if !slices.Contains(names, p) {
					t.Errorf("%s: %q is measured beside %q, which is no peer", what, s.Name, p)
				}
			}
			if (s.Load.Spread > 0) && !s.Branch {
				t.Errorf("%s: %q has no second gateway to spread over", what, s.Name)
			}
		}
	}
	for _, rtt := range []int{20, 80} {
		for _, loss := range []float64{0, 0.5, 2} {
			for _, rate := range []int{20, 100} {
				s, ok := find(Full(), longLink(rtt, loss, rate).Name)
				if l := linkOf(s.Lab.Access); !ok || l.RTT != float64(rtt) || l.Loss != loss || l.Rate != int64(rate)*1e6 {
					t.Errorf("link of %d ms, %v %%, %d Mbit/s: %v", rtt, loss, rate, l)
				}
			}
		}
	}
	some, err := Select(known, []string{TwoRelays, OneRelay})
	if err != nil || len(some) != 2 || some[0].Name != OneRelay {
		t.Errorf("selected %v, %v", some, err)
	}
	if _, err := Select(known, []string{"one-rely"}); err == nil || !strings.Contains(err.Error(), OneRelay) {
		t.Errorf("a name that is none: %v", err)
	}
	if merged := Merge(Quick(), Full()); len(merged) != len(Full()) || merged[0].Load.Runs != Quick()[0].Load.Runs {
		t.Errorf("merged: %d scenarios", len(merged))
	}
}
