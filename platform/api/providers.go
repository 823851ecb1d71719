package api

import (
	"context"
	"net/http"

	"sallyway/internal/control"
	"sallyway/platform/store"
)

// providerRoutes adds the routes of single sign-on: of an organization, or of the platform.
func (s *server) providerRoutes(prefix, id string) {
	base := prefix + "/providers"
	object := base + "/{name}"
	at := orgOr(prefix)
	route(s, "GET", base, "list-"+id+"providers", "List providers of single sign-on", func(ctx context.Context, in *struct{ PageQuery }) (*body[control.List[control.ProviderRecord]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.ProviderRecord], error) {
			return s.people.Providers(ctx, here(ctx), p)
		})
	}, at)
	route(s, "POST", base, "create-"+id+"provider", "Add single sign-on (OpenID Connect)", func(ctx context.Context, in *struct{ Body control.CreateProvider }) (*body[control.ProviderRecord], error) {
		return one(s.people.CreateProvider(ctx, caller(ctx), here(ctx), in.Body))
	}, status(http.StatusCreated), at)
	route(s, "GET", object, "show-"+id+"provider", "Show a provider of single sign-on", func(ctx context.Context, in *NamePath) (*body[control.ProviderRecord], error) {
		return one(s.people.Provider(ctx, here(ctx), in.Name))
	}, at)
	route(s, "PATCH", object, "update-"+id+"provider", "Change a provider of single sign-on", func(ctx context.Context, in *struct {
		NamePath
		Body control.UpdateProvider
	},
	) (*body[control.ProviderRecord], error) {
		return one(s.people.UpdateProvider(ctx, caller(ctx), here(ctx), in.Name, in.Body))
	}, at)
	route(s, "DELETE", object, "delete-"+id+"provider", "Remove single sign-on; the people stay", func(ctx context.Context, in *NamePath) (*struct{}, error) {
		return nil, s.people.DeleteProvider(ctx, caller(ctx), here(ctx), in.Name)
	}, status(http.StatusNoContent), at)
}
