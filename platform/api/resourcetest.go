package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
	"sallyway/platform/dialler"
)

// testBody bounds the body of a request for a test, in bytes.
const testBody = 4 << 10

// testRoutes adds what the platform does as a client of gateways.
func (s *server) testRoutes() {
	route(s, "POST", "/orgs/{org}/resources/{name}/test", "test-resource", "Open a session to a resource from the platform, and say what each step took", func(ctx context.Context, in *struct {
		ObjectPath
		Body control.TestResource
	},
	) (*body[control.ResourceTest], error) {
		return one(s.cfg.Dialler.Test(ctx, in.Org, in.Name, in.Body, nil))
	}, status(http.StatusOK), func(o *huma.Operation) { o.MaxBodyBytes = testBody })
}

// Tester opens sessions to resources.
type Tester interface {
	Test(ctx context.Context, org, resource string, req control.TestResource, progress func(*control.ResourceTest)) (*control.ResourceTest, error)
}

var _ Tester = (*dialler.Dialler)(nil)
