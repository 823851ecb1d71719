package bench

import (
	"fmt"
	"slices"
	"time"

	"sallyway/internal/lab"
	"sallyway/internal/lab/wan"
)

// Names of the scenarios that others speak of. Those of long links are made of what the links are.
const (
	OneRelay  = "one-relay"
	Direct    = "direct"
	TwoRelays = "two-relays"
	SmallMTU  = "small-mtu"
	NoOffload = "no-offload"
	GROAlone  = "gro-alone"
	GROHeld   = "gro-held"
	Emulator  = "wan-emulator"
)

// groHold is how long receivers of GROHeld wait for more: several packets' time at 1 Gbit/s, and little beside a round trip.
const groHold = 20 * time.Microsecond

// Topologies are the scenarios without their loads.
func Topologies() []Scenario {
	cutByKernel := "No link carries super-packets: every sender's kernel cuts what it is given into packets of the MTU before the link, as if no card could (GSO, TSO and USO off)"
	all := []Scenario{
		{
			Name: OneRelay, Beside: Peers(),
			About: "The client reaches the private host through one relay: TUN → netstack → QUIC → relay → gateway. Peers have their hub where the second relay's host is. Raw TCP is routed past all of it over the same links.",
		},
		{
			Name: Direct, Lab: lab.Config{Direct: true}, Beside: []string{QUICDirect, WireGuardDirect},
			About: "Client and gateway may call each other, so that Sallyway leaves its relay for a direct path a second after the session begins. Beside it quic-go as released, from end to end with the client's connections as streams and without a TUN, and wireguard-go without a hub.",
		},
		{
			Name: TwoRelays, Branch: true,
			About: "Two gateways, which the platform gives different relays, and one client with a session to each. Load through either and through both at once; then the relay in use is drained, killed and cut while a small exchange every few milliseconds looks for silence.",
		},
		{
			Name: SmallMTU, Lab: lab.Config{MTU: 1280}, Beside: []string{WireGuardGo, OpenSSH},
			About: "Every link between the sites has an MTU of 1280, the least that IPv6 allows.",
		},
		{
			Name: NoOffload, Lab: lab.Config{Wire: lab.Wire{NoSegmentation: true}}, Beside: []string{WireGuardGo, CoturnTURN},
			About: cutByKernel + ", and no receiver puts them together.",
		},
		{
			Name: GROAlone, Lab: lab.Config{Wire: lab.Wire{NoSegmentation: true, GRO: true}}, Beside: []string{WireGuardGo, CoturnTURN},
			About: cutByKernel + "; receivers and the router put together what arrives in one piece of work (GRO, UDP too).",
		},
		{
			Name: GROHeld, Lab: lab.Config{Wire: lab.Wire{NoSegmentation: true, GRO: true, Hold: groHold}}, Beside: []string{WireGuardGo, CoturnTURN},
			About: cutByKernel + fmt.Sprintf("; receivers and the router put together what arrives within %v (GRO with gro_flush_timeout and napi_defer_hard_irqs).", groHold),
		},
		{
			Name: Emulator, Lab: lab.Config{Access: &wan.Config{Seed: 1}},
			About: "The emulator of long links with nothing to emulate between the client's site and the rest: what it carries at most.",
		},
	}
	for _, rate := range []int{20, 100} {
		for _, rtt := range []int{20, 80} {
			for _, loss := range []float64{0, 0.5, 2} {
				all = append(all, longLink(rtt, loss, rate))
			}
		}
	}
	return append(all, longLink(20, 0, 1000), longLink(80, 0, 1000))
}

// longLink is a scenario with an emulated link at the client's site. The round trip is in milliseconds, the loss in percent of
// the packets in each direction, the rate in Mbit/s.
func longLink(rtt int, loss float64, rate int) Scenario {
	way := wan.Direction{Delay: time.Duration(rtt) * time.Millisecond / 2, Loss: loss / 100, Rate: int64(rate) * 1e6}
	return Scenario{
		Name:  fmt.Sprintf("wan-%dms-%g%%-%dM", rtt, loss, rate),
		About: fmt.Sprintf("The client's access is an emulated link: %d ms round trip, %g %% loss each way, %d Mbit/s, a queue of 100 ms.", rtt, loss, rate),
		Lab:   lab.Config{Access: &wan.Config{AtoB: way, BtoA: way, Seed: 1}},
	}
}

// wanCC is the congestion control of iperf3's ends on long links: the usual one, whatever the machine's own is.
const wanCC = "cubic"

// Full are all scenarios, with loads for medians: more than an hour.
func Full() []Scenario {
	all := Topologies()
	for i := range all {
		s := &all[i]
		switch {
		case s.Name == OneRelay:
			s.Load = Load{
				Runs: 5, Time: 4 * time.Second, Flows: []int{1, 8}, Rates: []int{50, 200, 500}, RateRuns: 3,
				Beats: 3000, Dials: 200, Loaded: true, Many: 1000, Cold: 5,
			}
		case s.Name == Direct:
			s.Load = Load{Runs: 5, Time: 3 * time.Second, Flows: []int{1, 8}, Beats: 2000, Dials: 100, Loaded: true}
		case s.Name == TwoRelays:
			s.Load = Load{Runs: 3, Time: 3 * time.Second, Flows: []int{1}, Beats: 1000, Dials: 50, Spread: 5, Moves: 3, MoveLoads: []string{noLoad, direction(false), direction(true)}}
		case s.Name == Emulator:
			s.Load = Load{Runs: 3, Time: 3 * time.Second, Flows: []int{1, 8}, Beats: 1000, Dials: 50}
		case s.Lab.Access != nil:
			s.Load = Load{Runs: 3, Time: 6 * time.Second, Flows: []int{1}, CC: wanCC, Beats: 50, Dials: 5, Ceiling: true}
		default:
			s.Load = Load{Runs: 5, Time: 3 * time.Second, Flows: []int{1}, Rates: []int{50, 200}, RateRuns: 1, Beats: 1000, Dials: 50, Loaded: true}
		}
	}
	return all
}

// Quick is one short look at every kind of scenario, without peers: a few minutes.
func Quick() []Scenario {
	var all []Scenario
	for _, s := range Topologies() {
		s.Beside = nil
		switch s.Name {
		case OneRelay:
			s.Load = Load{
				Runs: 3, Time: 2 * time.Second, Flows: []int{1, 8}, Rates: []int{200}, RateRuns: 1,
				Beats: 500, Dials: 50, Loaded: true, Many: 1000, Cold: 2,
			}
		case Direct:
			s.Beside = []string{QUICDirect}
			s.Load = Load{Runs: 1, Time: 2 * time.Second, Flows: []int{1}, Beats: 200, Dials: 10}
		case TwoRelays:
			s.Load = Load{Spread: 1, Time: time.Second, Moves: 1, MoveLoads: []string{direction(false)}}
		case SmallMTU, GROAlone:
			s.Load = Load{Runs: 1, Time: 2 * time.Second, Flows: []int{1}, Beats: 200, Dials: 10}
		case longLink(80, 0.5, 100).Name:
			s.Load = Load{Runs: 1, Time: 4 * time.Second, Flows: []int{1}, CC: wanCC, Beats: 10, Dials: 3, Ceiling: true}
		default:
			continue
		}
		all = append(all, s)
	}
	return all
}

// Merge are the scenarios of first, and those of second that first has not.
func Merge(first, second []Scenario) []Scenario {
	all := slices.Clone(first)
	for _, s := range second {
		if _, ok := find(first, s.Name); !ok {
			all = append(all, s)
		}
	}
	return all
}

// Select keeps the scenarios of the given names, in their order. An unknown name is an error that lists them.
func Select(all []Scenario, names []string) ([]Scenario, error) {
	for _, n := range names {
		if _, ok := find(all, n); !ok {
			var have []string
			for _, s := range all {
				have = append(have, s.Name)
			}
			return nil, fmt.Errorf("no scenario %q; there are %q", n, have)
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(s Scenario) bool { return !slices.Contains(names, s.Name) }), nil
}
