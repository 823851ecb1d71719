package api

import (
	"context"
	"net/http"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/platform/store"
)

type NamePath struct {
	Name string `path:"name" doc:"name or id" maxLength:"63"`
}

type nodeList = body[control.List[control.NodeRecord]]

// verbs are what is POSTed to a node and answers its record.
func (s *server) verbs() map[string]func(context.Context, string, identity.Kind, string) (*control.NodeRecord, error) {
	return map[string]func(context.Context, string, identity.Kind, string) (*control.NodeRecord, error){
		"disable": s.reg.DisableNode, "enable": s.reg.EnableNode, "revoke": s.reg.RevokeNode, "drain": s.reg.DrainNode,
	}
}

func (s *server) nodeRoutes() {
	s.orgNodes(identity.Relay, "relays")
	s.orgNodes(identity.Gateway, "gateways")
	s.orgNodes(identity.Client, "clients")
	s.sharedRelays()
	route(s, "POST", "/orgs/{org}/relays/{name}/credential", "create-turn-credential", "TURN credential for standard software", func(ctx context.Context, in *struct {
		ObjectPath
		Body control.CreateTURNCredential
	},
	) (*body[control.TURNCredential], error) {
		return one(s.reg.TURNCredential(ctx, in.Org, in.Name, in.Body))
	}, status(http.StatusCreated))
}

// orgNodes adds the routes of a kind of node of organizations.
func (s *server) orgNodes(kind identity.Kind, plural string) {
	base, k := "/orgs/{org}/"+plural, string(kind)
	route(s, "GET", base, "list-"+plural, "List "+plural, func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*nodeList, error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.NodeRecord], error) {
			return s.reg.Nodes(ctx, in.Org, kind, p)
		})
	})
	route(s, "POST", base, "create-"+k, "Create a "+k+" and its enrolment token", func(ctx context.Context, in *struct {
		OrgPath
		Body control.CreateNode
	},
	) (*body[control.CreatedNode], error) {
		return one(s.reg.CreateNode(ctx, in.Org, kind, in.Body))
	}, status(http.StatusCreated))
	base += "/{name}"
	route(s, "GET", base, "show-"+k, "Show a "+k, func(ctx context.Context, in *ObjectPath) (*body[control.NodeRecord], error) {
		return one(s.reg.Node(ctx, in.Org, kind, in.Name))
	})
	route(s, "PATCH", base, "update-"+k, "Change a "+k, func(ctx context.Context, in *struct {
		ObjectPath
		Body control.UpdateNode
	},
	) (*body[control.NodeRecord], error) {
		return one(s.reg.UpdateNode(ctx, in.Org, kind, in.Name, in.Body))
	})
	route(s, "DELETE", base, "delete-"+k, "Delete a "+k+" and deny its keys", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.reg.DeleteNode(ctx, in.Org, kind, in.Name)
	}, status(http.StatusNoContent))
	route(s, "POST", base+"/token", "reissue-"+k+"-token", "New enrolment token of a "+k, func(ctx context.Context, in *ObjectPath) (*body[control.CreatedNode], error) {
		return one(s.reg.ReissueToken(ctx, in.Org, kind, in.Name))
	}, status(http.StatusCreated))
	for verb, do := range s.verbs() {
		route(s, "POST", base+"/"+verb, verb+"-"+k, verb+" a "+k, func(ctx context.Context, in *ObjectPath) (*body[control.NodeRecord], error) {
			return one(do(ctx, in.Org, kind, in.Name))
		}, status(http.StatusOK))
	}
}

// sharedRelays adds the routes of relays that organizations share: for tokens of the platform only.
func (s *server) sharedRelays() {
	const base, org, kind = "/shared/relays", identity.SharedOrg, identity.Relay
	route(s, "GET", base, "list-shared-relays", "List shared relays", func(ctx context.Context, in *struct{ PageQuery }) (*nodeList, error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.NodeRecord], error) { return s.reg.Nodes(ctx, org, kind, p) })
	})
	route(s, "POST", base, "create-shared-relay", "Create a relay that organizations share", func(ctx context.Context, in *struct{ Body control.CreateNode }) (*body[control.CreatedNode], error) {
		return one(s.reg.CreateNode(ctx, org, kind, in.Body))
	}, status(http.StatusCreated))
	const object = base + "/{name}"
	route(s, "GET", object, "show-shared-relay", "Show a shared relay", func(ctx context.Context, in *NamePath) (*body[control.NodeRecord], error) {
		return one(s.reg.Node(ctx, org, kind, in.Name))
	})
	route(s, "PATCH", object, "update-shared-relay", "Change a shared relay", func(ctx context.Context, in *struct {
		NamePath
		Body control.UpdateNode
	},
	) (*body[control.NodeRecord], error) {
		return one(s.reg.UpdateNode(ctx, org, kind, in.Name, in.Body))
	})
	route(s, "DELETE", object, "delete-shared-relay", "Delete a shared relay and deny its keys", func(ctx context.Context, in *NamePath) (*struct{}, error) {
		return nil, s.reg.DeleteNode(ctx, org, kind, in.Name)
	}, status(http.StatusNoContent))
	route(s, "POST", object+"/token", "reissue-shared-relay-token", "New enrolment token of a shared relay", func(ctx context.Context, in *NamePath) (*body[control.CreatedNode], error) {
		return one(s.reg.ReissueToken(ctx, org, kind, in.Name))
	}, status(http.StatusCreated))
	for verb, do := range s.verbs() {
		route(s, "POST", object+"/"+verb, verb+"-shared-relay", verb+" a shared relay", func(ctx context.Context, in *NamePath) (*body[control.NodeRecord], error) {
			return one(do(ctx, org, kind, in.Name))
		}, status(http.StatusOK))
	}
}
