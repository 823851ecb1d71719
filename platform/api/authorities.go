package api

import (
	"context"
	"net/http"

	"sallyway/internal/control"
	"sallyway/internal/identity"
)

type authorityList = body[control.List[control.AuthorityRecord]]

func authorities(items []control.AuthorityRecord, err error) (*authorityList, error) {
	return one(&control.List[control.AuthorityRecord]{Items: items}, err)
}

// authorityRoutes adds the routes of CAs and their rotation.
func (s *server) authorityRoutes() {
	const base = "/orgs/{org}/authorities"
	route(s, "GET", base, "list-authorities", "List the CAs of an organization", func(ctx context.Context, in *OrgPath) (*authorityList, error) {
		return authorities(s.reg.Authorities(ctx, in.Org))
	})
	route(s, "POST", base+":rotate", "rotate-authority", "Have a CA followed by a new one, in steps; or only say what would happen", func(ctx context.Context, in *struct {
		OrgPath
		Body control.RotateAuthority
	},
	) (*body[control.RotationPlan], error) {
		return one(s.reg.Rotate(ctx, in.Org, in.Body))
	}, status(http.StatusOK))
	route(s, "POST", base+":sign", "sign-authorities", "Hand over the certificates that the owner of an offline root signed", func(ctx context.Context, in *struct {
		OrgPath
		Body control.SignedAuthorities
	},
	) (*authorityList, error) {
		return authorities(s.reg.SignAuthorities(ctx, in.Org, in.Body))
	}, status(http.StatusOK))

	const shared = "/shared/authorities"
	route(s, "GET", shared, "list-shared-authorities", "List the CAs of relays that organizations share", func(ctx context.Context, _ *struct{}) (*authorityList, error) {
		return authorities(s.reg.Authorities(ctx, identity.SharedOrg))
	})
	route(s, "POST", shared+":rotate", "rotate-shared-authority", "Have a CA of shared relays followed by a new one", func(ctx context.Context, in *struct{ Body control.RotateAuthority }) (*body[control.RotationPlan], error) {
		return one(s.reg.Rotate(ctx, identity.SharedOrg, in.Body))
	}, status(http.StatusOK))
}
