package api

import (
	"context"

	"sallyway/internal/control"
)

// placesRoutes add what tells why a gateway has its relays.
func (s *server) placesRoutes() {
	route(s, "GET", "/orgs/{org}/gateways/{name}/relays", "explain-gateway-relays", "Why a gateway has its relays, and not the others", func(ctx context.Context, in *ObjectPath) (*body[control.RelayChoices], error) {
		return one(s.reg.ExplainRelays(ctx, in.Org, in.Name))
	})
}
