package bench

import (
	"cmp"
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
	OfWireGuard   float64 `json:"of_wireguard_go"`    // through its hub, or where there is none of that from end to end
	SallywayTimes float64 `json:"sallyway_times"`     // Sallyway's median over this one's
}

// standings sums runs up: by flows, up before down, in the order in which the ways were measured.
func standings(runs []Throughput) []Standing {
	type kind struct {
		flows int
		down  bool
	}
	var order []string
	var kinds []kind
	speeds := make(map[kind]map[string][]float64)
	cpu := make(map[kind]map[string][]float64)
	for _, t := range runs {
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
			cpu[k][t.Way] = append(cpu[k][t.Way], perGB(t.CPU, t.Bytes))
		}
	}
	slices.SortStableFunc(kinds, func(a, b kind) int {
		return cmp.Or(cmp.Compare(a.flows, b.flows), strings.Compare(direction(b.down), direction(a.down)))
	})
	var out []Standing
	for _, k := range kinds {
		raw, own := median(speeds[k][Raw]), median(speeds[k][Sallyway])
		wg := cmp.Or(median(speeds[k][WireGuardGo]), median(speeds[k][WireGuardDirect]))
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

// perGB is the sum of processor seconds over the bytes that they carried.
func perGB(cpu map[string]float64, bytes int64) float64 {
	var sum float64
	for _, s := range cpu {
		sum += s
	}
	return ratio(sum, float64(bytes)/1e9)
}

// ratio is 0 where there is nothing to compare with.
func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}
