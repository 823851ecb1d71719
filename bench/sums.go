package bench

import (
	"cmp"
	"slices"
)

// median of nothing is 0.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// flows are the numbers of flows that throughput was measured with.
func (o *Outcome) flows() []int {
	var out []int
	for _, s := range o.Standings {
		if !slices.Contains(out, s.Flows) {
			out = append(out, s.Flows)
		}
	}
	return out
}

// standing is how a way did; the zero Standing where it was not measured.
func (o *Outcome) standing(way string, flows int, down bool) Standing {
	for _, s := range o.Standings {
		if s.Way == way && s.Flows == flows && s.Down == down {
			return s
		}
	}
	return Standing{}
}

// latency is what was found of a way while idle, or nil.
func (o *Outcome) latency(way string) *Latency {
	for i := range o.Latency {
		if o.Latency[i].Way == way {
			return &o.Latency[i]
		}
	}
	return nil
}

// processRow is the processor time of each process of one way, medians in seconds per GB.
type processRow struct {
	flows int
	down  bool
	perGB map[string]float64
}

// perProcess sums up a way's processes, by flows, up first.
func (o *Outcome) perProcess(way string) []processRow {
	type kind struct {
		flows int
		down  bool
	}
	all := make(map[kind]map[string][]float64)
	for _, t := range o.Throughput {
		if t.Way != way || t.Bytes == 0 || len(t.CPU) == 0 {
			continue
		}
		k := kind{t.Flows, t.Down}
		if all[k] == nil {
			all[k] = make(map[string][]float64)
		}
		for p, s := range t.CPU {
			all[k][p] = append(all[k][p], s/(float64(t.Bytes)/1e9))
		}
	}
	var rows []processRow
	for k, procs := range all {
		row := processRow{flows: k.flows, down: k.down, perGB: make(map[string]float64)}
		for p, v := range procs {
			row.perGB[p] = median(v)
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b processRow) int {
		return cmp.Or(cmp.Compare(a.flows, b.flows), cmp.Compare(direction(b.down), direction(a.down)))
	})
	return rows
}

// bundleMedians are those of Sallyway's runs of a kind; nil where there are none.
func (o *Outcome) bundleMedians(flows int, down bool) *Bundles {
	var packet, read, write []float64
	m := new(Bundles)
	for _, t := range o.Throughput {
		if b := t.Relay; b != nil && t.Flows == flows && t.Down == down {
			packet, read, write = append(packet, b.Packet), append(read, b.Read), append(write, b.Write)
			m.Dropped += b.Dropped
		}
	}
	if len(read) == 0 {
		return nil
	}
	m.Packet, m.Read, m.Write = median(packet), median(read), median(write)
	return m
}

// rateRow is the medians of runs of UDP at one rate.
type rateRow struct {
	Rate
	perGB float64
}

// rateRows sums up, in the order of measuring.
func (o *Outcome) rateRows() []rateRow {
	type kind struct {
		way    string
		wanted float64
		down   bool
	}
	var order []kind
	all := make(map[kind][]Rate)
	for _, r := range o.Rates {
		k := kind{r.Way, r.Wanted, r.Down}
		if all[k] == nil {
			order = append(order, k)
		}
		all[k] = append(all[k], r)
	}
	var rows []rateRow
	for _, k := range order {
		of := func(f func(Rate) float64) float64 {
			var v []float64
			for _, r := range all[k] {
				v = append(v, f(r))
			}
			return median(v)
		}
		rows = append(rows, rateRow{
			Rate: Rate{
				Way: k.way, Wanted: k.wanted, Down: k.down, BitsPerSecond: of(func(r Rate) float64 { return r.BitsPerSecond }),
				Lost: of(func(r Rate) float64 { return r.Lost }), Jitter: of(func(r Rate) float64 { return r.Jitter }),
			},
			perGB: of(func(r Rate) float64 { return perGB(r.CPU, r.Bytes) }),
		})
	}
	return rows
}

// moveRow is what happened in one kind of move.
type moveRow struct {
	how, load       string
	silence, before []float64 // milliseconds
	lost            int       // runs in which a connection was lost
}

// moveRows sums up, in the order of measuring.
func (o *Outcome) moveRows() []*moveRow {
	var rows []*moveRow
	for _, m := range o.Moves {
		i := slices.IndexFunc(rows, func(r *moveRow) bool { return r.how == m.How && r.load == m.Load })
		if i < 0 {
			i = len(rows)
			rows = append(rows, &moveRow{how: m.How, load: m.Load})
		}
		rows[i].silence, rows[i].before = append(rows[i].silence, m.Silence), append(rows[i].before, m.Before)
		if !m.Lived {
			rows[i].lost++
		}
	}
	return rows
}
