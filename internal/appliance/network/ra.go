package network

import "context"

// router6 hears the routers of one NIC.
type router6 struct{ nic *nic }

func (r *router6) run(ctx context.Context) {}
