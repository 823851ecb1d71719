package allocation

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// A relay is too empty below light of the mean, and below the mean while another has more than heavy of it.
const (
	light = 0.9
	heavy = 1.1
)

// improve moves a gateway to what has been better by far for Long.
func (r *run) improve(g *Gateway) {
	ps := r.out[g.ID]
	if len(ps) < Legs || ps[0].why != "" || ps[1].why != "" {
		return // it moves already, or there is nothing else
	}
	better := r.better(g, ps)
	if better == nil {
		return
	}
	since := r.was.gateways[g.ID].better
	if since.IsZero() {
		since = r.in.Now
	}
	if r.in.Now.Sub(since) >= Long && r.next.moves >= 1 {
		r.next.moves--
		r.set(g, better)
		return
	}
	r.next.gateways[g.ID] = memory{better: since}
}

// better is what a gateway should rather have than ps, nil for nothing.
func (r *run) better(g *Gateway, ps []place) []place {
	a, s := ps[0], ps[1]
	if len(g.Prefer) == 0 && !a.Degraded && !s.Degraded && !shares(a.Relay, s.Relay) {
		shortest := r.distance(g).shortest
		if worst := max(g.RTT[a.ID], g.RTT[s.ID]); worst-shortest < Margin(worst) {
			return nil // most of them, most of the time
		}
	}
	pinnedA, pinnedS := slices.Contains(g.Pin, a.ID), slices.Contains(g.Pin, s.ID)
	if !pinnedA {
		if why := r.worth(g, a.Relay, s.Relay); why != "" && !pinnedS {
			s.why = "is active now: " + why
			return []place{s, {Relay: a.Relay, why: "is standby now"}}
		}
		if c, why := r.bestOver(g, a.Relay, ps, func(*Relay) bool { return true }); c != nil {
			// The former active relay stays as standby, so that sessions move over two legs that are up.
			n := place{Relay: c, why: why}
			if pinnedS || (shares(c, a.Relay) && !shares(c, s.Relay)) {
				return []place{n, s}
			}
			return []place{n, {Relay: a.Relay, why: "is standby now"}}
		}
	}
	if pinnedS {
		return nil
	}
	if shares(a.Relay, s.Relay) {
		var apart []*Relay
		for _, c := range r.takers {
			if c.Healthy && c.Doubt == "" && !shares(a.Relay, c) {
				apart = append(apart, c)
			}
		}
		if c, why := r.choose(g, apart, ps, false); c != nil {
			return []place{a, {Relay: c, why: fmt.Sprintf("moved from %s: it shares the failure domain %s with %s; %s: %s", s.name(), s.Domain, a.name(), c.name(), why)}}
		}
	}
	if c, why := r.bestOver(g, s.Relay, ps, func(c *Relay) bool { return !shares(a.Relay, c) || shares(a.Relay, s.Relay) }); c != nil {
		return []place{a, {Relay: c, why: why}}
	}
	return nil
}

// bestOver is the best of the relays that are worth a move from had, among those that ok likes.
func (r *run) bestOver(g *Gateway, had *Relay, ps []place, ok func(*Relay) bool) (*Relay, string) {
	var from []*Relay
	for _, c := range r.takers {
		if !has(ps, c) && r.worth(g, had, c) != "" && ok(c) {
			from = append(from, c)
		}
	}
	if len(from) == 0 {
		return nil, ""
	}
	c, _ := r.choose(g, from, nil, had == ps[0].Relay)
	if c == nil {
		return nil, ""
	}
	return c, c.name() + ": " + r.worth(g, had, c)
}

// worth says why a gateway should move from a relay that it may keep to another one, "" for no reason.
func (r *run) worth(g *Gateway, had, c *Relay) string {
	if !c.healthy() || c.Doubt != "" {
		return ""
	}
	if len(g.Prefer) > 0 {
		switch likes, liked := slices.Contains(g.Prefer, c.ID), slices.Contains(g.Prefer, had.ID); {
		case likes && !liked:
			return "preferred to " + had.name()
		case liked && !likes && had.healthy():
			return ""
		}
	}
	if had.Degraded && had.Silent == 0 {
		return fmt.Sprintf("healthy, %s has been degraded for %v", had.name(), Long)
	}
	from, to := g.RTT[had.ID], g.RTT[c.ID]
	if from > 0 && to > 0 && from-to >= Margin(from) {
		return fmt.Sprintf("%s, %s better than %s for %v", ms(to), ms(from-to), had.name(), Long)
	}
	return ""
}

// rebalance moves gateways to relays that have been too empty for Long, from relays that have more than the mean, where both are alike.
func (r *run) rebalance() {
	if len(r.takers) < 2 {
		return
	}
	var places, active, mostPlaces, mostActive float64
	for _, t := range r.takers {
		places += r.places[t]
		active += r.active[t]
		mostPlaces, mostActive = max(mostPlaces, r.places[t]), max(mostActive, r.active[t])
	}
	places /= float64(len(r.takers))
	active /= float64(len(r.takers))
	// The emptiest first: there may be moves for one alone.
	emptiest := slices.SortedStableFunc(slices.Values(r.takers), func(a, b *Relay) int {
		return cmp.Compare(r.places[a]+r.active[a], r.places[b]+r.active[b])
	})
	for _, to := range emptiest {
		if !to.Healthy || to.Doubt != "" {
			continue
		}
		if r.due(to, r.places[to], places, mostPlaces, r.was.light, r.next.light) {
			r.each(to, func(g *Gateway, ps []place) bool {
				from := ps[1].Relay
				if has(ps, to) || slices.Contains(g.Pin, from.ID) || r.places[from] < max(places, r.places[to]+2) || shares(ps[0].Relay, to) || !r.alike(g, from, to) {
					return false
				}
				r.set(g, []place{ps[0], {Relay: to, why: fmt.Sprintf("moved from %s: it has more gateways than %s", from.name(), to.name())}})
				return r.places[to] >= places
			})
		}
		if r.due(to, r.active[to], active, mostActive, r.was.lightActive, r.next.lightActive) {
			r.each(to, func(g *Gateway, ps []place) bool {
				from := ps[0].Relay
				if ps[1].Relay != to || slices.Contains(g.Pin, from.ID) || r.active[from] < max(active*light, r.active[to]+2) || !r.alike(g, from, to) {
					return false
				}
				r.set(g, []place{
					{Relay: to, why: fmt.Sprintf("is active now: %s has more active gateways", from.name())},
					{Relay: from, why: "is standby now"},
				})
				return r.active[to] >= active
			})
		}
	}
}

// due reports whether a relay has been too empty for Long, and remembers since when it is. most is what the fullest has.
func (r *run) due(relay *Relay, has, mean, most float64, was, next map[string]time.Time) bool {
	if has >= mean || (has >= mean*light && most <= mean*heavy) {
		return false
	}
	since, known := was[relay.ID]
	if !known {
		since = r.in.Now
	}
	next[relay.ID] = since
	return r.in.Now.Sub(since) >= Long
}

// each calls fn for gateways that do not move yet, while moves may be made, and counts one for every call that changed something. It ends when fn is
// content.
func (r *run) each(to *Relay, fn func(*Gateway, []place) bool) {
	for _, g := range r.order {
		if r.next.moves < 1 {
			return
		}
		ps := r.out[g.ID]
		if len(ps) < Legs || ps[0].why != "" || ps[1].why != "" || slices.Contains(g.Exclude, to.ID) {
			continue
		}
		content := fn(g, ps)
		if now := r.out[g.ID]; now[0].why != "" || now[1].why != "" {
			r.next.moves--
		}
		if content {
			return
		}
	}
}

// alike reports whether a gateway may have to in place of from for balance alone: it is not farther than what it would be given anew, and not
// preferred less.
func (r *run) alike(g *Gateway, from, to *Relay) bool {
	if slices.Contains(g.Prefer, from.ID) && !slices.Contains(g.Prefer, to.ID) {
		return false
	}
	near := r.distance(g)
	d := rtt(g, to, near.neutral)
	return d <= rtt(g, from, near.neutral) || d <= near.shortest+Tolerance(near.shortest)
}
