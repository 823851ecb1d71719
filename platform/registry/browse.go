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
