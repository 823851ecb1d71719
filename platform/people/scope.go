package people

import (
	"net/http"
	"regexp"
	"slices"
	"strings"

	"sallyway/internal/control"
	"sallyway/platform/registry"
)

// Verbs of scopes.
const (
	Read  = "read"
	Write = "write"
)

// Role is what a person is in an organization.
type Role string

// The roles.
const (
	Owner   Role = "owner"   // everything, people and single sign-on included
	Admin   Role = "admin"   // everything but people and single sign-on
	Auditor Role = "auditor" // reads everything, the audit included
	Member  Role = "member"  // own client nodes, and what they reach
)

// Roles are all roles, the most powerful first.
var Roles = []Role{Owner, Admin, Auditor, Member}

// Scope is OBJECT:VERB, such as relays:read. Either may be a star, "*" alone is everything. A scope with a minus before it takes away.
// Objects are the words of the API's paths: organizations, relays, gateways, clients, resources, policies, groups, sessions, audit,
// status, people, providers, service-accounts, tokens, and what joins them.
type Scope string

// Scopes are a set: what one of them grants and none takes away.
type Scopes []Scope

// Self is the object of what a person does for themselves.
const Self = "self"

var roleScopes = map[Role]Scopes{
	Owner:   {"*"},
	Admin:   {"*", "-people:write", "-providers:write"},
	Auditor: {"*:read", "self:*"},
	Member:  {"self:*"},
}

// Scopes of a role; none for one that does not exist.
func (r Role) Scopes() Scopes { return roleScopes[r] }

// Valid says whether there is such a role.
func (r Role) Valid() bool { return roleScopes[r] != nil }

func (s Scope) split() (object, verb string) {
	object, verb, ok := strings.Cut(strings.TrimPrefix(string(s), "-"), ":")
	if !ok {
		verb = "*" // "*" alone
	}
	return object, verb
}

func (s Scope) covers(object, verb string) bool {
	o, v := s.split()
	return (o == "*" || o == object) && (v == "*" || v == verb)
}

// May says whether the set allows verb on object.
func (ss Scopes) May(object, verb string) bool {
	granted := false
	for _, s := range ss {
		if !s.covers(object, verb) {
			continue
		}
		if s[0] == '-' {
			return false
		}
		granted = true
	}
	return granted
}

// Contains says whether everything that other allows is allowed by ss: whether a holder of ss may hand it out.
func (ss Scopes) Contains(other Scopes) bool {
	for _, s := range other {
		if s[0] == '-' {
			continue
		}
		o, v := s.split()
		for _, have := range ss {
			if have[0] != '-' {
				continue
			}
			// What ss takes away must not be in s, unless other takes it away, too.
			ho, hv := have.split()
			if (o == "*" || ho == "*" || o == ho) && (v == "*" || hv == "*" || v == hv) && !slices.Contains(other, have) {
				return false
			}
		}
		if !slices.ContainsFunc(ss, func(have Scope) bool {
			ho, hv := have.split()
			return have[0] != '-' && (ho == "*" || ho == o) && (hv == "*" || hv == v)
		}) {
			return false
		}
	}
	return true
}

var scopeForm = regexp.MustCompile(`^(\*|(\*|[a-z][a-z-]{0,40}):(\*|read|write))$`)

// maxScopes bounds a token's scopes.
const maxScopes = 64

// ParseScopes checks what somebody asked for. The words of the old API tokens, admin and read-only, mean * and *:read.
func ParseScopes(words []string) (Scopes, error) {
	if len(words) > maxScopes {
		return nil, registry.Invalid("body.scopes", "use *:read, OBJECT:* or *", "%d scopes, limit %d", len(words), maxScopes)
	}
	var out Scopes
	for _, w := range words {
		w = strings.TrimSpace(w)
		switch w {
		case "admin":
			w = "*"
		case "read-only":
			w = "*:read"
		}
		if !scopeForm.MatchString(w) {
			return nil, registry.Invalid("body.scopes", "OBJECT:VERB with the verb read, write or *, such as relays:read, gateways:write, audit:read, *:read, *",
				"%.60q is no scope", w)
		}
		if !slices.Contains(out, Scope(w)) {
			out = append(out, Scope(w))
		}
	}
	return out, nil
}

// Words are the scopes as texts.
func (ss Scopes) Words() []string {
	out := make([]string, len(ss))
	for i, s := range ss {
		out[i] = string(s)
	}
	return out
}

func scopesOf(words []string) Scopes {
	out := make(Scopes, 0, len(words))
	for _, w := range words {
		if w != "" {
			out = append(out, Scope(w))
		}
	}
	return out
}

// CodeReadOnly says that a principal that may only read tried to change something.
const CodeReadOnly = "read_only_token"

// CodeScope says that neither role nor scopes cover the request.
const CodeScope = "scope_missing"

// refuseScope words what a principal lacks.
func refuseScope(p *Principal, org, object, verb string) *registry.Error {
	if verb == Write && p.May(org, object, Read) {
		return registry.Refuse(http.StatusForbidden, CodeReadOnly, "use a credential with the scope "+object+":write, or ask an owner of the organization",
			"%s may only read %s", p.Describe(), object)
	}
	return registry.Refuse(http.StatusForbidden, control.CodeForbidden, "use a credential with the scope "+object+":"+verb+", or ask an owner of the organization",
		"%s has no right to %s %s", p.Describe(), verb, object)
}
