package bench

import (
	"strings"
	"testing"
)

func TestNetstackTable(t *testing.T) {
	r := &Result{MTU: 1500, Netstack: []Stacked{
		{Way: Raw, Runs: 5, Median: 50e9, Low: 49e9, High: 51e9},
		{Way: OwnNetstack, Runs: 5, Median: 6e9, Low: 5e9, High: 7e9, CPUPerGB: 0.5},
		{Way: PlainNetstack, Runs: 5, Median: 2e9, Low: 1e9, High: 3e9, CPUPerGB: 3},
		{Way: OwnNetstack, Down: true, Runs: 5, Median: 4e9, Low: 4e9, High: 4e9, CPUPerGB: 0.6},
		{Way: PlainNetstack, Down: true, Runs: 5, Median: 2e9, Low: 2e9, High: 2e9, CPUPerGB: 4},
	}}
	md := r.Markdown()
	for _, want := range []string{
		"| " + OwnNetstack + " | up | 6000 | 5000–7000 | 0.50 | 3.00 × |",
		"| " + Raw + " | up | 50000 | 49000–51000 | – | 25.00 × |",
		OwnNetstack + ", up | ≥ 2.50 × the usual construction | 3.00 × the usual construction | holds |",
		OwnNetstack + ", down | ≥ 2.50 × the usual construction | 2.00 × the usual construction | missed |",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("%q is missing in\n%s", want, md)
		}
	}
}

// TestBarsWithoutFigure: what was not measured neither holds nor is missed.
func TestBarsWithoutFigure(t *testing.T) {
	var b strings.Builder
	writeBars(&b, []bar{{what: "nothing", wanted: 1}})
	if b.Len() > 0 {
		t.Error(b.String())
	}
	writeBars(&b, []bar{{what: "nothing", wanted: 1, atLeast: true}, {what: "cost", wanted: 1.5, got: 1.4, format: "%.1f s"}})
	if got := b.String(); strings.Contains(got, "nothing") || !strings.Contains(got, "| cost | ≤ 1.5 s | 1.4 s | holds |") {
		t.Error(got)
	}
}
