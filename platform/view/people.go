package view

import (
	"context"
	"slices"

	"sallyway/platform/store"
)

// SubjectPerson is the kind of a policy's subject that stands for all nodes of a person.
const SubjectPerson = "person"

// Groups are the groups of org, with the nodes of the people in them among their members.
func Groups(ctx context.Context, tx store.Tx, org string) ([]*store.Group, error) {
	gs, err := tx.Groups(ctx, org, store.Page{})
	if err != nil {
		return nil, err
	}
	people, err := tx.GroupPeople(ctx, org)
	if err != nil || len(people) == 0 {
		return gs, err
	}
	nodes, err := PeopleNodes(ctx, tx, org)
	if err != nil {
		return nil, err
	}
	for _, g := range gs {
		for _, p := range people[g.ID] {
			for _, n := range nodes[p] {
				if !slices.Contains(g.Members, n) {
					g.Members = append(g.Members, n)
				}
			}
		}
	}
	return gs, nil
}

// PeopleNodes are the live nodes of people in org, by person.
func PeopleNodes(ctx context.Context, tx store.Tx, org string) (map[string][]string, error) {
	owners, err := tx.NodePeople(ctx, org)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]string)
	for node, person := range owners {
		out[person] = append(out[person], node)
	}
	for _, ns := range out {
		slices.Sort(ns)
	}
	return out, nil
}
