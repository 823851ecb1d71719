package people

import (
	"net/http"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Kind is the kind of a principal.
type Kind string

// The kinds.
const (
	KindToken   Kind = "token" // an API token of its own, as platformd admin token makes
	KindPerson  Kind = "person"
	KindAccount Kind = "service-account"
)

// Grant is what a principal may do in one organization, or with Org Platform in all.
type Grant struct {
	Org    string
	Role   Role // empty for tokens and service accounts
	Scopes Scopes
}

// Principal is who calls. It is not changed after it was made.
type Principal struct {
	Kind    Kind
	ID      string // of person or service account; of the token for a token of its own
	Name    string // login, or name
	Display string // a person's full name, may be empty
	Actor   string // as the audit calls it
	Grants  []Grant
	// Session is the browser's session, nil for tokens. Token is the id of the access token, empty for sessions.
	Session *Session
	Token   string

	narrow Scopes // of the token; nil narrows nothing
}

// Describe names the principal for people.
func (p *Principal) Describe() string { return string(p.Kind) + " " + p.Name }

// Sees says whether an organization exists for the principal.
func (p *Principal) Sees(org string) bool {
	return slices.ContainsFunc(p.Grants, func(g Grant) bool { return g.Org == Platform || g.Org == org })
}

// Organizations are the names that the principal sees; all says that it is every organization.
func (p *Principal) Organizations() (names []string, all bool) {
	for _, g := range p.Grants {
		if g.Org == Platform {
			return nil, true
		}
		names = append(names, g.Org)
	}
	return names, false
}

// May says whether the principal may do verb to object in org; org is Platform for what concerns no organization.
func (p *Principal) May(org, object, verb string) bool {
	if p.narrow != nil && !p.narrow.May(object, verb) {
		return false
	}
	return slices.ContainsFunc(p.Grants, func(g Grant) bool { return (g.Org == Platform || g.Org == org) && g.Scopes.May(object, verb) })
}

// RoleIn is the role of a person in org, the platform's where that is more; empty for none.
func (p *Principal) RoleIn(org string) Role {
	best := len(Roles)
	for _, g := range p.Grants {
		if i := slices.Index(Roles, g.Role); i >= 0 && (g.Org == org || g.Org == Platform) {
			best = min(best, i)
		}
	}
	if best == len(Roles) {
		return ""
	}
	return Roles[best]
}

// Require refuses what May denies. An organization that the principal does not see is not found.
func (p *Principal) Require(org, object, verb string) error {
	if org != Platform && !p.Sees(org) {
		names, _ := p.Organizations()
		return registry.Refuse(http.StatusNotFound, control.CodeNotFound, "you see "+list(names)+": use --org", "there is no organization %.80q", org)
	}
	if !p.May(org, object, verb) {
		if org == Platform && !p.Sees(Platform) {
			return forbidden("use a credential of the platform: platformd admin token", "%s of an organization may not do this", p.Describe())
		}
		return refuseScope(p, org, object, verb)
	}
	return nil
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// scopesIn is what the principal may hand out in org.
func (p *Principal) contains(org string, want Scopes) bool {
	if p.narrow != nil && !p.narrow.Contains(want) {
		return false
	}
	return slices.ContainsFunc(p.Grants, func(g Grant) bool { return (g.Org == Platform || g.Org == org) && g.Scopes.Contains(want) })
}

// person refuses principals that are no person.
func (p *Principal) person() error {
	if p.Kind != KindPerson {
		return forbidden("log in as a person: sallyway login --url URL", "this is for persons, and %s is none", p.Describe())
	}
	return nil
}

func personActor(login string) string { return "person:" + login }

func accountActor(a *store.ServiceAccount) string {
	if a.Org == Platform {
		return "service-account:" + a.Name
	}
	return "service-account:" + a.Org + "/" + a.Name
}
