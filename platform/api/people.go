package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
	"sallyway/platform/people"
	"sallyway/platform/store"
)

type IDPath struct {
	ID string `path:"id" doc:"id" maxLength:"63"`
}

type LoginPath struct {
	Name string `path:"name" doc:"login or id" maxLength:"254"`
}

// here is the organization of a request's path, or the platform where the path names none.
func here(ctx context.Context) string {
	if org, ok := ctx.Value(orgKey{}).(string); ok && org != "" {
		return org
	}
	return people.Platform
}

// orgOr has operations that exist for an organization and for the platform say which: with a prefix the path has the organization in it.
func orgOr(prefix string) option {
	return func(o *huma.Operation) {
		if prefix == "" {
			return
		}
		most := 63
		o.Parameters = append(o.Parameters, &huma.Param{
			Name: "org", In: "path", Required: true, Description: "name of the organization", Schema: &huma.Schema{Type: huma.TypeString, MaxLength: &most},
		})
	}
}

// peopleRoutes adds the routes of people and of who calls.
func (s *server) peopleRoutes() {
	s.meRoutes()
	s.myRoutes()
	peopleOf(s, "/orgs/{org}", "organization-")
	peopleOf(s, "", "")
	s.providerRoutes("/orgs/{org}", "organization-")
	s.providerRoutes("", "")
	s.loginRoutes()
}

func (s *server) meRoutes() {
	route(s, "GET", "/me", "me", "Who calls", func(ctx context.Context, _ *struct{}) (*body[control.Me], error) {
		return one(s.people.Me(ctx, caller(ctx)))
	}, marked(own))
	route(s, "PATCH", "/me", "update-me", "Change one's own name and address", func(ctx context.Context, in *struct{ Body control.UpdateMe }) (*body[control.Me], error) {
		return one(s.people.UpdateMe(ctx, caller(ctx), in.Body))
	}, marked(own))
	route(s, "GET", "/me/sessions", "list-my-sessions", "One's own sessions of browsers", func(ctx context.Context, _ *struct{}) (*body[control.List[control.WebSession]], error) {
		return whole(s.people.Sessions(ctx, caller(ctx)))
	}, marked(own))
	route(s, "DELETE", "/me/sessions/{id}", "end-my-session", "End one of one's own sessions", func(ctx context.Context, in *IDPath) (*struct{}, error) {
		return nil, s.people.EndSession(ctx, caller(ctx), in.ID)
	}, status(http.StatusNoContent), marked(own))
	route(s, "GET", "/me/tokens", "list-my-tokens", "One's own API tokens", func(ctx context.Context, _ *struct{}) (*body[control.List[control.APIToken]], error) {
		return whole(s.people.MyTokens(ctx, caller(ctx)))
	}, marked(own))
	route(s, "POST", "/me/tokens", "create-my-token", "Make an API token of one's own", func(ctx context.Context, in *struct{ Body control.CreateAPIToken }) (*body[control.CreatedAPIToken], error) {
		return one(s.people.CreateMyToken(ctx, caller(ctx), in.Body))
	}, status(http.StatusCreated), marked(own))
	route(s, "DELETE", "/me/tokens/{id}", "revoke-my-token", "Revoke an API token of one's own", func(ctx context.Context, in *IDPath) (*struct{}, error) {
		return nil, s.people.RevokeMyToken(ctx, caller(ctx), in.ID)
	}, status(http.StatusNoContent), marked(own))
	route(s, "POST", "/me/logout", "forget-token", "Revoke the token of the login that asks", func(ctx context.Context, _ *struct{}) (*struct{}, error) {
		return nil, s.people.ForgetToken(ctx, caller(ctx))
	}, status(http.StatusNoContent), marked(own))
}

// whole is a list in one page.
func whole[T any](items []T, err error) (*body[control.List[T]], error) {
	if err != nil {
		return nil, err
	}
	return &body[control.List[T]]{control.List[T]{Items: items}}, nil
}

// myRoutes adds what persons do for themselves in an organization.
func (s *server) myRoutes() {
	const base = "/orgs/{org}/my"
	route(s, "GET", base+"/clients", "list-my-clients", "One's own clients", func(ctx context.Context, in *OrgPath) (*nodeList, error) {
		return whole(s.people.MyClients(ctx, caller(ctx), in.Org))
	}, marked(mine))
	route(s, "POST", base+"/clients", "create-my-client", "Make a client of one's own and its enrolment token", func(ctx context.Context, in *struct {
		OrgPath
		Body control.CreateNode
	},
	) (*body[control.CreatedNode], error) {
		return one(s.people.CreateMyClient(ctx, caller(ctx), in.Org, in.Body))
	}, status(http.StatusCreated), marked(mine))
	route(s, "POST", base+"/clients/{name}/token", "reissue-my-client-token", "New enrolment token of a client of one's own", func(ctx context.Context, in *ObjectPath) (*body[control.CreatedNode], error) {
		return one(s.people.ReissueMyClient(ctx, caller(ctx), in.Org, in.Name))
	}, status(http.StatusCreated), marked(mine))
	route(s, "DELETE", base+"/clients/{name}", "delete-my-client", "Delete a client of one's own and deny its keys", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.people.DeleteMyClient(ctx, caller(ctx), in.Org, in.Name)
	}, status(http.StatusNoContent), marked(mine))
	route(s, "GET", base+"/resources", "list-my-resources", "What one's own clients reach", func(ctx context.Context, in *OrgPath) (*body[control.List[control.MyResource]], error) {
		return whole(s.people.MyResources(ctx, caller(ctx), in.Org))
	}, marked(mine))
}

// peopleOf adds the routes of the people of an organization, or of the platform.
func peopleOf(s *server, prefix, id string) {
	at := orgOr(prefix)
	base := prefix + "/people"
	object := base + "/{name}"
	route(s, "GET", base, "list-"+id+"people", "List people", func(ctx context.Context, in *struct{ PageQuery }) (*body[control.List[control.PersonRecord]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.PersonRecord], error) {
			return s.people.People(ctx, here(ctx), p)
		})
	}, at)
	route(s, "POST", base, "create-"+id+"person", "Make a person, or give one a role", func(ctx context.Context, in *struct {
		Body control.CreatePerson
	},
	) (*body[control.InvitedPerson], error) {
		return one(s.people.CreatePerson(ctx, caller(ctx), here(ctx), in.Body))
	}, status(http.StatusCreated), at)
	route(s, "GET", object, "show-"+id+"person", "Show a person", func(ctx context.Context, in *LoginPath) (*body[control.PersonRecord], error) {
		return one(s.people.Person(ctx, here(ctx), in.Name))
	}, at)
	route(s, "PATCH", object, "update-"+id+"person", "Change a person, or their role", func(ctx context.Context, in *struct {
		LoginPath
		Body control.UpdatePerson
	},
	) (*body[control.PersonRecord], error) {
		return one(s.people.UpdatePerson(ctx, caller(ctx), here(ctx), in.Name, in.Body))
	}, at)
	route(s, "DELETE", object, "delete-"+id+"person", "Take a person their role, or delete one who is at home there", func(ctx context.Context, in *LoginPath) (*struct{}, error) {
		return nil, s.people.DeletePerson(ctx, caller(ctx), here(ctx), in.Name)
	}, status(http.StatusNoContent), at)
	route(s, "POST", object+"/invite", "invite-"+id+"person", "Make a link with which a person chooses a new password", func(ctx context.Context, in *LoginPath) (*body[control.Invitation], error) {
		return one(s.people.Invite(ctx, caller(ctx), here(ctx), in.Name))
	}, status(http.StatusCreated), at)
	route(s, "POST", object+"/forget-factor", "forget-"+id+"factor", "Take a person the second factor", func(ctx context.Context, in *LoginPath) (*body[control.PersonRecord], error) {
		return one(s.people.ForgetFactor(ctx, caller(ctx), here(ctx), in.Name))
	}, status(http.StatusOK), at)
}

// loginRoutes adds the login of programs. They have no credential yet.
func (s *server) loginRoutes() {
	route(s, "POST", "/auth/device", "start-device-login", "Begin the login of a program with a code (RFC 8628)", func(ctx context.Context, in *struct{ Body control.StartDevice }) (*body[control.DeviceStarted], error) {
		return one(s.people.StartDevice(ctx, in.Body, callerSource(ctx)))
	}, status(http.StatusOK), open)
	route(s, "POST", "/auth/token", "take-login-token", "Take the token of a login that was approved", func(ctx context.Context, in *struct{ Body control.TakeToken }) (*body[control.TokenTaken], error) {
		return one(s.people.Take(ctx, in.Body, callerSource(ctx)))
	}, status(http.StatusOK), open)
}
