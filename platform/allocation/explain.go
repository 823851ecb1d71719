package allocation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Choice is what a relay is to a gateway.
type Choice struct {
	*Relay
	Place string // active, standby; "" is none
	RTT   time.Duration
	// Places is how many gateways have the relay now, Active how many of them as the active one.
	Places, Active int
	Why            string
}

// The names of places.
const (
	Active  = "active"
	Standby = "standby"
)

// Explain says of every relay why a gateway has it, as why has it for those, or why it has not. It judges by what is known now: in.Current is what
// gateways have.
func Explain(in Input, g *Gateway, why []string) []Choice {
	places, active := make(map[string]int), make(map[string]int)
	for _, relays := range in.Current {
		for i, id := range relays {
			places[id]++
			if i == 0 {
				active[id]++
			}
		}
	}
	byID := make(map[string]*Relay, len(in.Relays))
	for i := range in.Relays {
		byID[in.Relays[i].ID] = &in.Relays[i]
	}
	var held []*Relay
	for _, id := range in.Current[g.ID] {
		if relay := byID[id]; relay != nil {
			held = append(held, relay)
		}
	}
	x := explanation{g, held, places, active}
	out := make([]Choice, 0, len(in.Relays))
	for i := range in.Relays {
		relay := &in.Relays[i]
		c := Choice{Relay: relay, RTT: g.RTT[relay.ID], Places: places[relay.ID], Active: active[relay.ID]}
		switch k := slices.Index(in.Current[g.ID], relay.ID); {
		case k < 0:
			c.Why = x.not(relay)
		case relay.Out != "":
			c.Place, c.Why = []string{Active, Standby}[min(k, 1)], "is left at once: "+relay.Out
		case k < len(why):
			c.Place, c.Why = []string{Active, Standby}[min(k, 1)], why[k]
		default:
			c.Place, c.Why = []string{Active, Standby}[min(k, 1)], "assigned, "+relay.state()
		}
		out = append(out, c)
	}
	rank := func(c Choice) int {
		switch {
		case c.Place == Active:
			return 0
		case c.Place == Standby:
			return 1
		case c.takes() && !slices.Contains(g.Exclude, c.ID):
			return 2
		}
		return 3
	}
	slices.SortStableFunc(out, func(a, b Choice) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(known(a.RTT), known(b.RTT)), cmp.Compare(a.name(), b.name()))
	})
	return out
}

// known puts what is not known last.
func known(d time.Duration) time.Duration {
	if d <= 0 {
		return time.Hour
	}
	return d
}

type explanation struct {
	g              *Gateway
	held           []*Relay
	places, active map[string]int
}

// not says why the gateway has not a relay.
func (x *explanation) not(relay *Relay) string {
	g := x.g
	switch {
	case relay.Out != "":
		return relay.Out
	case slices.Contains(g.Exclude, relay.ID):
		return "excluded for this gateway"
	case !relay.takes():
		return relay.state()
	case len(x.held) == 0:
		return "free: the gateway gets it next"
	case len(x.held) < Legs:
		return "free: the gateway gets a second relay next"
	}
	pinned := func(r *Relay) bool { return slices.Contains(g.Pin, r.ID) }
	if !slices.ContainsFunc(x.held, func(r *Relay) bool { return !pinned(r) }) {
		return names(x.held) + " are pinned"
	}
	first, second := x.held[0], x.held[1]
	if shares(relay, first) && !shares(first, second) {
		return fmt.Sprintf("may fail together with %s: both are of the failure domain %s", first.name(), relay.Domain)
	}
	healthy := !slices.ContainsFunc(x.held, func(r *Relay) bool { return !r.healthy() })
	switch {
	case !relay.Healthy && healthy:
		return "degraded, and healthy ones are there"
	case relay.Doubt != "":
		return relay.Doubt
	}
	if likes := func(r *Relay) bool { return slices.Contains(g.Prefer, r.ID) }; len(g.Prefer) > 0 {
		switch {
		case likes(relay) && !(likes(first) && likes(second)):
			return fmt.Sprintf("preferred: the gateway moves to it when that has held for %v", Long)
		case !likes(relay) && likes(first) && likes(second):
			return names(x.held) + " are preferred"
		}
	}
	return x.far(relay)
}

// far compares the distance and load of a relay with those that the gateway has.
func (x *explanation) far(relay *Relay) string {
	rtt := x.g.RTT[relay.ID]
	worst := slices.MaxFunc(x.held, func(a, b *Relay) int { return cmp.Compare(x.g.RTT[a.ID], x.g.RTT[b.ID]) })
	at := x.g.RTT[worst.ID]
	switch {
	case rtt == 0 && len(x.g.RTT) > 0:
		return "its distance is not known: it does not answer this gateway by UDP"
	case rtt == 0 || at == 0:
		if x.g.Region != "" && relay.Region != "" && x.g.Region != relay.Region {
			return fmt.Sprintf("of region %s, the gateway is in %s", relay.Region, x.g.Region)
		}
	case rtt > at+Tolerance(at):
		return fmt.Sprintf("%s farther than %s", ms(rtt-at), worst.name())
	case at-rtt >= Margin(at):
		return fmt.Sprintf("%s nearer than %s: the gateway moves when that has held for %v", ms(at-rtt), worst.name(), Long)
	case at-rtt > Tolerance(rtt):
		return fmt.Sprintf("%s nearer than %s, too little for a move: that takes %s", ms(at-rtt), worst.name(), ms(Margin(at)))
	}
	return fmt.Sprintf("alike: it has %d gateways, %s %d; no need to move", x.places[relay.ID], worst.name(), x.places[worst.ID])
}

func names(relays []*Relay) string {
	var out []string
	for _, r := range relays {
		out = append(out, r.name())
	}
	return strings.Join(out, " and ")
}
