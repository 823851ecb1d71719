package allocation

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"
)

// choose finds the relay of a free place among from, beside the places that a gateway has already, and why it; nil is none.
func (r *run) choose(g *Gateway, from []*Relay, ps []place, active bool) (*Relay, string) {
	free := make([]*Relay, 0, len(from))
	for _, c := range from {
		if !has(ps, c) && !slices.Contains(g.Exclude, c.ID) {
			free = append(free, c)
		}
	}
	if len(free) == 0 {
		return nil, ""
	}
	var why []string
	if len(ps) > 0 {
		var other bool
		if free, other = narrow(free, func(c *Relay) bool { return !shares(ps[0].Relay, c) }); !other {
			why = append(why, "the only failure domain that is left")
		}
	}
	free, _ = narrow(free, (*Relay).healthy)
	free, _ = narrow(free, func(c *Relay) bool { return c.Doubt == "" })
	if preferred, ok := narrow(free, func(c *Relay) bool { return slices.Contains(g.Prefer, c.ID) }); ok && len(g.Prefer) > 0 {
		free, why = preferred, append(why, "preferred")
	}
	neutral := r.distance(g).neutral
	shortest := slices.MinFunc(free, func(a, b *Relay) int { return cmp.Compare(rtt(g, a, neutral), rtt(g, b, neutral)) })
	most := rtt(g, shortest, neutral)
	most += Tolerance(most)
	free, _ = narrow(free, func(c *Relay) bool { return rtt(g, c, neutral) <= most })
	counts := r.places
	if active {
		counts = r.active // spread the active legs, then all
	}
	best := free[0]
	for _, c := range free[1:] {
		if cmp.Or(
			cmp.Compare(counts[c], counts[best]), cmp.Compare(r.places[c], r.places[best]), cmp.Compare(spread(g.ID, c.ID), spread(g.ID, best.ID)),
		) < 0 {
			best = c
		}
	}
	if known := g.RTT[best.ID]; known > 0 {
		why = append(why, ms(known))
	}
	if len(free) > 1 {
		why = append(why, fmt.Sprintf("the least loaded of %d alike", len(free)))
	} else {
		why = append(why, "the best that is free")
	}
	if !best.Healthy {
		why = append(why, "degraded, as no healthy one is free")
	}
	if best.Doubt != "" {
		why = append(why, best.Doubt+", but no better one is free")
	}
	return best, strings.Join(why, ", ")
}

// narrow leaves those that ok likes, or all if it likes none.
func narrow(from []*Relay, ok func(*Relay) bool) ([]*Relay, bool) {
	out := make([]*Relay, 0, len(from))
	for _, c := range from {
		if ok(c) {
			out = append(out, c)
		}
	}
	if len(out) == 0 {
		return from, false
	}
	return out, true
}

// shares reports whether two relays may fail together.
func shares(a, b *Relay) bool { return a.Domain != "" && a.Domain == b.Domain }

// distance is what is known of a gateway's round trips to the relays that take places.
type distance struct {
	neutral  time.Duration // what one that is not known counts as: the median of those that are, zero if none is
	shortest time.Duration // to a healthy relay that is not excluded
}

func (r *run) distance(g *Gateway) distance {
	if len(g.RTT) == 0 && g.Region == "" {
		return distance{}
	}
	if d, ok := r.distances[g]; ok {
		return d
	}
	var d distance
	known := r.known[:0]
	for _, t := range r.takers {
		if k := g.RTT[t.ID]; k > 0 {
			known = append(known, k)
			if t.Healthy && (d.shortest == 0 || k < d.shortest) && !slices.Contains(g.Exclude, t.ID) {
				d.shortest = k
			}
		}
	}
	if r.known = known; len(known) < len(r.takers) {
		if len(known) > 0 {
			slices.Sort(known)
			d.neutral = known[len(known)/2]
		}
		for i, t := range r.takers {
			if k := rtt(g, t, d.neutral); i == 0 || k < d.shortest {
				d.shortest = k
			}
		}
	}
	r.distances[g] = d
	return d
}

// rtt is what the round trip from g to a relay counts as.
func rtt(g *Gateway, relay *Relay, neutral time.Duration) time.Duration {
	if d := g.RTT[relay.ID]; d > 0 {
		return d
	}
	if g.Region != "" && relay.Region != "" && g.Region != relay.Region {
		return neutral + otherRegion
	}
	return neutral
}

// spread is a rendezvous hash.
func spread(gateway, relay string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(gateway)) // never an error
	_, _ = h.Write([]byte{0})
	_, _ = h.Write([]byte(relay))
	// FNV's high bits follow the last bytes too little: mix them (the finalizer of SplitMix64).
	x := binary.BigEndian.Uint64(h.Sum(nil))
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
