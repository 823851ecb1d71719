package bench

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Standing is how a way did with some flows in one direction, and how Sallyway did next to it in the same run.
type Standing struct {
	Way           string  `json:"way"`
	Flows         int     `json:"flows"`
	Down          bool    `json:"down"`
	Runs          int     `json:"runs"`
	Median        float64 `json:"median_bits_per_second"`
	Low           float64 `json:"min_bits_per_second"`
	High          float64 `json:"max_bits_per_second"`
	CPUPerGB      float64 `json:"cpu_seconds_per_gb"` // of all of its processes; 0 where they are not known
	OfRaw         float64 `json:"of_raw_tcp"`         // 0 where there is none
	OfWireGuard   float64 `json:"of_wireguard_go"`    // 0 where there is none
	SallywayTimes float64 `json:"sallyway_times"`     // Sallyway's median over this one's
}

// standings sums the runs up: by flows, up before down, in the order in which the ways were measured.
func (r *Result) standings() []Standing {
	type kind struct {
		flows int
		down  bool
	}
	var order []string
	var kinds []kind
	speeds := make(map[kind]map[string][]float64)
	cpu := make(map[kind]map[string][]float64)
	for _, t := range r.Throughput {
		k := kind{t.Flows, t.Down}
		if speeds[k] == nil {
			kinds = append(kinds, k)
			speeds[k], cpu[k] = make(map[string][]float64), make(map[string][]float64)
		}
		if !slices.Contains(order, t.Way) {
			order = append(order, t.Way)
		}
		speeds[k][t.Way] = append(speeds[k][t.Way], t.BitsPerSecond)
		if t.Bytes > 0 && len(t.CPU) > 0 {
			var sum float64
			for _, s := range t.CPU {
				sum += s
			}
			cpu[k][t.Way] = append(cpu[k][t.Way], sum/(float64(t.Bytes)/1e9))
		}
	}
	slices.SortStableFunc(kinds, func(a, b kind) int {
		return cmp.Or(cmp.Compare(a.flows, b.flows), strings.Compare(direction(b.down), direction(a.down)))
	})
	var out []Standing
	for _, k := range kinds {
		raw, wg, own := median(speeds[k][Raw]), median(speeds[k][WireGuardGo]), median(speeds[k][Sallyway])
		for _, w := range order {
			v := speeds[k][w]
			if len(v) == 0 {
				continue
			}
			m := median(v)
			out = append(out, Standing{
				Way: w, Flows: k.flows, Down: k.down, Runs: len(v), Median: m, Low: slices.Min(v), High: slices.Max(v),
				CPUPerGB: median(cpu[k][w]), OfRaw: ratio(m, raw), OfWireGuard: ratio(m, wg), SallywayTimes: ratio(own, m),
			})
		}
	}
	return out
}

// ratio is 0 where there is nothing to compare with.
func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

// standingsTable writes the comparison with the peers, and names those that are missing.
func (r *Result) standingsTable(b *strings.Builder) {
	rows := r.standings()
	if slices.ContainsFunc(rows, func(s Standing) bool { return s.Way != Raw && s.Way != Sallyway }) {
		b.WriteString("\nNext to peers on the same lab, runs interleaved: the client reaches the private host through a hub in the place of a relay.\n\n" +
			"| way | flows | direction | Mbit/s | min–max | CPU s/GB | of raw TCP | of wireguard-go | Sallyway is |\n|---|---|---|---|---|---|---|---|---|\n")
		for _, s := range rows {
			fmt.Fprintf(b, "| %s | %d | %s | %.0f | %.0f–%.0f | %s | %s | %s | %s |\n", s.Way, s.Flows, direction(s.Down), s.Median/1e6, s.Low/1e6, s.High/1e6,
				known("%.1f", s.CPUPerGB), known("%.3f", s.OfRaw), known("%.2f", s.OfWireGuard), known("%.2f ×", s.SallywayTimes))
		}
	}
	if len(r.Missing) > 0 {
		b.WriteString("\nNot measured:\n")
		for _, m := range r.Missing {
			why, _, _ := strings.Cut(m.Why, "\n")
			fmt.Fprintf(b, "- %s: %s\n", m.Peer, why)
		}
	}
}

// known leaves out what is not.
func known(format string, v float64) string {
	if v == 0 {
		return "–"
	}
	return fmt.Sprintf(format, v)
}
