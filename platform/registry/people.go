package registry

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"sallyway/platform/store"
	"sallyway/platform/view"
)

// nodesOf reads nodes by id.
func nodesOf(ctx context.Context, tx store.Tx, ids []string) (out []*store.Node, err error) {
	for _, id := range ids {
		n, err := tx.Node(ctx, id)
		if err != nil {
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

// ownerOf is the login of the person whose node it is, "" for nobody's.
func ownerOf(ctx context.Context, tx store.Tx, node string) (string, error) {
	id, err := tx.NodePerson(ctx, node)
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	p, err := tx.Person(ctx, id)
	if err != nil {
		return "", err
	}
	return p.Login, nil
}

// findPerson finds a person who has a role in org, or in all organizations, by login or id.
func findPerson(ctx context.Context, tx store.Tx, org, name string) (*store.Person, error) {
	p, err := tx.FindPerson(ctx, strings.ToLower(name))
	if err != nil {
		return nil, noPerson(err, name, org)
	}
	roles, err := tx.PersonRoles(ctx, p.ID)
	if err != nil {
		return nil, err
	}
	for _, r := range roles {
		if r.Org == org {
			return p, nil
		}
	}
	return nil, noPerson(store.ErrNotFound, name, org)
}

// noPerson words ErrNotFound, of people who have a role elsewhere as of nobody; other errors pass.
func noPerson(err error, name, org string) error {
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if !shellWord.MatchString(name) {
		name = "LOGIN"
	}
	refusal := notFound(err, "user", name, org)
	if e, ok := errors.AsType[*Error](refusal); ok {
		e.Problem.Remedy = fmt.Sprintf("give the person a role there first: sallyway --org %s user create %s --role member", org, name)
	}
	return refusal
}

// shellWord is a login that can stand in a command as it is.
var shellWord = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+@-]{0,252}$`)

// ForgetPerson takes a person out of the policies and groups of org (empty: of every organization).
func (c *Change) ForgetPerson(ctx context.Context, person, org string) error {
	orgs, err := c.Orgs(ctx, store.Page{})
	if err != nil {
		return err
	}
	for _, o := range orgs {
		if org != "" && o.Name != org {
			continue
		}
		changed := false
		ps, err := c.Policies(ctx, o.Name, store.Page{})
		if err != nil {
			return err
		}
		for _, p := range ps {
			if p.SubjectKind == view.SubjectPerson && p.Subject == person {
				if err := c.DeletePolicy(ctx, p.ID); err != nil {
					return err
				}
				changed = true
			}
		}
		groups, err := c.GroupPeople(ctx, o.Name)
		if err != nil {
			return err
		}
		for g, people := range groups {
			var rest []string
			for _, p := range people {
				if p != person {
					rest = append(rest, p)
				}
			}
			if len(rest) < len(people) {
				if err := c.PutGroupPeople(ctx, g, rest); err != nil {
					return err
				}
				changed = true
			}
		}
		if changed {
			if err := c.Bump(ctx, o.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// TOTPLabel is what the secret of a person's second factor is sealed for.
func TOTPLabel(person string) string { return "totp " + person }

// ProviderLabel is what a provider's secret is sealed for.
func ProviderLabel(provider string) string { return "oidc secret " + provider }

func resealPeople(ctx context.Context, tx store.Tx, again func(label string, b []byte) ([]byte, error)) error {
	people, err := tx.People(ctx, "", store.Page{})
	if err != nil {
		return err
	}
	for _, p := range people {
		if p.TOTP == nil {
			continue
		}
		if p.TOTP, err = again(TOTPLabel(p.ID), p.TOTP); err != nil {
			return err
		}
		if err := tx.UpdatePerson(ctx, p); err != nil {
			return err
		}
	}
	providers, err := tx.Providers(ctx, "", store.Page{})
	if err != nil {
		return err
	}
	for _, v := range providers {
		if v.Secret, err = again(ProviderLabel(v.ID), v.Secret); err != nil {
			return err
		}
		if err := tx.UpdateProvider(ctx, v); err != nil {
			return err
		}
	}
	return nil
}
