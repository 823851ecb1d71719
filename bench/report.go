package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Markdown is the result as tables.
func (r *Result) Markdown() string { return r.markdown("") }

// markdown is the same with the pictures in it, as Write calls their files beside base.md; without base there are none.
func (r *Result) markdown(base string) string {
	var b strings.Builder
	if len(r.Scenarios) > 0 {
		fmt.Fprintf(&b, "# Bench, %s\n\nMedians. All hosts share the cores of one machine: compare the rows of one run, not runs of two machines.\n", r.Started.Format("2006-01-02 15:04 MST"))
		for _, p := range r.pictures() {
			if base != "" {
				fmt.Fprintf(&b, "\n![%s](%s-%s.svg)\n", p.title, base, p.name)
			}
		}
		r.overview(&b)
		writeBars(&b, r.bars())
		for _, o := range r.Scenarios {
			if o.Link == nil || o.Link.Rate == 0 {
				o.section(&b)
			}
		}
		r.longLinks(&b)
		r.missing(&b)
	}
	r.alone(&b)
	r.footer(&b)
	return b.String()
}

// overview is one line per scenario.
func (r *Result) overview(b *strings.Builder) {
	b.WriteString("\n| scenario | flows | Sallyway up / down Mbit/s | of raw TCP up / down | of wireguard-go up / down | CPU s/GB up / down | RTT idle p50 / p99 ms |\n|---|---|---|---|---|---|---|\n")
	for _, o := range r.Scenarios {
		for _, flows := range o.flows() {
			up, down := o.standing(Sallyway, flows, false), o.standing(Sallyway, flows, true)
			rtt := "–"
			if l := o.latency(Sallyway); l != nil {
				rtt = fmt.Sprintf("%.2f / %.2f", l.RTT50, l.RTT99)
			}
			fmt.Fprintf(b, "| %s | %d | %s / %s | %s / %s | %s / %s | %s / %s | %s |\n", o.Scenario, flows, mbit(up.Median), mbit(down.Median), share(up.OfRaw), share(down.OfRaw),
				known("%.2f", up.OfWireGuard), known("%.2f", down.OfWireGuard), known("%.1f", up.CPUPerGB), known("%.1f", down.CPUPerGB), rtt)
		}
		if o.Failed != "" {
			why, _, _ := strings.Cut(o.Failed, "\n")
			fmt.Fprintf(b, "| %s | | failed: %s | | | | |\n", o.Scenario, cell(why))
		}
	}
}

// section is everything about one scenario.
func (o *Outcome) section(b *strings.Builder) {
	fmt.Fprintf(b, "\n## %s\n\n%s MTU %d, %s; %.0f s.\n", o.Scenario, o.About, o.MTU, o.Wire, o.Took)
	o.standingsTable(b)
	o.processTable(b)
	o.bundlesTable(b)
	o.latencyTables(b)
	o.ratesTable(b)
	o.setupTable(b)
	o.memoryTable(b)
	o.relaysTables(b)
}

func (o *Outcome) standingsTable(b *strings.Builder) {
	if len(o.Standings) == 0 {
		return
	}
	b.WriteString("\n| way | flows | direction | Mbit/s | min–max | runs | CPU s/GB | of raw TCP | of wireguard-go | Sallyway is |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, s := range o.Standings {
		fmt.Fprintf(b, "| %s | %d | %s | %s | %s–%s | %d | %s | %s | %s | %s |\n", s.Way, s.Flows, direction(s.Down), mbit(s.Median), mbit(s.Low), mbit(s.High), s.Runs,
			known("%.1f", s.CPUPerGB), share(s.OfRaw), known("%.2f", s.OfWireGuard), known("%.2f ×", s.SallywayTimes))
	}
}

// processTable says which of our processes the processor time is of.
func (o *Outcome) processTable(b *strings.Builder) {
	rows := o.perProcess(Sallyway)
	if len(rows) == 0 {
		return
	}
	names := make(map[string]bool)
	for _, row := range rows {
		for p := range row.perGB {
			names[p] = true
		}
	}
	procs := slices.Sorted(maps.Keys(names))
	b.WriteString("\n| Sallyway, CPU s/GB | direction | " + strings.Join(procs, " | ") + " |\n|---|---|" + strings.Repeat("---|", len(procs)) + "\n")
	for _, row := range rows {
		fmt.Fprintf(b, "| %s | %s |", plural(row.flows, "flow"), direction(row.down))
		for _, p := range procs {
			fmt.Fprintf(b, " %.1f |", row.perGB[p])
		}
		b.WriteByte('\n')
	}
}

// bundlesTable says in which pieces the relay got and gave what it carried.
func (o *Outcome) bundlesTable(b *strings.Builder) {
	head := "\n| Sallyway's relay, mean bytes | direction | of a packet on its link | of a read | of a write | found its buffer full |\n|---|---|---|---|---|---|\n"
	for _, flows := range o.flows() {
		for _, down := range []bool{false, true} {
			if m := o.bundleMedians(flows, down); m != nil {
				fmt.Fprintf(b, "%s| %s | %s | %.0f | %.0f | %.0f | %d |\n", head, plural(flows, "flow"), direction(down), m.Packet, m.Read, m.Write, m.Dropped)
				head = ""
			}
		}
	}
}

func (o *Outcome) latencyTables(b *strings.Builder) {
	if len(o.Latency) > 0 {
		b.WriteString("\n| idle, TCP | RTT p50 ms | RTT p99 ms | connect and first byte p50 ms | p99 ms |\n|---|---|---|---|---|\n")
	}
	for _, l := range o.Latency {
		fmt.Fprintf(b, "| %s | %.2f | %.2f | %.2f | %.2f |\n", l.Way, l.RTT50, l.RTT99, l.Connect50, l.Connect99)
	}
	if len(o.Datagrams) > 0 {
		b.WriteString("\n| idle, UDP | RTT p50 ms | RTT p99 ms | lost | p50 added to raw forwarding, µs |\n|---|---|---|---|---|\n")
	}
	for _, d := range o.Datagrams {
		added := "–"
		if v, ok := o.addedLatency(d.Way); ok {
			added = fmt.Sprintf("%.0f", 1000*v)
		}
		fmt.Fprintf(b, "| %s | %.3f | %.3f | %d of %d | %s |\n", ofUDP(d.Way), d.RTT50, d.RTT99, d.Lost, d.Sent, added)
	}
	if len(o.Loaded) > 0 {
		b.WriteString("\n| beside one saturating flow | its direction | RTT p50 ms | RTT p99 ms |\n|---|---|---|---|\n")
	}
	for _, m := range o.Loaded {
		fmt.Fprintf(b, "| %s | %s | %.2f | %.2f |\n", m.Way, direction(m.Down), m.RTT50, m.RTT99)
	}
}

// addedLatency is what a way adds to the round trip over raw forwarding, in milliseconds, both of UDP.
func (o *Outcome) addedLatency(name string) (float64, bool) {
	var own, raw float64
	for _, d := range o.Datagrams {
		switch d.Way {
		case name:
			own = d.RTT50
		case ForwardedUDP:
			raw = d.RTT50
		}
	}
	return own - raw, own > 0 && raw > 0 && name != ForwardedUDP && name != Raw
}

// ofUDP is a way's name where it carries UDP.
func ofUDP(way string) string {
	if way == Raw {
		return "raw UDP"
	}
	return way
}

func (o *Outcome) ratesTable(b *strings.Builder) {
	rows := o.rateRows()
	if len(rows) > 0 {
		b.WriteString("\n| UDP of 1200 bytes | rate Mbit/s | direction | received Mbit/s | lost % | jitter ms | CPU s/GB |\n|---|---|---|---|---|---|---|\n")
	}
	for _, s := range rows {
		fmt.Fprintf(b, "| %s | %.0f | %s | %s | %.2f | %.3f | %s |\n", ofUDP(s.Way), s.Wanted/1e6, direction(s.Down), mbit(s.BitsPerSecond), s.Lost, s.Jitter, known("%.1f", s.perGB))
	}
}

func (o *Outcome) setupTable(b *strings.Builder) {
	if len(o.Setup) > 0 {
		b.WriteString("\n| set-up | warm flow p50 ms | cold start to first byte ms | connections at once | all answered after ms | without answer |\n|---|---|---|---|---|---|\n")
	}
	for _, s := range o.Setup {
		fmt.Fprintf(b, "| %s | %.2f | %s | %d | %.0f | %d |\n", s.Way, s.Warm50, known("%.0f", median(s.Cold)), s.Many, s.ManyTook, s.ManyLost)
	}
}

func (o *Outcome) memoryTable(b *strings.Builder) {
	if len(o.Memory) == 0 {
		return
	}
	b.WriteString("\n| process | of | RSS idle MiB | after load MiB |\n|---|---|---|---|\n")
	for _, p := range o.Memory {
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", p.Process, p.Way, known("%.0f", float64(p.Idle)/(1<<20)), known("%.0f", float64(p.Loaded)/(1<<20)))
	}
}

func (o *Outcome) relaysTables(b *strings.Builder) {
	if len(o.Spread) > 0 {
		b.WriteString("\n| two gateways, two relays | direction | first alone Mbit/s | second alone | both at once | over |\n|---|---|---|---|---|---|\n")
	}
	for _, down := range []bool{false, true} {
		var first, second, both []float64
		var paths [2]string
		for _, s := range o.Spread {
			if s.Down == down {
				first, second = append(first, s.Alone[0]), append(second, s.Alone[1])
				both, paths = append(both, s.Together[0]+s.Together[1]), s.Paths
			}
		}
		if len(both) > 0 {
			fmt.Fprintf(b, "| one flow each | %s | %s | %s | %s | %s and %s |\n", direction(down), mbit(median(first)), mbit(median(second)), mbit(median(both)), cell(paths[0]), cell(paths[1]))
		}
	}
	rows := o.moveRows()
	if len(rows) > 0 {
		b.WriteString("\n| the relay in use is | load | longest silence ms, median (max) | before ms | connections lost | runs |\n|---|---|---|---|---|---|\n")
	}
	for _, m := range rows {
		fmt.Fprintf(b, "| %s | %s | %.0f (%.0f) | %.0f | %d | %d |\n", m.how, m.load, median(m.silence), slices.Max(m.silence), median(m.before), m.lost, len(m.silence))
	}
}

// longLinks puts the emulated links side by side.
func (r *Result) longLinks(b *strings.Builder) {
	head := "\n## Long links\n\nOne flow through an emulated access link; iperf3's ends use " + wanCC + " on either way. \"Link\" is what the same emulator in the same run let through of plain UDP that it was given too much of, loss included.\n\n" +
		"| RTT, loss, rate | link up / down | raw TCP up / down | Sallyway up / down | of raw up / down | RTT p50 ms raw / Sallyway |\n|---|---|---|---|---|---|\n"
	for _, o := range r.Scenarios {
		if o.Link == nil || o.Link.Rate == 0 || len(o.Throughput)+len(o.Ceiling) == 0 {
			continue
		}
		b.WriteString(head)
		head = ""
		var ceiling [2]float64
		for _, c := range o.Ceiling {
			if c.Down {
				ceiling[1] = c.BitsPerSecond
			} else {
				ceiling[0] = c.BitsPerSecond
			}
		}
		raw, own := [2]Standing{o.standing(Raw, 1, false), o.standing(Raw, 1, true)}, [2]Standing{o.standing(Sallyway, 1, false), o.standing(Sallyway, 1, true)}
		rtt := "–"
		if a, c := o.latency(Raw), o.latency(Sallyway); a != nil && c != nil {
			rtt = fmt.Sprintf("%.1f / %.1f", a.RTT50, c.RTT50)
		}
		fmt.Fprintf(b, "| %v | %s / %s | %s / %s | %s / %s | %s / %s | %s |\n", o.Link, mbit(ceiling[0]), mbit(ceiling[1]), mbit(raw[0].Median), mbit(raw[1].Median),
			mbit(own[0].Median), mbit(own[1].Median), share(own[0].OfRaw), share(own[1].OfRaw), rtt)
	}
}

// missing names what was to be measured and was not.
func (r *Result) missing(b *strings.Builder) {
	head := "\nNot measured:\n\n"
	for _, o := range r.Scenarios {
		for _, m := range o.Missing {
			why, _, _ := strings.Cut(m.Why, "\n")
			fmt.Fprintf(b, "%s- %s (%s): %s\n", head, m.Peer, o.Scenario, why)
			head = ""
		}
	}
	head = "\nMeasured again after a failure:\n\n"
	for _, o := range r.Scenarios {
		for _, what := range o.Again {
			line, _, _ := strings.Cut(what, "\n")
			fmt.Fprintf(b, "%s- %s (%s)\n", head, line, o.Scenario)
			head = ""
		}
	}
}

// footer says where, of what and how it was measured.
func (r *Result) footer(b io.Writer) {
	m, mtu := r.Machine, ""
	if r.MTU > 0 {
		mtu = fmt.Sprintf("MTU %d, ", r.MTU)
	}
	fmt.Fprintf(b, "\n%s, %d cores shared by all hosts, %.0f GiB, Linux %s, %s, %s%s, %s, commit %s, load before %s.\nCommand: `%s`, %s, %.0f s.\n",
		m.CPU, m.Cores, m.MemoryGiB, m.Kernel, m.Congestion, mtu, m.Iperf3, m.Go, orUnknown(m.Commit), m.Load,
		strings.Join(r.Command, " "), r.Started.Format("2006-01-02 15:04 MST"), r.Took)
	if len(r.Versions) > 0 {
		fmt.Fprint(b, "\nMeasured:\n\n")
	}
	for _, name := range slices.Sorted(maps.Keys(r.Versions)) {
		fmt.Fprintf(b, "- %s: %s\n", name, r.Versions[name])
	}
}

// mbit is a speed in Mbit/s, with as many digits as mean something.
func mbit(bitsPerSecond float64) string {
	v := bitsPerSecond / 1e6
	switch {
	case v == 0:
		return "–"
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// share is a ratio as percent; 0 is nothing known.
func share(v float64) string { return known("%.1f %%", 100*v) }

// known leaves out what is not.
func known(format string, v float64) string {
	if v == 0 {
		return "–"
	}
	return fmt.Sprintf(format, v)
}

// cell makes a text fit for a table.
func cell(s string) string { return strings.ReplaceAll(s, "|", "\\|") }

// Write puts the result into a folder: JSON, Markdown, and SVG pictures of what was measured. It returns the paths.
func (r *Result) Write(dir string) ([]string, error) {
	name := r.Started.Format("20060102-150405")
	return writeResult(dir, name, r, r.markdown(name), r.pictures())
}

// writeResult puts doc as JSON, its Markdown and its pictures into a folder, in files that are named after name.
func writeResult(dir, name string, doc any, markdown string, pictures []picture) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, err
	}
	base := filepath.Join(dir, name)
	files := map[string][]byte{base + ".json": append(b, '\n'), base + ".md": []byte(markdown)}
	for _, p := range pictures {
		files[base+"-"+p.name+".svg"] = []byte(p.svg)
	}
	var errs error
	for path, content := range files {
		errs = errors.Join(errs, os.WriteFile(path, content, 0o644))
	}
	return slices.Sorted(maps.Keys(files)), errs
}

// Read reads a result that Write has written as JSON.
func Read(path string) (*Result, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := new(Result)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(r.Scenarios) > 0 && r.Format != format || len(r.Scenarios)+len(r.Relay)+len(r.Netstack) == 0 {
		return nil, fmt.Errorf("%s is no result of this version of bench", path)
	}
	return r, nil
}
