package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
	"sallyway/platform/store"
)

// open has an operation take requests without credential.
func open(o *huma.Operation) {
	marked(public)(o)
	o.Security = nil
}

// serviceAccountRoutes adds the routes of service accounts and of API tokens.
func (s *server) serviceAccountRoutes() {
	accountsOf(s, "/orgs/{org}", "organization-")
	accountsOf(s, "", "")
	tokensOf(s, "/orgs/{org}", "organization-")
	tokensOf(s, "", "")
}

func accountsOf(s *server, prefix, id string) {
	at := orgOr(prefix)
	base := prefix + "/service-accounts"
	object := base + "/{name}"
	route(s, "GET", base, "list-"+id+"service-accounts", "List service accounts", func(ctx context.Context, in *struct{ PageQuery }) (*body[control.List[control.ServiceAccountRecord]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.ServiceAccountRecord], error) {
			return s.people.ServiceAccounts(ctx, here(ctx), p)
		})
	}, at)
	route(s, "POST", base, "create-"+id+"service-account", "Make a service account", func(ctx context.Context, in *struct {
		Body control.CreateServiceAccount
	},
	) (*body[control.ServiceAccountRecord], error) {
		return one(s.people.CreateServiceAccount(ctx, caller(ctx), here(ctx), in.Body))
	}, status(http.StatusCreated), at)
	route(s, "GET", object, "show-"+id+"service-account", "Show a service account", func(ctx context.Context, in *NamePath) (*body[control.ServiceAccountRecord], error) {
		return one(s.people.ServiceAccount(ctx, here(ctx), in.Name))
	}, at)
	route(s, "PATCH", object, "update-"+id+"service-account", "Change a service account", func(ctx context.Context, in *struct {
		NamePath
		Body control.UpdateServiceAccount
	},
	) (*body[control.ServiceAccountRecord], error) {
		return one(s.people.UpdateServiceAccount(ctx, caller(ctx), here(ctx), in.Name, in.Body))
	}, at)
	route(s, "DELETE", object, "delete-"+id+"service-account", "Delete a service account and its tokens", func(ctx context.Context, in *NamePath) (*struct{}, error) {
		return nil, s.people.DeleteServiceAccount(ctx, caller(ctx), here(ctx), in.Name)
	}, status(http.StatusNoContent), at)
	route(s, "GET", object+"/tokens", "list-"+id+"service-account-tokens", "List the tokens of a service account", func(ctx context.Context, in *NamePath) (*body[control.List[control.APIToken]], error) {
		return whole(s.people.AccountTokens(ctx, here(ctx), in.Name))
	}, at)
	route(s, "POST", object+"/tokens", "create-"+id+"service-account-token", "Make a token of a service account", func(ctx context.Context, in *struct {
		NamePath
		Body control.CreateAPIToken
	},
	) (*body[control.CreatedAPIToken], error) {
		return one(s.people.CreateAccountToken(ctx, caller(ctx), here(ctx), in.Name, in.Body))
	}, status(http.StatusCreated), at)
	route(s, "DELETE", object+"/tokens/{id}", "revoke-"+id+"service-account-token", "Revoke a token of a service account", func(ctx context.Context, in *struct {
		NamePath
		IDPath
	},
	) (*struct{}, error) {
		return nil, s.people.RevokeAccountToken(ctx, caller(ctx), here(ctx), in.Name, in.ID)
	}, status(http.StatusNoContent), at)
}

// tokensOf adds the routes of API tokens of their own: of an organization, or of the platform.
func tokensOf(s *server, prefix, id string) {
	at := orgOr(prefix)
	base := prefix + "/tokens"
	route(s, "GET", base, "list-"+id+"tokens", "List API tokens", func(ctx context.Context, _ *struct{}) (*body[control.List[control.APIToken]], error) {
		return whole(s.people.Tokens(ctx, here(ctx)))
	}, at)
	route(s, "POST", base, "create-"+id+"token", "Make an API token", func(ctx context.Context, in *struct {
		Body control.CreateAPIToken
	},
	) (*body[control.CreatedAPIToken], error) {
		return one(s.people.CreateToken(ctx, caller(ctx), here(ctx), in.Body))
	}, status(http.StatusCreated), at)
	route(s, "DELETE", base+"/{id}", "revoke-"+id+"token", "Revoke an API token", func(ctx context.Context, in *struct {
		IDPath
	},
	) (*struct{}, error) {
		return nil, s.people.RevokeToken(ctx, caller(ctx), here(ctx), in.ID)
	}, status(http.StatusNoContent), at)
}
