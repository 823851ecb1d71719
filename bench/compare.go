package bench

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
)

// figure is one row of a comparison: all that was measured of one thing in one run.
type figure struct {
	name   string // scenario, way, what; unique in a result
	unit   string
	format string // of a value
	way    string
	values []float64
	runs   int // where values are the least, the median and the most of so many; else zero
}

// figures are all figures of a result, in the order of measuring.
func (r *Result) figures() []figure {
	var all []figure
	add := func(scenario, way, what, unit, format string, value float64) {
		name := scenario + " | " + way + " | " + what
		if i := slices.IndexFunc(all, func(f figure) bool { return f.name == name }); i >= 0 {
			all[i].values = append(all[i].values, value)
			return
		}
		all = append(all, figure{name: name, unit: unit, format: format, way: way, values: []float64{value}})
	}
	for _, o := range r.Scenarios {
		o.figures(func(way, what, unit, format string, value float64) { add(o.Scenario, way, what, unit, format, value) })
	}
	summed := func(scenario, way, what, unit, format string, low, mid, high float64, runs int) {
		add(scenario, way, what, unit, format, mid)
		f := &all[len(all)-1]
		f.values, f.runs = []float64{low, mid, high}, runs
	}
	for _, f := range r.Relay {
		what := fmt.Sprintf("%s, %d pairs, %d segments", f.Link, f.Pairs, f.Segments)
		summed("relay alone", f.Server, what, "Gbit/s", "%.2f", f.Low/1e9, f.BitsPerSecond/1e9, f.High/1e9, f.Runs)
		add("relay alone", f.Server, what+", processor", "s/GB", "%.2f", f.CPUPerGB)
	}
	for _, d := range r.RelayDelay {
		what := fmt.Sprintf("%s, beside %.0f Mbit/s", d.Link, d.Load/1e6)
		add("relay alone", d.Server, what+", latency p50", "µs", "%.1f", d.P50)
		add("relay alone", d.Server, what+", latency p99", "µs", "%.1f", d.P99)
	}
	for _, m := range r.RelayMemory {
		add("relay alone", m.Server, fmt.Sprintf("memory of %d allocations over %s", m.Allocations, m.Control), "MiB", "%.1f", float64(m.Idle)/(1<<20))
	}
	for _, l := range r.Layers {
		summed("layers", l.Way, direction(l.Down), "Mbit/s", "%.0f", l.Low/1e6, l.Median/1e6, l.High/1e6, l.Runs)
		var cpu float64
		for _, s := range l.CPUPerGB {
			cpu += s
		}
		add("layers", l.Way, direction(l.Down)+", processor", "s/GB", "%.2f", cpu)
	}
	for _, s := range r.Netstack {
		summed("netstack alone", s.Way, direction(s.Down), "Mbit/s", "%.0f", s.Low/1e6, s.Median/1e6, s.High/1e6, s.Runs)
		add("netstack alone", s.Way, direction(s.Down)+", processor", "s/GB", "%.2f", s.CPUPerGB)
	}
	return all
}

// figures calls add for every single measurement of a scenario.
func (o *Outcome) figures(add func(way, what, unit, format string, value float64)) {
	for _, t := range o.Throughput {
		what := plural(t.Flows, "flow") + " " + direction(t.Down)
		add(t.Way, what, "Mbit/s", "%.1f", t.BitsPerSecond/1e6)
		if len(t.CPU) > 0 && t.Bytes > 0 {
			add(t.Way, what+", processor", "s/GB", "%.2f", perGB(t.CPU, t.Bytes))
		}
	}
	for _, u := range o.Rates {
		what := fmt.Sprintf("UDP at %.0f Mbit/s %s", u.Wanted/1e6, direction(u.Down))
		add(u.Way, what+", received", "Mbit/s", "%.1f", u.BitsPerSecond/1e6)
		add(u.Way, what+", jitter", "ms", "%.3f", u.Jitter)
	}
	for _, l := range o.Latency {
		add(l.Way, "RTT p50", "ms", "%.3f", l.RTT50)
		add(l.Way, "RTT p99", "ms", "%.3f", l.RTT99)
		add(l.Way, "first byte p50", "ms", "%.3f", l.Connect50)
		add(l.Way, "first byte p99", "ms", "%.3f", l.Connect99)
	}
	for _, d := range o.Datagrams {
		add(d.Way, "UDP RTT p50", "ms", "%.3f", d.RTT50)
		add(d.Way, "UDP RTT p99", "ms", "%.3f", d.RTT99)
	}
	for _, m := range o.Loaded {
		add(m.Way, "RTT p50 beside one flow "+direction(m.Down), "ms", "%.2f", m.RTT50)
		add(m.Way, "RTT p99 beside one flow "+direction(m.Down), "ms", "%.2f", m.RTT99)
	}
	for _, s := range o.Setup {
		add(s.Way, fmt.Sprintf("%d connections answered after", s.Many), "ms", "%.0f", s.ManyTook)
		for _, c := range s.Cold {
			add(s.Way, "cold start to first byte", "ms", "%.0f", c)
		}
	}
	for _, m := range o.Memory {
		add(m.Way, "memory of "+m.Process+" after load", "MiB", "%.1f", float64(m.Loaded)/(1<<20))
	}
	for _, s := range o.Spread {
		add(Sallyway, "two gateways at once "+direction(s.Down), "Mbit/s", "%.1f", (s.Together[0]+s.Together[1])/1e6)
	}
	for _, m := range o.Moves {
		add(Sallyway, fmt.Sprintf("silence, relay %s, load %s", m.How, m.Load), "ms", "%.0f", m.Silence)
	}
}

// ours are the ways that are not of others.
var ours = []string{Sallyway, OwnRelay, OwnNetstack, RelayLayer, LegLayer}

// Compare writes figures of two results side by side: those that both have, of Sallyway alone or of every way. It names
// what differs about the runs themselves, since such results compare badly.
func Compare(out io.Writer, a, b *Result, every bool) error {
	var text strings.Builder
	for _, d := range []struct{ what, a, b string }{
		{"processor", a.Machine.CPU, b.Machine.CPU},
		{"cores", fmt.Sprint(a.Machine.Cores), fmt.Sprint(b.Machine.Cores)},
		{"kernel", a.Machine.Kernel, b.Machine.Kernel},
		{"congestion control", a.Machine.Congestion, b.Machine.Congestion},
		{"iperf3", a.Machine.Iperf3, b.Machine.Iperf3},
		{"Go", a.Machine.Go, b.Machine.Go},
	} {
		if d.a != d.b {
			fmt.Fprintf(&text, "The %s differs: %s and %s.\n", d.what, d.a, d.b)
		}
	}
	fmt.Fprintf(&text, "A: commit %s, %s, load before %s\nB: commit %s, %s, load before %s\n\n", orUnknown(a.Machine.Commit), a.Started.Format("2006-01-02 15:04 MST"), a.Machine.Load,
		orUnknown(b.Machine.Commit), b.Started.Format("2006-01-02 15:04 MST"), b.Machine.Load)
	text.WriteString("| scenario | way | figure | unit | A median (min–max, runs) | B median (min–max, runs) | change | |\n|---|---|---|---|---|---|---|---|\n")
	had := b.figures()
	rows := 0
	for _, fa := range a.figures() {
		if !every && !slices.Contains(ours, fa.way) {
			continue
		}
		i := slices.IndexFunc(had, func(f figure) bool { return f.name == fa.name })
		if i < 0 {
			continue
		}
		fb := had[i]
		fmt.Fprintf(&text, "| %s | %s | %s | %s | %s | %s |\n", fa.name, fa.unit, fa, fb, change(fa.values, fb.values), verdict(fa.values, fb.values))
		rows++
	}
	if rows == 0 {
		text.WriteString("\nThe two results have no figure in common.\n")
	}
	_, err := io.WriteString(out, text.String())
	return err
}

// String is the median with its spread.
func (f figure) String() string {
	text := fmt.Sprintf(f.format, median(f.values))
	if len(f.values) > 1 {
		text += fmt.Sprintf(" ("+f.format+"–"+f.format+", %d)", slices.Min(f.values), slices.Max(f.values), cmp.Or(f.runs, len(f.values)))
	}
	return text
}

// change is by how much the median of b differs from that of a.
func change(a, b []float64) string {
	from, to := median(a), median(b)
	if from == 0 {
		return "–"
	}
	return fmt.Sprintf("%+.1f %%", 100*(to-from)/from)
}

// verdict says "beyond" when no run of one is among those of the other. Single values say nothing.
func verdict(a, b []float64) string {
	if len(a) < 2 || len(b) < 2 {
		return ""
	}
	if slices.Min(b) > slices.Max(a) || slices.Max(b) < slices.Min(a) {
		return "beyond"
	}
	return ""
}

// orUnknown is a text, or that there is none.
func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}
