package agent

import (
	"context"

	"sallyway/internal/control"
)

// ReportFlows tells the platform of flows. An error means that it may not know them: the same ones may be told again.
func (a *Agent) ReportFlows(ctx context.Context, b control.FlowBatch) error {
	return a.call(ctx, "/api/v1/node/flows", b, nil)
}
