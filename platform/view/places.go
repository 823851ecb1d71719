package view

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"sallyway/internal/identity"
	"sallyway/platform/store"
)

// RegionMeta is the key under which the database has the name of the deployment's region.
const RegionMeta = "region"

// Region is the region of the deployment, "" for one without a name.
func Region(ctx context.Context, tx store.Tx) (string, error) {
	b, err := tx.Meta(ctx, RegionMeta)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	return string(b), err
}

// Sharing knows where shared relays are: a relay without a label is in the deployment's region.
type Sharing struct {
	region string
	relays map[string]*store.Wishes
}

// LoadSharing reads it.
func LoadSharing(ctx context.Context, tx store.Tx) (*Sharing, error) {
	region, err := Region(ctx, tx)
	if err != nil {
		return nil, err
	}
	relays, err := tx.Wishes(ctx, identity.SharedOrg)
	return &Sharing{region: region, relays: relays}, err
}

// Region is that of a shared relay, by its id.
func (s *Sharing) Region(relay string) string {
	if w := s.relays[relay]; w != nil {
		return cmp.Or(w.Region, s.region)
	}
	return s.region
}

// Domain is the failure domain of a shared relay, by its id; "" is none.
func (s *Sharing) Domain(relay string) string {
	if w := s.relays[relay]; w != nil {
		return w.Domain
	}
	return ""
}

// Allows says whether an organization that allows regions uses a shared relay. None allows all; where the relay's region is not known, any other
// list forbids it.
func (s *Sharing) Allows(regions []string, relay string) bool {
	return len(regions) == 0 || slices.Contains(regions, s.Region(relay))
}

// mayUse says whether nodes of the organization use a relay: their own, or a shared one of a region that the organization allows.
func (v *View) mayUseRelay(home *View, id string) bool {
	return home == v || v.sharing.Allows(v.regions, id)
}

// arrange puts the relays of a gateway in the order that who dials it wishes, and leaves out those that it excludes: pinned ones first, then those
// that it prefers, then those of its own region. A gateway's wishes are about its own legs, too: these were given by them already. The list stays as it is.
func (v *View) arrange(n *store.Node, relays []*toldRelay) []*toldRelay {
	w := v.wishes[n.ID]
	if w == nil {
		return relays
	}
	relays = slices.DeleteFunc(slices.Clone(relays), func(r *toldRelay) bool { return slices.Contains(w.Exclude, r.node.ID) })
	rank := func(r *toldRelay) int {
		id := r.node.ID
		if k := slices.Index(w.Pin, id); k >= 0 {
			return k
		}
		if k := slices.Index(w.Prefer, id); k >= 0 {
			return len(w.Pin) + k
		}
		last := len(w.Pin) + len(w.Prefer)
		if w.Region != "" && v.regionOf(id) == w.Region {
			return last
		}
		return last + 1
	}
	slices.SortStableFunc(relays, func(a, b *toldRelay) int { return cmp.Compare(rank(a), rank(b)) })
	return relays
}

// regionOf is the region of a relay, "" for none.
func (v *View) regionOf(id string) string {
	if _, home := v.relay(id); home != nil && home != v {
		return v.sharing.Region(id)
	}
	if w := v.wishes[id]; w != nil {
		return w.Region
	}
	return ""
}
