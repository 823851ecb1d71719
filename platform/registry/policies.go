package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

const subjectGroup = "group"

const maxMembers = 10_000

// subject resolves client:NAME, gateway:NAME, group:NAME, person:LOGIN or platform to its kind, id and nodes.
func subject(ctx context.Context, tx store.Tx, org, s string) (kind, id string, nodes []*store.Node, err error) {
	kind, name, _ := strings.Cut(s, ":")
	switch kind {
	case string(identity.Client), string(identity.Gateway):
		n, err := tx.FindNode(ctx, org, identity.Kind(kind), name)
		if err != nil {
			return "", "", nil, notFound(err, kind, name, org)
		}
		return kind, n.ID, []*store.Node{n}, nil
	case subjectGroup:
		g, err := tx.FindGroup(ctx, org, name)
		if err != nil {
			return "", "", nil, notFound(err, kind, name, org)
		}
		gs, err := view.Groups(ctx, tx, org)
		if err != nil {
			return "", "", nil, err
		}
		for _, v := range gs {
			if v.ID == g.ID {
				g = v
			}
		}
		nodes, err = nodesOf(ctx, tx, g.Members)
		return kind, g.ID, nodes, err
	case view.SubjectPlatform:
		if s != kind {
			break
		}
		return kind, kind, []*store.Node{view.Platform(org)}, nil
	case view.SubjectPerson:
		p, err := findPerson(ctx, tx, org, name)
		if err != nil {
			return "", "", nil, err
		}
		people, err := view.PeopleNodes(ctx, tx, org)
		if err != nil {
			return "", "", nil, err
		}
		nodes, err = nodesOf(ctx, tx, people[p.ID])
		return kind, p.ID, nodes, err
	}
	return "", "", nil, invalid("body.subject", "client:NAME, gateway:NAME, group:NAME, person:LOGIN or platform", "subject %.80q names nobody", s)
}

// subjectID finds a policy's subject without the nodes that it is, of which a group may have many thousands.
func subjectID(ctx context.Context, tx store.Tx, org, s string) (kind, id string, err error) {
	kind, name, _ := strings.Cut(s, ":")
	if kind != subjectGroup {
		kind, id, _, err = subject(ctx, tx, org, s)
		return kind, id, err
	}
	g, err := tx.FindGroup(ctx, org, name)
	if err != nil {
		return "", "", notFound(err, kind, name, org)
	}
	return kind, g.ID, nil
}

// subjectName is the reverse of subject.
func subjectName(ctx context.Context, tx store.Tx, org, kind, id string) (string, error) {
	if kind == subjectGroup {
		g, err := tx.FindGroup(ctx, org, id)
		if err != nil {
			return "", err
		}
		return kind + ":" + g.Name, nil
	}
	if kind == view.SubjectPlatform {
		return kind, nil
	}
	if kind == view.SubjectPerson {
		p, err := tx.Person(ctx, id)
		if err != nil {
			return "", err
		}
		return kind + ":" + p.Login, nil
	}
	n, err := tx.Node(ctx, id)
	if err != nil {
		return "", err
	}
	return kind + ":" + n.Name, nil
}

func policyRecord(ctx context.Context, tx store.Tx, p *store.Policy) (*control.PolicyRecord, error) {
	v, err := tx.FindResource(ctx, p.Org, p.Resource)
	if err != nil {
		return nil, err
	}
	sub, err := subjectName(ctx, tx, p.Org, p.SubjectKind, p.Subject)
	if err != nil {
		return nil, err
	}
	return &control.PolicyRecord{ID: p.ID, Name: p.Name, Subject: sub, Resource: v.Name, Disabled: p.Disabled, Created: p.Created}, nil
}

// CreatePolicy allows a subject a resource.
func (r *Registry) CreatePolicy(ctx context.Context, org string, req control.CreatePolicy) (*control.PolicyRecord, error) {
	if req.Name != "" {
		if err := checkName("policy", req.Name); err != nil {
			return nil, err
		}
	}
	var out *control.PolicyRecord
	err := r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		kind, id, err := subjectID(ctx, c.Tx, org, req.Subject)
		if err != nil {
			return err
		}
		v, err := c.FindResource(ctx, org, req.Resource)
		if err != nil {
			return notFound(err, "resource", req.Resource, org)
		}
		all, err := c.Policies(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.SubjectKind == kind && p.Subject == id && p.Resource == v.ID {
				remedy := "nothing needs to be done"
				if p.Disabled {
					remedy = fmt.Sprintf("sallyway --org %s policy enable %s", org, p.Name)
				}
				return refuse(http.StatusConflict, control.CodeConflict, remedy, "policy %q already allows %s resource %q", p.Name, req.Subject, v.Name)
			}
		}
		p := &store.Policy{ID: identity.NewID(identity.Policy), Org: org, Name: req.Name, SubjectKind: kind, Subject: id, Resource: v.ID, Created: c.now}
		if p.Name == "" {
			name, err := subjectName(ctx, c.Tx, org, kind, id)
			if err != nil {
				return err
			}
			p.Name = freeName(all, strings.ReplaceAll(name, ":", "-")+"-"+v.Name)
		}
		if err := c.InsertPolicy(ctx, p); err != nil {
			return taken(err, "policy", p.Name, org)
		}
		return c.policyDone(ctx, p, "policy.create", &out)
	})
	return out, err
}

// freeName makes a label that no policy has from a wish.
func freeName(all []*store.Policy, wish string) string {
	const room = 58 // of 63, for a number
	wish = strings.Trim(clip(wish, room), "-")
	name := wish
	for i := 2; slices.ContainsFunc(all, func(p *store.Policy) bool { return p.Name == name }); i++ {
		name = fmt.Sprintf("%s-%d", wish, i)
	}
	return name
}

func (c *change) policyDone(ctx context.Context, p *store.Policy, action string, out **control.PolicyRecord) error {
	rec, err := policyRecord(ctx, c.Tx, p)
	if err != nil {
		return err
	}
	*out = rec
	if err := c.audit(ctx, p.Org, action, "policy/"+p.ID, audit.OK, map[string]any{
		"name": p.Name, "subject": rec.Subject, "resource": rec.Resource, "disabled": p.Disabled,
	}); err != nil {
		return err
	}
	return c.bump(ctx, p.Org)
}

// Policies lists policies.
func (r *Registry) Policies(ctx context.Context, org string, p store.Page) (*control.List[control.PolicyRecord], error) {
	out := &control.List[control.PolicyRecord]{Items: []control.PolicyRecord{}}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		ps, err := tx.Policies(ctx, org, more(p))
		if err != nil {
			return err
		}
		ps, out.NextCursor = trim(ps, p.Limit, func(p *store.Policy) string { return p.Name })
		for _, p := range ps {
			rec, err := policyRecord(ctx, tx, p)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// Policy returns a policy by name or id.
func (r *Registry) Policy(ctx context.Context, org, name string) (*control.PolicyRecord, error) {
	var out *control.PolicyRecord
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		p, err := tx.FindPolicy(ctx, org, name)
		if err != nil {
			return notFound(err, "policy", name, org)
		}
		out, err = policyRecord(ctx, tx, p)
		return err
	})
	return out, err
}

// UpdatePolicy disables or enables a policy.
func (r *Registry) UpdatePolicy(ctx context.Context, org, name string, req control.UpdatePolicy) (*control.PolicyRecord, error) {
	var out *control.PolicyRecord
	err := r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		p, err := c.FindPolicy(ctx, org, name)
		if err != nil {
			return notFound(err, "policy", name, org)
		}
		set(&p.Disabled, req.Disabled)
		if err := c.UpdatePolicy(ctx, p); err != nil {
			return err
		}
		return c.policyDone(ctx, p, "policy.update", &out)
	})
	return out, err
}

// DeletePolicy deletes a policy.
func (r *Registry) DeletePolicy(ctx context.Context, org, name string) error {
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		p, err := c.FindPolicy(ctx, org, name)
		if err != nil {
			return notFound(err, "policy", name, org)
		}
		rec, err := policyRecord(ctx, c.Tx, p)
		if err != nil {
			return err
		}
		if err := c.DeletePolicy(ctx, p.ID); err != nil {
			return err
		}
		if err := c.audit(ctx, org, "policy.delete", "policy/"+p.ID, audit.OK, map[string]any{
			"name": p.Name, "subject": rec.Subject, "resource": rec.Resource,
		}); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
}

// Explain says whether a subject reaches a resource, by the snapshots that its gateways have.
func (r *Registry) Explain(ctx context.Context, org string, req control.ExplainRequest) (*control.Explanation, error) {
	var out control.Explanation
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		_, _, nodes, err := subject(ctx, tx, org, req.Subject)
		if err != nil {
			return err
		}
		v, err := tx.FindResource(ctx, org, req.Resource)
		if err != nil {
			return notFound(err, "resource", req.Resource, org)
		}
		switch req.Proto {
		case "", "tcp", "udp", "icmp":
		default:
			return invalid("body.proto", "tcp, udp or icmp", "protocol %.20q is never allowed", req.Proto)
		}
		o, err := view.Load(ctx, tx, r.Seal, org, r.Now())
		if err != nil {
			return err
		}
		out = o.Explain(req.Subject, nodes, v, req.Proto, req.Port)
		return nil
	})
	return &out, err
}

func (c *change) members(ctx context.Context, org string, names []string) (nodes, people []string, err error) {
	if len(names) > maxMembers {
		return nil, nil, invalid("body.members", "use several groups", "%d members, limit %d", len(names), maxMembers)
	}
	for _, s := range names {
		kind, id, _, err := subject(ctx, c.Tx, org, s)
		if err != nil {
			return nil, nil, err
		}
		switch kind {
		case subjectGroup:
			return nil, nil, invalid("body.members", "name clients, gateways and people", "a group can not be a member of a group")
		case view.SubjectPlatform:
			return nil, nil, invalid("body.members", "allow it by a policy of its own: sallyway policy allow --from platform --resource R", "the platform can not be a member of a group")
		case view.SubjectPerson:
			people = append(people, id)
		default:
			nodes = append(nodes, id)
		}
	}
	slices.Sort(people)
	return nodes, slices.Compact(people), nil
}

func groupRecord(ctx context.Context, tx store.Tx, g *store.Group) (*control.GroupRecord, error) {
	rec := &control.GroupRecord{Name: g.Name, Members: []string{}, Created: g.Created}
	for _, id := range g.Members {
		n, err := tx.Node(ctx, id)
		if err != nil {
			return nil, err
		}
		rec.Members = append(rec.Members, string(n.Kind)+":"+n.Name)
	}
	people, err := tx.GroupPeople(ctx, g.Org)
	if err != nil {
		return nil, err
	}
	for _, id := range people[g.ID] {
		p, err := tx.Person(ctx, id)
		if err != nil {
			return nil, err
		}
		rec.Members = append(rec.Members, view.SubjectPerson+":"+p.Login)
	}
	return rec, nil
}

// PutGroup makes a group (create) or replaces its members, unless members is nil.
func (r *Registry) PutGroup(ctx context.Context, org, name string, members *[]string, create bool) (*control.GroupRecord, error) {
	if create {
		if err := checkName("group", name); err != nil {
			return nil, err
		}
	}
	var out *control.GroupRecord
	err := r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		var ids, people []string
		var err error
		if members != nil {
			if ids, people, err = c.members(ctx, org, *members); err != nil {
				return err
			}
		}
		action := "group.update"
		g := &store.Group{ID: identity.NewID("unit"), Org: org, Name: name, Created: c.now, Members: ids}
		if create {
			action = "group.create"
			if err := c.InsertGroup(ctx, g); err != nil {
				return taken(err, "group", name, org)
			}
		} else {
			if g, err = c.FindGroup(ctx, org, name); err != nil {
				return notFound(err, "group", name, org)
			}
			if members != nil {
				g.Members = ids
			}
			if err := c.UpdateGroup(ctx, g); err != nil {
				return err
			}
		}
		if members != nil {
			if err := c.PutGroupPeople(ctx, g.ID, people); err != nil {
				return err
			}
		}
		if g, err = c.FindGroup(ctx, org, g.ID); err != nil {
			return err
		}
		if out, err = groupRecord(ctx, c.Tx, g); err != nil {
			return err
		}
		if err := c.audit(ctx, org, action, "group/"+g.ID, audit.OK, map[string]any{"name": g.Name, "members": out.Members}); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
	return out, err
}

// Groups lists groups.
func (r *Registry) Groups(ctx context.Context, org string, p store.Page) (*control.List[control.GroupRecord], error) {
	out := &control.List[control.GroupRecord]{Items: []control.GroupRecord{}}
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		gs, err := tx.Groups(ctx, org, more(p))
		if err != nil {
			return err
		}
		gs, out.NextCursor = trim(gs, p.Limit, func(g *store.Group) string { return g.Name })
		for _, g := range gs {
			rec, err := groupRecord(ctx, tx, g)
			if err != nil {
				return err
			}
			out.Items = append(out.Items, *rec)
		}
		return nil
	})
	return out, err
}

// Group returns a group by name or id.
func (r *Registry) Group(ctx context.Context, org, name string) (*control.GroupRecord, error) {
	var out *control.GroupRecord
	err := r.Store.View(ctx, func(tx store.Tx) error {
		if _, err := findOrg(ctx, tx, org); err != nil {
			return err
		}
		g, err := tx.FindGroup(ctx, org, name)
		if err != nil {
			return notFound(err, "group", name, org)
		}
		out, err = groupRecord(ctx, tx, g)
		return err
	})
	return out, err
}

// DeleteGroup deletes a group and the policies for it.
func (r *Registry) DeleteGroup(ctx context.Context, org, name string) error {
	return r.update(ctx, func(c *change) error {
		if _, err := c.org(ctx, org); err != nil {
			return err
		}
		g, err := c.FindGroup(ctx, org, name)
		if err != nil {
			return notFound(err, "group", name, org)
		}
		ps, err := c.Policies(ctx, org, store.Page{})
		if err != nil {
			return err
		}
		for _, p := range ps {
			if p.SubjectKind == subjectGroup && p.Subject == g.ID {
				if err := c.DeletePolicy(ctx, p.ID); err != nil && !errors.Is(err, store.ErrNotFound) {
					return err
				}
			}
		}
		if err := c.DeleteGroup(ctx, g.ID); err != nil {
			return err
		}
		if err := c.audit(ctx, org, "group.delete", "group/"+g.ID, audit.OK, map[string]any{"name": g.Name}); err != nil {
			return err
		}
		return c.bump(ctx, org)
	})
}
