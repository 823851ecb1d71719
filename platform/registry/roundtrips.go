package registry

import (
	"context"
	"slices"
	"time"

	"sallyway/internal/identity"
	"sallyway/platform/store"
)

// RoundTrip is how far away a relay is from those that use it.
type RoundTrip struct {
	Median   time.Duration
	Gateways int // that measured it
}

// RoundTrips are the distances of relays by id, as the gateways of an organization that are there measured them.
func (r *Registry) RoundTrips(ctx context.Context, org string) (map[string]RoundTrip, error) {
	var out map[string]RoundTrip
	err := r.Store.View(ctx, func(tx store.Tx) (err error) {
		out, err = r.roundTrips(ctx, tx, org)
		return err
	})
	return out, err
}

func (r *Registry) roundTrips(ctx context.Context, tx store.Tx, org string) (map[string]RoundTrip, error) {
	measured := make(map[string][]time.Duration)
	gs, err := tx.Nodes(ctx, org, identity.Gateway, store.Page{})
	if err != nil {
		return nil, err
	}
	now := r.Now()
	for _, g := range gs {
		beat, ok := r.Board.Get(g.ID)
		if !ok || now.Sub(beat.At) >= presenceTimeout {
			continue
		}
		for relay, rtt := range beat.RelayRTT {
			if rtt > 0 {
				measured[relay] = append(measured[relay], rtt)
			}
		}
	}
	out := make(map[string]RoundTrip, len(measured))
	for relay, all := range measured {
		slices.Sort(all)
		out[relay] = RoundTrip{Median: all[len(all)/2], Gateways: len(all)}
	}
	return out, nil
}
