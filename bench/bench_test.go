package bench

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

func sample() *Result {
	return &Result{
		Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Command: []string{"bench", "-quick"}, MTU: 1500,
		Throughput: []Throughput{
			{Way: Raw, Flows: 1, BitsPerSecond: 10e9, Bytes: 1e9},
			{Way: Sallyway, Flows: 1, BitsPerSecond: 400e6, Bytes: 2e9, CPU: map[string]float64{"office": 10, "laptop": 12}},
			{Way: Sallyway, Flows: 1, BitsPerSecond: 600e6, Bytes: 1e9, CPU: map[string]float64{"office": 7, "laptop": 8}},
			{Way: Sallyway, Flows: 1, BitsPerSecond: 500e6, Bytes: 1e9, CPU: map[string]float64{"office": 6, "laptop": 8}},
			{Way: Raw, Flows: 1, Down: true, BitsPerSecond: 8e9, Bytes: 1e9},
			{Way: Sallyway, Flows: 1, Down: true, BitsPerSecond: 200e6, Bytes: 0, CPU: map[string]float64{"office": 1}},
		},
		Latency: []Latency{{Way: Raw, RTT50: 0.04}, {Way: Sallyway, RTT50: 0.8}},
		Memory:  []Memory{{Process: "office", Idle: 30 << 20, Loaded: 60 << 20}},
	}
}

func TestRowsAreMediansPerKind(t *testing.T) {
	rows := sample().Rows()
	if len(rows) != 2 || rows[0].Down || !rows[1].Down {
		t.Fatalf("rows %+v", rows)
	}
	up := rows[0]
	if up.Sallyway != 500e6 || up.Ratio() != 0.05 || up.ByProc["office"] != 6 || up.CPUPerGB != 14 {
		t.Errorf("up: %+v", up)
	}
	if got := median([]float64{4, 1, 3, 2}); got != 2.5 {
		t.Errorf("median of an even number: %v", got)
	}
}

func TestStandingsNextToPeers(t *testing.T) {
	r := sample()
	if md := r.Markdown(); strings.Contains(md, "peers") || strings.Contains(md, "Not measured") {
		t.Errorf("a run without peers tells of them:\n%s", md)
	}
	r.Throughput = append(
		r.Throughput,
		Throughput{Way: WireGuardGo, Flows: 1, BitsPerSecond: 250e6, Bytes: 1e9, CPU: map[string]float64{"hub": 3, "agent": 4, "client": 5}},
		Throughput{Way: OpenSSH, Flows: 1, BitsPerSecond: 1e9},
	)
	r.Missing = []Missing{{Nebula, "nebula is not installed: apt-get install nebula\nmore"}}
	var own, wg Standing
	for _, s := range r.standings() {
		switch {
		case s.Way == Sallyway && !s.Down:
			own = s
		case s.Way == WireGuardGo:
			wg = s
		}
	}
	if own.Median != 500e6 || own.Low != 400e6 || own.High != 600e6 || own.Runs != 3 || own.OfRaw != 0.05 || own.OfWireGuard != 2 || own.SallywayTimes != 1 {
		t.Errorf("Sallyway: %+v", own)
	}
	if wg.CPUPerGB != 12 || wg.SallywayTimes != 2 || wg.OfWireGuard != 1 {
		t.Errorf("wireguard-go: %+v", wg)
	}
	md := r.Markdown()
	for _, want := range []string{
		"| " + WireGuardGo + " | 1 | up | 250 | 250–250 | 12.0 | 0.025 | 1.00 | 2.00 × |",
		"| " + OpenSSH + " | 1 | up | 1000 | 1000–1000 | – | 0.100 | 4.00 | 0.50 × |",
		"- " + Nebula + ": nebula is not installed: apt-get install nebula\n",
		"| 1 | up | 10000 | 500 | 5.0 % | 14.0 |", // the peer's processor time is not ours
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing in\n%s", want, md)
		}
	}
}

func TestWrite(t *testing.T) {
	r := sample()
	paths, err := r.Write(t.TempDir(), true)
	if err != nil || len(paths) != 3 {
		t.Fatalf("%v, %v", paths, err)
	}
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case strings.HasSuffix(p, ".json"):
			var back Result
			if err := json.Unmarshal(b, &back); err != nil || len(back.Throughput) != 6 {
				t.Errorf("%s: %v", p, err)
			}
		case strings.HasSuffix(p, ".svg"):
			for d := xml.NewDecoder(strings.NewReader(string(b))); ; {
				if _, err := d.Token(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v", p, err)
				}
			}
		case !strings.Contains(string(b), "| 1 | up | 10000 | 500 | 5.0 % | 14.0 |"):
			t.Errorf("%s", b)
		}
	}
}
