package api

import (
	"context"
	"net/http"

	"sallyway/internal/control"
)

// licenceRoutes adds the routes of an organization's licence.
func (s *server) licenceRoutes() {
	const path = "/orgs/{org}/licence"
	route(s, "GET", path, "show-licence", "What an organization's licence allows, and how much of it there is", func(ctx context.Context, in *OrgPath) (*body[control.Licence], error) {
		return one(s.reg.Licence(ctx, in.Org))
	})
	route(s, "PUT", path, "install-licence", "Install a signed licence; an older one than was here does not come back", func(ctx context.Context, in *struct {
		OrgPath
		Body control.InstallLicence
	},
	) (*body[control.Licence], error) {
		return one(s.reg.InstallLicence(ctx, in.Org, in.Body))
	})
	route(s, "DELETE", path, "remove-licence", "Remove an organization's licence: nothing is limited then", func(ctx context.Context, in *OrgPath) (*struct{}, error) {
		return nil, s.reg.RemoveLicence(ctx, in.Org)
	}, status(http.StatusNoContent), marked("platform"))
}
