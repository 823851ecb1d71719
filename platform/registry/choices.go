package registry

import (
	"context"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/allocation"
	"sallyway/platform/store"
)

// ExplainRelays says of every relay why a gateway has it, or has not.
func (r *Registry) ExplainRelays(ctx context.Context, org, gateway string) (*control.RelayChoices, error) {
	var out *control.RelayChoices
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		g, err := tx.FindNode(ctx, org, identity.Gateway, gateway)
		if err != nil {
			return notFound(err, "gateway", gateway, org)
		}
		in, err := r.facts(ctx, tx, org, time.Time{})
		if err != nil {
			return err
		}
		states, shared := make(map[string]control.NodeState), make(map[string]bool)
		for _, o := range []string{org, identity.SharedOrg} {
			ns, err := tx.Nodes(ctx, o, identity.Relay, store.Page{})
			if err != nil {
				return err
			}
			for _, n := range ns {
				states[n.ID], shared[n.ID] = r.Board.State(n, in.Now), o != org
			}
		}
		out = &control.RelayChoices{Gateway: g.Name, Items: []control.RelayChoice{}}
		wish := allocation.Gateway{ID: g.ID}
		if k := slices.IndexFunc(in.Gateways, func(w allocation.Gateway) bool { return w.ID == g.ID }); k >= 0 {
			wish = in.Gateways[k]
		}
		why := r.places.reasons(org, g.ID, in.Current[g.ID])
		if why == nil {
			// Another platform decided, or this one has just started: what it would say if it decided now to leave all as it is.
			if got, _ := allocation.Decide(*in, nil); slices.Equal(got[g.ID].Relays, in.Current[g.ID]) {
				why = got[g.ID].Why
			}
		}
		for _, c := range allocation.Explain(*in, &wish, why) {
			out.Items = append(out.Items, control.RelayChoice{
				Relay: c.Name, Shared: shared[c.ID], Place: c.Place, State: states[c.ID], Region: c.Region, FailureDomain: c.Domain,
				RTT: c.RTT, Gateways: c.Places, Active: c.Active, Load: c.Load, Why: c.Why,
			})
		}
		return nil
	})
	return out, err
}

// RelayUser is a gateway that has a relay.
type RelayUser struct {
	Gateway string
	Active  bool
	Why     string // "" is not known here
}

// RelayUsers are the gateways of an organization that have a relay, by its id: those for which it is the active one first, by name.
func (r *Registry) RelayUsers(ctx context.Context, org, relay string) (out []RelayUser, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		out = nil
		all, err := tx.Assignments(ctx, org)
		if err != nil {
			return err
		}
		gs, err := tx.Nodes(ctx, org, identity.Gateway, store.Page{})
		if err != nil {
			return err
		}
		for _, g := range gs {
			k := slices.Index(all[g.ID], relay)
			if k < 0 {
				continue
			}
			u := RelayUser{Gateway: g.Name, Active: k == 0}
			if why := r.places.reasons(org, g.ID, all[g.ID]); k < len(why) {
				u.Why = why[k]
			}
			out = append(out, u)
		}
		slices.SortStableFunc(out, func(a, b RelayUser) int {
			switch {
			case a.Active == b.Active:
				return 0
			case a.Active:
				return -1
			}
			return 1
		})
		return nil
	})
	return out, err
}
