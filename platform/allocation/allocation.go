// Package allocation decides which relays a gateway holds its legs on. It is a pure function of what is known, so that every replica
// and every restart comes to the same answer.
package allocation

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"time"
)

// Legs is how many relays a gateway gets: active and standby.
const Legs = 2

// Patience is how long a relay that went silent keeps the places it has: most outages are shorter, and a move costs more.
const Patience = 60 * time.Second

// Relay is a candidate.
type Relay struct {
	ID string
	// Healthy relays take new gateways first, Degraded ones next; others take none.
	Healthy, Degraded bool
	Draining          bool
	// Silent is for how long it has been unreachable; zero means that it is reachable.
	Silent time.Duration
	// Load is what it carries besides the places that this package counts, in places.
	Load float64
}

func (r *Relay) takes() bool { return (r.Healthy || r.Degraded) && !r.Draining && r.Silent == 0 }

func (r *Relay) keeps() bool { return !r.Draining && r.Silent < Patience }

// Assign returns the relays of every gateway, active first. current is what they have; a relay keeps its places while it is not
// draining and not silent for Patience or longer, and their order, so that nothing moves without need. Free places go to the
// healthiest, then the least loaded, then by a hash that spreads equals evenly and always the same way.
func Assign(gateways []string, relays []Relay, current map[string][]string) map[string][]string {
	byID := make(map[string]*Relay, len(relays))
	for i := range relays {
		byID[relays[i].ID] = &relays[i]
	}
	places := make(map[string]int)
	active := make(map[string]int)
	out := make(map[string][]string, len(gateways))
	sorted := slices.Sorted(slices.Values(gateways))
	for _, g := range sorted {
		var kept []string
		for _, id := range current[g] {
			if r := byID[id]; r != nil && r.keeps() && len(kept) < Legs && !slices.Contains(kept, id) {
				kept = append(kept, id)
			}
		}
		out[g] = kept
		count(kept, places, active)
	}
	for _, g := range sorted {
		if len(out[g]) >= Legs {
			continue
		}
		first := len(out[g]) == 0
		free := make([]*Relay, 0, len(relays))
		for i := range relays {
			if r := &relays[i]; r.takes() && !slices.Contains(out[g], r.ID) {
				free = append(free, r)
			}
		}
		for len(out[g]) < Legs && len(free) > 0 {
			counts := places
			if first && len(out[g]) == 0 {
				counts = active // spread the active legs, then all
			}
			best := slices.MinFunc(free, func(a, b *Relay) int {
				return cmp.Or(
					-cmp.Compare(rank(a), rank(b)),
					cmp.Compare(float64(counts[a.ID])+a.Load, float64(counts[b.ID])+b.Load),
					cmp.Compare(places[a.ID], places[b.ID]),
					cmp.Compare(spread(g, a.ID), spread(g, b.ID)),
				)
			})
			if len(out[g]) == 0 {
				active[best.ID]++
			}
			out[g] = append(out[g], best.ID)
			places[best.ID]++
			free = slices.DeleteFunc(free, func(r *Relay) bool { return r == best })
		}
		// Better a relay that drains or is silent than none: it may be all there is.
		for _, id := range current[g] {
			if r := byID[id]; r != nil && len(out[g]) == 0 {
				out[g] = []string{id}
			}
		}
	}
	return out
}

func count(kept []string, places, active map[string]int) {
	for i, id := range kept {
		places[id]++
		if i == 0 {
			active[id]++
		}
	}
}

func rank(r *Relay) int {
	switch {
	case r.Healthy:
		return 2
	case r.Degraded:
		return 1
	}
	return 0
}

// spread is a rendezvous hash.
func spread(gateway, relay string) uint64 {
	h := sha256.Sum256([]byte(gateway + "\x00" + relay))
	return binary.BigEndian.Uint64(h[:8])
}
