// Package allocation decides which relays a gateway holds its legs on: an active one and a standby. It does no I/O and reads no clock: the
// same facts and the same Memory give the same answer on every replica.
//
// Nothing moves without need. A relay keeps its places until it drains, is silent for Patience, is out (see Relay.Out), or is excluded. A free
// place goes, in this order, to a relay of another failure domain than the gateway's other relay; a healthy one before a degraded one; one
// without a doubt; a preferred one; one of those whose round trip is alike to the shortest (see Tolerance); of these, the least loaded; and by a
// hash that spreads equals evenly.
//
// A pin is strict while the relay is usable, and no more: while it is not, the gateway has what it would have without the pin, and the reason
// says so; when it is usable again the gateway returns to it at once. A relay that is excluded is never given, even where that leaves none.
//
// What is only better is left for what is better by far (see Margin), for Long without a break, and not by more than a share of the gateways
// at a time (see movesPerMinute). So a relay that comes back fills up slowly: standby places first, which no session notices, then roles are swapped.
//
//	places, memory := allocation.Decide(allocation.Input{Now: now, Gateways: gateways, Relays: relays, Current: current}, memory)
package allocation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Legs is how many relays a gateway gets: active and standby.
const Legs = 2

// Patience is how long a relay that went silent keeps the places it has: most outages are shorter, and a move costs more.
const Patience = 60 * time.Second

// Long is for how long something must be better, or a relay too empty, before a gateway moves for it.
const Long = 10 * time.Minute

// Tolerance is how much longer than the shortest round trip one may be to count as alike: 10 ms, or a fifth of it.
func Tolerance(shortest time.Duration) time.Duration { return max(10*time.Millisecond, shortest/5) }

// Margin is by how much another round trip must be shorter than the present one to be worth a move: 20 ms, and a quarter of it. It is more than
// Tolerance, so what was alike when it was chosen is no reason to leave.
func Margin(present time.Duration) time.Duration { return max(20*time.Millisecond, present/4) }

// otherRegion is what a relay of another region than the gateway's counts as farther while its round trip is not known.
const otherRegion = 30 * time.Millisecond

// Relay is a candidate.
type Relay struct {
	ID   string
	Name string // for reasons; "" is ID
	// Region and Domain are labels: where it is, and what it may fail together with. "" is not labelled: alike to every region, and a failure
	// domain of its own.
	Region, Domain string
	// Healthy relays take new gateways first, Degraded ones next; others take none.
	Healthy, Degraded bool
	Draining          bool
	// Silent is for how long it has been unreachable; zero means that it is reachable.
	Silent time.Duration
	// Doubt is why it may be of no use although it is there, such as that it was not reached from outside. It is a hint: gateways that have the relay
	// keep it, others get it only where there is none without a doubt. "" is none.
	Doubt string
	// Out is why nobody may have it: deleted, disabled. Such a relay is there for the sake of reasons. "" is a candidate.
	Out string
	// Load is what it carries besides the places that this package counts, in places.
	Load float64
}

// What Relay.Out says of relays that an administrator took away.
const (
	Deleted  = "deleted"
	Disabled = "disabled"
)

func (r *Relay) takes() bool {
	return r.Out == "" && (r.Healthy || r.Degraded) && !r.Draining && r.Silent == 0
}

func (r *Relay) keeps() bool { return r.Out == "" && !r.Draining && r.Silent < Patience }

func (r *Relay) healthy() bool { return r.Healthy && r.takes() }

func (r *Relay) name() string { return cmp.Or(r.Name, r.ID) }

// Gateway is what wants relays. Clients have no places of their own: their legs follow the relays of the gateways that they use, and so
// do pins.
type Gateway struct {
	ID     string
	Region string // label; "" is none
	// RTT is what the gateway measured to relays, by id: the median of recent probes. What is not in it is not known, and counts as the
	// median of what is.
	RTT map[string]time.Duration
	// Pin are ids of relays that it has before all others while they are usable: first the active one. Exclude are relays that it never
	// gets, pinned or not. Prefer are relays that go before nearer ones.
	Pin, Exclude, Prefer []string
}

// Input is what is known now.
type Input struct {
	Now      time.Time
	Gateways []Gateway
	Relays   []Relay
	Current  map[string][]string // what gateways have, by id, active first
}

// Assignment is a gateway's relays, active first, and why each of them, in words.
type Assignment struct {
	Relays []string
	Why    []string // as long as Relays, or one text about why there is none
}

// Memory is what Decide has to know of the past. It is never changed: Decide returns the next one. Nil is none: all waiting begins now.
type Memory struct {
	gateways map[string]memory
	// since when a relay has had too few places, and too few active ones
	light, lightActive map[string]time.Time
	moves              float64 // that may be made for the better now
	at                 time.Time
}

// memory is that of a gateway.
type memory struct {
	better time.Time // since when there is something better; zero is that there is not
	came   []arrival // of the relays it has
}

type arrival struct {
	relay, why string
	at         time.Time
}

// movesPerMinute is how many gateways of n may be moved in a minute although they need not: one in 200, and at least one.
func movesPerMinute(n int) float64 { return max(1, float64(n)/200) }

// place is a relay that a gateway gets, and why.
type place struct {
	*Relay
	why  string // of a move that is made now; "" is kept
	kept string // of a place that is kept
}

// run is one decision.
type run struct {
	in             Input
	byID           map[string]*Relay
	order          []*Gateway
	out            map[string][]place
	takers         []*Relay // in the order of their ids
	places, active map[*Relay]float64
	was, next      *Memory
	distances      map[*Gateway]distance // found already
	known          []time.Duration       // scratch
}

// Decide returns the relays of every gateway and the memory for the next time.
func Decide(in Input, was *Memory) (map[string]Assignment, *Memory) {
	if was == nil {
		was = &Memory{at: in.Now, moves: movesPerMinute(len(in.Gateways))}
	}
	rate := movesPerMinute(len(in.Gateways))
	r := &run{
		in: in, byID: make(map[string]*Relay, len(in.Relays)), out: make(map[string][]place, len(in.Gateways)), was: was,
		places: make(map[*Relay]float64), active: make(map[*Relay]float64), distances: make(map[*Gateway]distance),
		next: &Memory{
			gateways: make(map[string]memory, len(in.Gateways)), light: map[string]time.Time{}, lightActive: map[string]time.Time{},
			at: in.Now, moves: min(rate, was.moves+rate*max(0, in.Now.Sub(was.at)).Minutes()),
		},
	}
	for i := range in.Relays {
		relay := &in.Relays[i]
		r.byID[relay.ID] = relay
		if relay.takes() {
			r.takers = append(r.takers, relay)
		}
		r.places[relay], r.active[relay] = relay.Load, relay.Load
	}
	slices.SortFunc(r.takers, func(a, b *Relay) int { return cmp.Compare(a.ID, b.ID) })
	for i := range in.Gateways {
		r.order = append(r.order, &in.Gateways[i])
	}
	slices.SortFunc(r.order, func(a, b *Gateway) int { return cmp.Compare(a.ID, b.ID) })
	for _, g := range r.order {
		r.set(g, r.keep(g))
	}
	for _, g := range r.order {
		r.fill(g)
	}
	for _, g := range r.order {
		r.improve(g)
	}
	r.rebalance()
	return r.result(), r.next
}

// set gives a gateway its places, in place of those that it had.
func (r *run) set(g *Gateway, ps []place) {
	r.count(r.out[g.ID], -1)
	r.out[g.ID] = ps
	r.count(ps, 1)
}

func (r *run) count(ps []place, n float64) {
	for i, p := range ps {
		r.places[p.Relay] += n
		if i == 0 {
			r.active[p.Relay] += n
		}
	}
}

// keep is what a gateway keeps, and what is pinned.
func (r *run) keep(g *Gateway) []place {
	current := r.in.Current[g.ID]
	var out []place
	add := func(id string, pinned bool) {
		relay := r.byID[id]
		if relay == nil || len(out) == Legs || has(out, relay) || slices.Contains(g.Exclude, id) {
			return
		}
		had := slices.Contains(current, id)
		switch {
		case had && relay.keeps():
			out = append(out, place{Relay: relay, kept: r.keptWhy(g, relay, pinned)})
		case !had && pinned && relay.takes():
			out = append(out, place{Relay: relay, why: "pinned"})
		}
	}
	for _, id := range g.Pin {
		add(id, true)
	}
	for _, id := range current {
		add(id, false)
	}
	return out
}

// fill gives a gateway what it lacks.
func (r *run) fill(g *Gateway) {
	ps := r.out[g.ID]
	if len(ps) >= Legs {
		return
	}
	ps = slices.Clone(ps)
	left := r.left(g, ps)
	for len(ps) < Legs {
		best, why := r.choose(g, r.takers, ps, len(ps) == 0)
		if best == nil {
			break
		}
		if len(left) > 0 {
			why, left = left[0]+"; "+best.name()+": "+why, left[1:]
		}
		ps = append(ps, place{Relay: best, why: why})
		r.set(g, slices.Clone(ps))
	}
	if len(ps) > 0 {
		return
	}
	// Better a relay that drains or is silent than none: it may be all there is.
	var last *Relay
	for _, id := range r.in.Current[g.ID] {
		relay := r.byID[id]
		if relay != nil && relay.Out == "" && !slices.Contains(g.Exclude, id) && (last == nil || relay.Silent < last.Silent) {
			last = relay
		}
	}
	if last != nil {
		r.set(g, []place{{Relay: last, kept: fmt.Sprintf("kept: %s, but no other relay is usable", last.state())}})
	}
}

// left says of each relay that a gateway had and has not in ps why it left it.
func (r *run) left(g *Gateway, ps []place) (out []string) {
	for _, id := range r.in.Current[g.ID] {
		relay := r.byID[id]
		switch {
		case relay == nil:
			out = append(out, "moved from a relay that is gone")
		case has(ps, relay):
		case slices.Contains(g.Exclude, id):
			out = append(out, fmt.Sprintf("moved from %s: excluded", relay.name()))
		default:
			out = append(out, fmt.Sprintf("moved from %s: %s", relay.name(), relay.state()))
		}
	}
	return out
}

// state is in words.
func (r *Relay) state() string {
	switch {
	case r.Out != "":
		return r.Out
	case r.Draining:
		return "draining"
	case r.Silent > 0:
		return fmt.Sprintf("unreachable for %v", r.Silent.Round(time.Second))
	case r.Degraded:
		return "degraded"
	case r.Healthy:
		return "healthy"
	}
	return "not in service"
}

func (r *run) keptWhy(g *Gateway, relay *Relay, pinned bool) string {
	s := "kept: " + relay.state()
	if pinned {
		s = "kept: pinned, " + relay.state()
	}
	if relay.Silent > 0 {
		s += fmt.Sprintf(", is left after %v", Patience)
	} else if rtt := g.RTT[relay.ID]; rtt > 0 {
		s += ", " + ms(rtt)
	}
	return s
}

// result puts the answer and the memory together.
func (r *run) result() map[string]Assignment {
	out := make(map[string]Assignment, len(r.order))
	for _, g := range r.order {
		ps := r.out[g.ID]
		if len(ps) == 0 {
			out[g.ID] = Assignment{Why: []string{r.noneWhy(g)}}
			continue
		}
		a := Assignment{Relays: make([]string, len(ps)), Why: make([]string, len(ps))}
		m := memory{better: r.next.gateways[g.ID].better, came: make([]arrival, 0, len(ps))}
		for i, p := range ps {
			a.Relays[i], a.Why[i] = p.ID, p.why
			if p.why != "" {
				m.came = append(m.came, arrival{p.ID, p.why, r.in.Now})
				continue
			}
			a.Why[i] = p.kept
			before := r.was.gateways[g.ID].came
			if k := slices.IndexFunc(before, func(c arrival) bool { return c.relay == p.ID }); k >= 0 {
				a.Why[i] += fmt.Sprintf(" (since %s: %s)", before[k].at.UTC().Format("2006-01-02 15:04 MST"), before[k].why)
				m.came = append(m.came, before[k])
			}
		}
		if missing := r.missing(g, ps); missing != "" {
			a.Why[0] += "; " + missing
		}
		r.next.gateways[g.ID] = m
		out[g.ID] = a
	}
	return out
}

// missing says of the pins of a gateway that it has not why, "" where it has them, or as many as it can.
func (r *run) missing(g *Gateway, ps []place) string {
	var out []string
	for i, id := range g.Pin {
		relay := r.byID[id]
		switch {
		case i >= Legs:
		case relay == nil:
			out = append(out, "a pinned relay is gone")
		case has(ps, relay):
		case slices.Contains(g.Exclude, id):
			out = append(out, relay.name()+" is pinned and excluded")
		default:
			out = append(out, fmt.Sprintf("%s is pinned, but %s", relay.name(), relay.state()))
		}
	}
	return strings.Join(out, "; ")
}

func (r *run) noneWhy(g *Gateway) string {
	for _, t := range r.takers {
		if slices.Contains(g.Exclude, t.ID) {
			return "none: every usable relay is excluded for this gateway; exclude fewer, or add a relay"
		}
	}
	for i := range r.in.Relays {
		if out := r.in.Relays[i].Out; out != "" && out != Deleted && out != Disabled {
			return fmt.Sprintf("none: no relay is usable, and %s is %s; start one, or add one", r.in.Relays[i].name(), out)
		}
	}
	return "none: no relay is usable; start one, or add one"
}

func has(ps []place, relay *Relay) bool {
	return slices.ContainsFunc(ps, func(p place) bool { return p.Relay == relay })
}

func ms(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	return fmt.Sprintf("%.0f ms", d.Seconds()*1000)
}
