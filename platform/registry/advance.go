package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/audit"
	"sallyway/platform/pki"
	"sallyway/platform/store"
)

// promote has a next CA issue, and the one that did so far retire.
func (c *change) promote(ctx context.Context, o *rotating, a *store.Authority, early bool) error {
	if old := o.in(a.Kind, store.Current); old != nil {
		old.State, old.Since, old.Until = store.Retiring, c.now, c.now.Add(c.r.retirement())
		if err := c.UpdateAuthority(ctx, old); err != nil {
			return err
		}
	}
	a.State, a.Since, a.Announced = store.Current, c.now, nil
	detail := authorityDetail(a)
	if early {
		detail["early"] = true
	}
	if err := errors.Join(c.UpdateAuthority(ctx, a), c.audit(ctx, o.org, "authority.current", authorityName(a), audit.OK, detail)); err != nil {
		return err
	}
	c.r.Log.Info("a CA took over", "org", o.org, "kind", a.Kind, "generation", a.Generation)
	return c.bump(ctx, o.org)
}

// retire ends a CA: nodes do not accept it any more, and its key is erased.
func (c *change) retire(ctx context.Context, o *rotating, a *store.Authority, early bool) error {
	a.State, a.Since, a.Key, a.Until = store.Gone, c.now, nil, c.now
	detail := authorityDetail(a)
	if early {
		detail["early"] = true
	}
	if err := errors.Join(c.UpdateAuthority(ctx, a), c.audit(ctx, o.org, "authority.gone", authorityName(a), audit.OK, detail)); err != nil {
		return err
	}
	c.r.Log.Info("a CA is gone", "org", o.org, "kind", a.Kind, "generation", a.Generation)
	return c.bump(ctx, o.org)
}

// AdvanceAuthorities takes the steps of rotations that are due, and says whether any rotation is under way. One replica calls it; that several do harms
// nobody.
func (r *Registry) AdvanceAuthorities(ctx context.Context) (underWay bool, err error) {
	var orgs []string
	if err := r.Store.View(ctx, func(tx store.Tx) error {
		orgs = nil
		moving, err := tx.MovingAuthorities(ctx)
		if err != nil {
			return err
		}
		underWay = len(moving) > 0
		for _, a := range moving {
			if slices.Contains(orgs, a.Org) {
				continue
			}
			c := &change{Tx: tx, r: r, now: r.Now().UTC()}
			o, err := c.rotating(ctx, a.Org)
			if err != nil {
				return err
			}
			due, err := c.due(ctx, o)
			if err != nil {
				return err
			}
			if len(due) > 0 {
				orgs = append(orgs, a.Org)
			}
		}
		return nil
	}); err != nil {
		return true, err
	}
	var errs []error
	for _, org := range orgs {
		errs = append(errs, r.update(ctx, func(c *change) error {
			o, err := c.rotating(ctx, org)
			if err != nil {
				return err
			}
			due, err := c.due(ctx, o)
			if err != nil {
				return err
			}
			for _, a := range due {
				step := c.promote
				if a.State == store.Retiring {
					step = c.retire
				}
				if err := step(ctx, o, a, false); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	return underWay, errors.Join(errs...)
}

// due are the CAs whose next step is due: intermediates before their root.
func (c *change) due(ctx context.Context, o *rotating) ([]*store.Authority, error) {
	var out, roots []*store.Authority
	heard := make(map[string]bool) // by what is announced: CAs of one rotation share it
	for _, a := range o.all {
		switch a.State {
		case store.Next:
			key := fmt.Sprint(a.Announced)
			if _, known := heard[key]; !known {
				left, err := c.unheard(ctx, a)
				if err != nil {
					return nil, err
				}
				heard[key] = len(left) == 0
			}
			if !heard[key] && c.now.Before(a.Since.Add(c.r.patience())) {
				continue
			}
		case store.Retiring:
			if c.now.Before(a.Until) {
				continue
			}
			if a.Kind == pki.KindRoot {
				left, err := o.issued(a, store.Next, store.Current, store.Retiring)
				if err != nil {
					return nil, err
				}
				if slices.ContainsFunc(left, func(i *store.Authority) bool { return !slices.Contains(out, i) || i.State != store.Retiring }) {
					continue
				}
				roots = append(roots, a)
				continue
			}
		default:
			continue
		}
		out = append(out, a)
	}
	return append(out, roots...), nil
}

// unheard are the nodes that have not said that they accept a, and hold a certificate that is good.
func (c *change) unheard(ctx context.Context, a *store.Authority) ([]control.Unheard, error) {
	out := []control.Unheard{}
	for _, org := range slices.Sorted(maps.Keys(a.Announced)) {
		nodes, err := c.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return nil, err
		}
		keys, err := c.OrgKeys(ctx, org)
		if err != nil {
			return nil, err
		}
		ends := make(map[string]time.Time, len(nodes))
		for _, k := range keys {
			if !k.Denied && k.NotAfter.After(ends[k.Node]) {
				ends[k.Node] = k.NotAfter
			}
		}
		for _, n := range nodes {
			end := ends[n.ID].Add(c.r.margin())
			if n.Status != store.Active || n.Enrolled.IsZero() || !end.After(c.now) {
				continue
			}
			if beat, ok := c.r.Board.Get(n.ID); ok && beat.ConfigVersion >= a.Announced[org] {
				continue
			}
			until := end
			if most := a.Since.Add(c.r.patience()); until.After(most) {
				until = most
			}
			out = append(out, control.Unheard{Node: n.Identity(), Name: n.Name, LastSeen: c.r.Board.LastSeen(n), Until: until})
		}
	}
	return out, nil
}
