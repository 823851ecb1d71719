package api

import (
	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
)

// named writes the id of the request into the problem that answers it. Package incoming put it into the request's header.
func named(ctx huma.Context, _ string, v any) (any, error) {
	if p, ok := v.(*problem); ok {
		p.RequestID = ctx.Header(control.RequestIDHeader)
	}
	return v, nil
}
