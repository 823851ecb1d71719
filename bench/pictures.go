package bench

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// picture is one drawing of a result.
type picture struct {
	name, title string // name is part of its file's
	svg         string
}

// pictures draws what the result has figures for.
func (r *Result) pictures() []picture {
	var out []picture
	add := func(name string, c chart) {
		if c.where = r.where(); len(c.rows) > 0 {
			out = append(out, picture{name, c.title, c.svg()})
		}
	}
	for _, o := range r.Scenarios {
		if o.Scenario == OneRelay {
			add("throughput", o.throughputChart())
			add("processor", o.processorChart())
			add("latency", o.latencyChart())
		}
	}
	add("scenarios", r.scenarioChart())
	add("links", r.linkChart())
	for _, o := range r.Scenarios {
		if o.Scenario == TwoRelays {
			add("moves", o.moveChart())
		}
	}
	return out
}

// where says in a few words of what run a picture is.
func (r *Result) where() string {
	return fmt.Sprintf("%s, %s, commit %s", plural(r.Machine.Cores, "shared core"), r.Started.Format("2006-01-02"), orUnknown(r.Machine.Commit))
}

// colours are those of a way: for up and for down.
func colours(way string) [2]string {
	if way == Sallyway {
		return [2]string{ownStrong, ownPale}
	}
	return [2]string{peerStrong, peerPale}
}

var upAndDown = []legendEntry{{ownStrong, "Sallyway up"}, {ownPale, "down"}, {peerStrong, "others up"}, {peerPale, "down"}}

// throughputChart is the ways next to each other, the fastest first. Raw TCP would dwarf them: it is told, not drawn.
func (o *Outcome) throughputChart() chart {
	c := chart{title: "TCP throughput through a relay", unit: "Mbit/s", format: "%.0f", legend: append(slices.Clone(upAndDown), legendEntry{inkWhisker, "least to most of the runs"})}
	var raw []string
	for _, flows := range o.flows() {
		raw = append(raw, fmt.Sprintf("%s/%s Mbit/s with %s", mbit(o.standing(Raw, flows, false).Median), mbit(o.standing(Raw, flows, true).Median), plural(flows, "flow")))
		c.rows = append(c.rows, chartRow{label: plural(flows, "flow"), head: true})
		for _, way := range o.waysByUp(flows) {
			row := chartRow{label: way}
			for i, down := range []bool{false, true} {
				s := o.standing(way, flows, down)
				row.marks = append(row.marks, mark{parts: []part{{value: s.Median / 1e6, colour: colours(way)[i]}}, low: s.Low / 1e6, high: s.High / 1e6})
			}
			c.rows = append(c.rows, row)
		}
	}
	c.about = "medians; raw TCP up/down on the same links: " + strings.Join(raw, ", ")
	return c
}

// waysByUp are the measured ways without raw TCP, the fastest upload first.
func (o *Outcome) waysByUp(flows int) []string {
	var ways []string
	for _, s := range o.Standings {
		if s.Flows == flows && s.Way != Raw && !slices.Contains(ways, s.Way) {
			ways = append(ways, s.Way)
		}
	}
	slices.SortStableFunc(ways, func(a, b string) int {
		return cmp.Compare(o.standing(b, flows, false).Median, o.standing(a, flows, false).Median)
	})
	return ways
}

// processorChart is what one flow costs, by process.
func (o *Outcome) processorChart() chart {
	c := chart{
		title: "Processor time of one flow", about: "CPU seconds per GB of all processes on the way, up above down; medians", unit: "CPU s/GB", format: "%.1f",
		legend: []legendEntry{{ownStrong, "Sallyway, each process"}, {peerStrong, "others, each process"}},
	}
	for _, way := range o.waysByUp(1) {
		row := chartRow{label: way}
		for _, p := range o.perProcess(way) {
			if p.flows != 1 {
				continue
			}
			var m mark
			for i, name := range slices.Sorted(maps.Keys(p.perGB)) {
				shade := colours(way)[0]
				if i%2 == 1 {
					shade = shaded(way)
				}
				m.parts = append(m.parts, part{value: p.perGB[name], colour: shade, label: name})
			}
			row.marks = append(row.marks, m)
		}
		if len(row.marks) > 0 {
			c.rows = append(c.rows, row)
		}
	}
	return c
}

// shaded is the colour of every second piece of a bar.
func shaded(way string) string {
	if way == Sallyway {
		return "#4f8df0"
	}
	return "#8994a0"
}

// latencyChart is the round trip of small exchanges, from the median to the 99th percentile.
func (o *Outcome) latencyChart() chart {
	const idle, up, down = "#2da44e", ownStrong, "#bf8700"
	c := chart{
		title: "Round trip of a small exchange", about: "from the median (full) to the 99th percentile (hollow), TCP", unit: "ms", log: true,
		legend: []legendEntry{{idle, "idle"}, {up, "beside one saturating upload"}, {down, "beside one saturating download"}},
	}
	for _, l := range o.Latency {
		span := func(p50, p99 float64, colour string) mark {
			return mark{low: p50, high: p99, colour: colour, text: fmt.Sprintf("%.2f – %.2f", p50, p99)}
		}
		row := chartRow{label: l.Way, marks: []mark{span(l.RTT50, l.RTT99, idle)}}
		for _, m := range o.Loaded {
			if m.Way == l.Way {
				row.marks = append(row.marks, span(m.RTT50, m.RTT99, map[bool]string{false: up, true: down}[m.Down]))
			}
		}
		c.rows = append(c.rows, row)
	}
	return c
}

// scenarioChart is one flow in every scenario without an emulated rate.
func (r *Result) scenarioChart() chart {
	c := chart{title: "One flow in each topology", about: "medians, with the least and the most of the runs", unit: "Mbit/s", format: "%.0f", legend: upAndDown}
	for _, o := range r.Scenarios {
		if o.Link != nil && o.Link.Rate > 0 || len(o.Standings) == 0 {
			continue
		}
		c.rows = append(c.rows, chartRow{label: o.Scenario, head: true})
		for _, way := range o.waysByUp(1) {
			if o.Scenario == OneRelay && way != Sallyway && way != WireGuardGo {
				continue // they have a picture of their own
			}
			row := chartRow{label: way}
			for i, down := range []bool{false, true} {
				s := o.standing(way, 1, down)
				row.marks = append(row.marks, mark{parts: []part{{value: s.Median / 1e6, colour: colours(way)[i]}}, low: s.Low / 1e6, high: s.High / 1e6})
			}
			c.rows = append(c.rows, row)
		}
	}
	return c
}

// linkChart is one flow over the emulated links, as a share of each link's rate.
func (r *Result) linkChart() chart {
	c := chart{
		title: "One flow over a long link, of the link's rate", about: "medians; red: what the link carries of plain UDP", unit: "% of the rate", format: "%.1f %%",
		legend: []legendEntry{{ownStrong, "Sallyway up"}, {ownPale, "down"}, {peerStrong, "raw TCP up"}, {peerPale, "down"}, {inkTarget, "plain UDP"}},
	}
	for _, o := range r.Scenarios {
		if o.Link == nil || o.Link.Rate == 0 || len(o.Standings) == 0 {
			continue
		}
		row := chartRow{label: o.Link.String()}
		for _, down := range []bool{false, true} {
			var limit float64
			for _, l := range o.Ceiling {
				if l.Down == down {
					limit = 100 * l.BitsPerSecond / float64(o.Link.Rate)
				}
			}
			for _, way := range []string{Sallyway, Raw} {
				s, colour := o.standing(way, 1, down), colours(way)[0]
				if down {
					colour = colours(way)[1]
				}
				of := func(v float64) float64 { return 100 * v / float64(o.Link.Rate) }
				row.marks = append(row.marks, mark{parts: []part{{value: of(s.Median), colour: colour}}, low: of(s.Low), high: of(s.High), limit: limit})
			}
		}
		c.rows = append(c.rows, row)
	}
	return c
}

// moveChart is how long an open connection was silent when a relay went away, one dot for each time.
func (o *Outcome) moveChart() chart {
	c := chart{
		title: "Silence when the relay in use goes away", about: "the longest on an open connection, one dot for each time; red: what is wanted at most", unit: "ms",
		legend: []legendEntry{{ownStrong, "afterwards"}, {peerPale, "longest before, on the same connection"}},
	}
	wanted := map[string]float64{Killed: killedBar, CutOff: cutBar}
	for _, m := range o.moveRows() {
		c.rows = append(c.rows, chartRow{label: m.how + ", load " + m.load, marks: []mark{
			{dots: m.silence, colour: ownStrong, limit: wanted[m.how], text: fmt.Sprintf("%.0f", median(m.silence))}, {dots: m.before, colour: peerPale},
		}})
	}
	return c
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
