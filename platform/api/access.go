package api

import (
	"context"
	"net/http"

	"sallyway/internal/control"
	"sallyway/platform/store"
)

// accessRoutes adds the routes of resources, policies and groups.
func (s *server) accessRoutes() {
	s.resourceRoutes()
	s.policyRoutes()
	s.groupRoutes()
}

func (s *server) resourceRoutes() {
	const base, object = "/orgs/{org}/resources", "/orgs/{org}/resources/{name}"
	route(s, "GET", base, "list-resources", "List resources", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.ResourceRecord]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.ResourceRecord], error) {
			return s.reg.Resources(ctx, in.Org, p)
		})
	})
	route(s, "POST", base, "create-resource", "Create a resource", func(ctx context.Context, in *struct {
		OrgPath
		Body control.CreateResource
	},
	) (*body[control.ResourceRecord], error) {
		return one(s.reg.CreateResource(ctx, in.Org, in.Body))
	}, status(http.StatusCreated))
	route(s, "GET", object, "show-resource", "Show a resource", func(ctx context.Context, in *ObjectPath) (*body[control.ResourceRecord], error) {
		return one(s.reg.Resource(ctx, in.Org, in.Name))
	})
	route(s, "PATCH", object, "update-resource", "Change a resource", func(ctx context.Context, in *struct {
		ObjectPath
		Body control.UpdateResource
	},
	) (*body[control.ResourceRecord], error) {
		return one(s.reg.UpdateResource(ctx, in.Org, in.Name, in.Body))
	})
	route(s, "DELETE", object, "delete-resource", "Delete a resource and the policies for it", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.reg.DeleteResource(ctx, in.Org, in.Name)
	}, status(http.StatusNoContent))
}

func (s *server) policyRoutes() {
	const base, object = "/orgs/{org}/policies", "/orgs/{org}/policies/{name}"
	route(s, "GET", base, "list-policies", "List policies", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.PolicyRecord]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.PolicyRecord], error) { return s.reg.Policies(ctx, in.Org, p) })
	})
	route(s, "POST", base, "create-policy", "Allow a subject a resource", func(ctx context.Context, in *struct {
		OrgPath
		Body control.CreatePolicy
	},
	) (*body[control.PolicyRecord], error) {
		return one(s.reg.CreatePolicy(ctx, in.Org, in.Body))
	}, status(http.StatusCreated))
	route(s, "GET", object, "show-policy", "Show a policy", func(ctx context.Context, in *ObjectPath) (*body[control.PolicyRecord], error) {
		return one(s.reg.Policy(ctx, in.Org, in.Name))
	})
	route(s, "PATCH", object, "update-policy", "Disable or enable a policy", func(ctx context.Context, in *struct {
		ObjectPath
		Body control.UpdatePolicy
	},
	) (*body[control.PolicyRecord], error) {
		return one(s.reg.UpdatePolicy(ctx, in.Org, in.Name, in.Body))
	})
	route(s, "DELETE", object, "delete-policy", "Delete a policy", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.reg.DeletePolicy(ctx, in.Org, in.Name)
	}, status(http.StatusNoContent))
	route(s, "POST", "/orgs/{org}/policies:explain", "explain", "Say whether a subject reaches a resource, and why", func(ctx context.Context, in *struct {
		OrgPath
		Body control.ExplainRequest
	},
	) (*body[control.Explanation], error) {
		return one(s.reg.Explain(ctx, in.Org, in.Body))
	}, status(http.StatusOK), marked(reads))
}

func (s *server) groupRoutes() {
	const base, object = "/orgs/{org}/groups", "/orgs/{org}/groups/{name}"
	route(s, "GET", base, "list-groups", "List groups", func(ctx context.Context, in *struct {
		OrgPath
		PageQuery
	},
	) (*body[control.List[control.GroupRecord]], error) {
		return paged(in.PageQuery, func(p store.Page) (*control.List[control.GroupRecord], error) { return s.reg.Groups(ctx, in.Org, p) })
	})
	route(s, "POST", base, "create-group", "Create a group of clients and gateways", func(ctx context.Context, in *struct {
		OrgPath
		Body control.CreateGroup
	},
	) (*body[control.GroupRecord], error) {
		return one(s.reg.PutGroup(ctx, in.Org, in.Body.Name, &in.Body.Members, true))
	}, status(http.StatusCreated))
	route(s, "GET", object, "show-group", "Show a group", func(ctx context.Context, in *ObjectPath) (*body[control.GroupRecord], error) {
		return one(s.reg.Group(ctx, in.Org, in.Name))
	})
	route(s, "PATCH", object, "update-group", "Replace the members of a group", func(ctx context.Context, in *struct {
		ObjectPath
		Body control.UpdateGroup
	},
	) (*body[control.GroupRecord], error) {
		return one(s.reg.PutGroup(ctx, in.Org, in.Name, in.Body.Members, false))
	})
	route(s, "DELETE", object, "delete-group", "Delete a group and the policies for it", func(ctx context.Context, in *ObjectPath) (*struct{}, error) {
		return nil, s.reg.DeleteGroup(ctx, in.Org, in.Name)
	}, status(http.StatusNoContent))
}
