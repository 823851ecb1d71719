package bench

import "fmt"

// What is wanted of the figures; see bar. None of it fails a run: a machine with foreign load would.
const (
	wireguardBar  = 0.8
	packetPeerBar = 1.5
	turnBar       = 4
	cpuBar        = 18 // seconds per GB, all our processes
	manyFlowsBar  = 1  // of one flow
	addedBar      = 150
	loadedBar     = 20 // milliseconds
	drainedBar    = 1  // of the longest silence before
	killedBar     = 150
	cutBar        = 350
)

// bars are what is wanted of the scenarios, with what was measured. Those of scenarios that were not measured have none.
func (r *Result) bars() []bar {
	var out []bar
	add := func(b bar) { out = append(out, b) }
	for _, o := range r.Scenarios {
		switch {
		case o.Scenario == OneRelay:
			o.relayedBars(add)
		case o.Scenario == TwoRelays:
			o.moveBars(add)
		case o.Scenario == longLink(80, 0.5, 100).Name:
			for _, down := range []bool{false, true} {
				add(bar{
					what: fmt.Sprintf("one flow %s next to raw TCP, %v", direction(down), o.Link), wanted: 1, atLeast: true, format: "%.2f ×",
					got: o.standing(Sallyway, 1, down).OfRaw,
				})
			}
		}
	}
	return out
}

// relayedBars are those of the path through one relay.
func (o *Outcome) relayedBars(add func(bar)) {
	for _, down := range []bool{false, true} {
		for _, p := range []struct {
			way  string
			want float64
		}{{WireGuardGo, wireguardBar}, {Nebula, packetPeerBar}, {OpenVPN, packetPeerBar}, {PionTURN, turnBar}, {CoturnTURN, turnBar}} {
			add(bar{
				what: fmt.Sprintf("one flow %s next to %s", direction(down), p.way), wanted: p.want, atLeast: true, format: "%.2f ×",
				got: o.standing(p.way, 1, down).SallywayTimes,
			})
		}
		one, many := o.standing(Sallyway, 1, down), o.standing(Sallyway, 8, down)
		add(bar{what: "8 flows next to one, " + direction(down), wanted: manyFlowsBar, atLeast: true, format: "%.2f ×", got: ratio(many.Median, one.Median)})
		add(bar{what: "processor time of one flow " + direction(down), wanted: cpuBar, format: "%.1f s/GB", got: one.CPUPerGB})
	}
	if v, ok := o.addedLatency(Sallyway); ok {
		add(bar{what: "added to raw UDP forwarding, idle, p50", wanted: addedBar, format: "%.0f µs", got: 1000 * v})
	}
	for _, m := range o.Loaded {
		if m.Way == Sallyway {
			add(bar{what: "exchange beside one flow " + direction(m.Down) + ", p99", wanted: loadedBar, format: "%.1f ms", got: m.RTT99})
		}
	}
}

// moveBars are those of a relay that goes away.
func (o *Outcome) moveBars(add func(bar)) {
	for _, m := range o.moveRows() {
		b := bar{what: fmt.Sprintf("silence when the relay in use is %s, load %s", m.how, m.load), format: "%.0f ms", got: median(m.silence)}
		switch m.how {
		case Drained:
			b.wanted = drainedBar * median(m.before)
		case Killed:
			b.wanted = killedBar
		case CutOff:
			b.wanted = cutBar
		}
		add(b)
	}
}
