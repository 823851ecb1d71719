package registry

import (
	"context"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/store"
)

// NodeFilter chooses nodes of a kind for a page that a person reads. The zero NodeFilter is all of them.
type NodeFilter struct {
	Query  string              // part of the name, id, host or version; lower case
	States []control.NodeState // empty is any
	Offset int
	Limit  int // 0 is all
}

// NodePage is what a NodeFilter finds.
type NodePage struct {
	Items []control.NodeRecord
	// All is how many nodes of the kind there are, Matches how many of them the filter finds, States how many are in which state.
	All, Matches int
	States       map[control.NodeState]int
}

// FindNodes lists nodes of a kind by name. Only those of the page cost more than their row.
func (r *Registry) FindNodes(ctx context.Context, org string, kind identity.Kind, f NodeFilter) (*NodePage, error) {
	out := &NodePage{States: make(map[control.NodeState]int)}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		ns, err := tx.Nodes(ctx, org, kind, store.Page{})
		if err != nil {
			return err
		}
		out.All = len(ns)
		now := r.Now()
		ns = slices.DeleteFunc(ns, func(n *store.Node) bool {
			state := r.Board.State(n, now)
			out.States[state]++
			return len(f.States) > 0 && !slices.Contains(f.States, state) || !f.matches(n)
		})
		out.Matches = len(ns)
		ns = ns[min(max(f.Offset, 0), len(ns)):]
		if f.Limit > 0 {
			ns = ns[:min(f.Limit, len(ns))]
		}
		var l lookups
		for _, n := range ns {
			rec, err := r.recordBy(ctx, tx, o, n, &l)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

func (f *NodeFilter) matches(n *store.Node) bool {
	if f.Query == "" {
		return true
	}
	for _, s := range []string{n.Name, n.ID, n.Host, n.Version} {
		if strings.Contains(strings.ToLower(s), f.Query) {
			return true
		}
	}
	return false
}

// NodeNames are the first names of a kind.
func (r *Registry) NodeNames(ctx context.Context, org string, kind identity.Kind, most int) (names []string, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		names = nil
		ns, err := tx.Nodes(ctx, org, kind, store.Page{Limit: most})
		for _, n := range ns {
			names = append(names, n.Name)
		}
		return err
	})
	return names, err
}

// ResourceNames are the first names of resources.
func (r *Registry) ResourceNames(ctx context.Context, org string, most int) (names []string, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		names = nil
		vs, err := tx.Resources(ctx, org, store.Page{Limit: most})
		for _, v := range vs {
			names = append(names, v.Name)
		}
		return err
	})
	return names, err
}

// ResourcePage is what FindResources finds.
type ResourcePage struct {
	Items                  []control.ResourceRecord
	All, Matches, Gateways int
}

// FindResources lists resources whose name, address or gateway has query in it (lower case), by name.
func (r *Registry) FindResources(ctx context.Context, org, query string, offset, limit int) (*ResourcePage, error) {
	out := &ResourcePage{}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		*out = ResourcePage{}
		o, err := findOrg(ctx, tx, org)
		if err != nil {
			return err
		}
		vs, err := tx.Resources(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		gs, err := tx.Nodes(ctx, org, identity.Gateway, store.Page{})
		if err != nil {
			return err
		}
		names := make(map[string]string, len(gs))
		for _, g := range gs {
			names[g.ID] = g.Name
		}
		out.All, out.Gateways = len(vs), len(gs)
		vs = slices.DeleteFunc(vs, func(v *store.Resource) bool {
			text := v.Name + " " + v.Target
			for _, g := range v.Gateways {
				text += " " + names[g.ID]
			}
			return !strings.Contains(strings.ToLower(text), query)
		})
		out.Matches = len(vs)
		vs = vs[min(max(offset, 0), len(vs)):]
		if limit > 0 {
			vs = vs[:min(limit, len(vs))]
		}
		for _, v := range vs {
			rec, err := r.resourceRecord(ctx, tx, o, v)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// NodeStates is the state of every node, by KIND:NAME.
func (r *Registry) NodeStates(ctx context.Context, org string) (out map[string]control.NodeState, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		ns, err := tx.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return err
		}
		now := r.Now()
		out = make(map[string]control.NodeState, len(ns))
		for _, n := range ns {
			out[string(n.Kind)+":"+n.Name] = r.Board.State(n, now)
		}
		return nil
	})
	return out, err
}

// PoliciesFor lists the policies for a resource, by its id.
func (r *Registry) PoliciesFor(ctx context.Context, org, resource string) (out []control.PolicyRecord, err error) {
	err = r.Store.View(ctx, func(tx store.Tx) error {
		out = nil
		ps, err := tx.Policies(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		for _, p := range ps {
			if p.Resource != resource {
				continue
			}
			rec, err := policyRecord(ctx, tx, p)
			if err != nil {
				return err
			}
			out = append(out, *rec)
		}
		return nil
	})
	return out, err
}
