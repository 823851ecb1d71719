package registry

import (
	"context"
	"maps"

	"sallyway/platform/incoming"
)

// withRequest adds the id of the request that an entry of the audit is of, where there is one.
func withRequest(ctx context.Context, detail map[string]any) map[string]any {
	id := incoming.ID(ctx)
	if id == "" {
		return detail
	}
	out := maps.Clone(detail)
	if out == nil {
		out = make(map[string]any, 1)
	}
	out["request_id"] = id
	return out
}
