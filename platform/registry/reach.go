package registry

import (
	"context"
	"slices"
	"strings"

	"sallyway/internal/identity"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// Reach is who reaches what in an organization: policies resolved to nodes, resources and the gateways and relays between them, by name. It
// holds what is in force: nothing that is disabled, revoked or deleted.
type Reach struct {
	// Subjects maps client:NAME and gateway:NAME to the names of the resources that policies allow them, sorted.
	Subjects map[string][]string
	// Gateways maps a resource to the gateways that serve it, most preferred first.
	Gateways map[string][]string
	// Relays maps a gateway to its relays, active first.
	Relays map[string][]string
}

// Resources are what a client or gateway may reach behind a gateway, sorted.
func (r *Reach) Resources(subject, gateway string) (names []string) {
	for _, v := range r.Subjects[subject] {
		if slices.Contains(r.Gateways[v], gateway) {
			names = append(names, v)
		}
	}
	return names
}

// Reach resolves the policies of an organization.
func (r *Registry) Reach(ctx context.Context, org string) (*Reach, error) {
	var out *Reach
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = &Reach{Subjects: make(map[string][]string), Gateways: make(map[string][]string), Relays: make(map[string][]string)}
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		nodes, err := tx.Nodes(ctx, org, "", store.Page{})
		if err != nil {
			return err
		}
		byID := make(map[string]*store.Node, len(nodes))
		for _, n := range nodes {
			if n.Status == store.Active {
				byID[n.ID] = n
			}
		}
		resources, err := tx.Resources(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		names := make(map[string]string, len(resources))
		for _, v := range resources {
			if v.Disabled {
				continue
			}
			names[v.ID] = v.Name
			for _, g := range v.Gateways {
				if n := byID[g.ID]; n != nil {
					out.Gateways[v.Name] = append(out.Gateways[v.Name], n.Name)
				}
			}
		}
		groups, err := view.Groups(ctx, tx, org)
		if err != nil {
			return err
		}
		members := make(map[string][]string, len(groups))
		for _, g := range groups {
			members[g.ID] = g.Members
		}
		people, err := view.PeopleNodes(ctx, tx, org)
		if err != nil {
			return err
		}
		policies, err := tx.Policies(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		for _, p := range policies {
			v := names[p.Resource]
			if p.Disabled || v == "" {
				continue
			}
			subjects := []string{p.Subject}
			switch p.SubjectKind {
			case subjectGroup:
				subjects = members[p.Subject]
			case view.SubjectPerson:
				subjects = people[p.Subject]
			}
			for _, id := range subjects {
				if n := byID[id]; n != nil {
					key := string(n.Kind) + ":" + n.Name
					out.Subjects[key] = append(out.Subjects[key], v)
				}
			}
		}
		for key, vs := range out.Subjects {
			slices.Sort(vs)
			out.Subjects[key] = slices.Compact(vs)
		}
		var l lookups
		for _, n := range nodes {
			if n.Kind != identity.Gateway || n.Status != store.Active {
				continue
			}
			relays, err := l.relays(ctx, tx, n)
			if err != nil {
				return err
			}
			if len(relays) > 0 {
				out.Relays[n.Name] = relays
			}
		}
		return nil
	})
	return out, err
}

// SubjectNames are the names of the subjects, sorted.
func (r *Reach) SubjectNames() []string {
	out := make([]string, 0, len(r.Subjects))
	for s := range r.Subjects {
		out = append(out, s)
	}
	slices.SortFunc(out, strings.Compare)
	return out
}

// ResourceSummary is an organization's resources in short.
type ResourceSummary struct {
	All, Policies int
	// SharedRelays is how many relays of the platform its nodes may use.
	SharedRelays int
	// Unreached are enabled resources that no gateway of theirs reaches, by name.
	Unreached []Unreached
}

// Unreached is a resource that is not reached, with why.
type Unreached struct{ Name, Why string }

// ResourceSummary counts resources and names those that are not reached.
func (r *Registry) ResourceSummary(ctx context.Context, org string) (*ResourceSummary, error) {
	var out *ResourceSummary
	err := r.Store.View(ctx, func(tx store.Tx) error {
		out = &ResourceSummary{}
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		vs, err := tx.Resources(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		ps, err := tx.Policies(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		shared, err := tx.Nodes(ctx, identity.SharedOrg, identity.Relay, store.Page{})
		if err != nil {
			return err
		}
		region, err := tx.OrgRegion(ctx, org)
		if err != nil {
			return err
		}
		sharing, err := view.LoadSharing(ctx, tx)
		if err != nil {
			return err
		}
		for _, n := range shared {
			if n.Status == store.Active && !n.Enrolled.IsZero() && sharing.Allows(region.Relays, n.ID) {
				out.SharedRelays++
			}
		}
		out.All, out.Policies = len(vs), len(ps)
		now := r.Now()
		type found struct {
			ok  bool
			why string
		}
		probes := make(map[string]map[string]found) // by gateway and resource
		for _, v := range vs {
			if v.Disabled {
				continue
			}
			if len(v.Gateways) == 0 {
				out.Unreached = append(out.Unreached, Unreached{v.Name, "No gateway serves it: choose one."})
				continue
			}
			why, reached := "", false
			for _, g := range v.Gateways {
				at, known := probes[g.ID]
				if !known {
					at = make(map[string]found)
					if beat, ok := r.Board.Get(g.ID); ok && now.Sub(beat.At) < presenceTimeout {
						for _, h := range beat.Resources {
							at[h.ID] = found{h.OK, h.Reason}
						}
					}
					probes[g.ID] = at
				}
				f, probed := at[v.ID]
				switch {
				case !probed:
				case f.ok:
					reached = true
				case why == "":
					why = f.why
				}
			}
			if !reached && why != "" {
				out.Unreached = append(out.Unreached, Unreached{v.Name, why})
			}
		}
		return nil
	})
	return out, err
}
