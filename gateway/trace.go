package gateway

import (
	"context"
	"net"

	"sallyway/internal/policy"
	"sallyway/internal/telemetry"
	"sallyway/tunnel"
)

// dial is reach with a span, below the one of the peer that asks where it sends one. It ends when the connection is there: what flows over it costs
// nothing more.
func (h *handler) dial(ctx context.Context, p tunnel.Peer, t policy.Target, network string) (net.Conn, error) {
	if h.tracer == nil {
		return h.reach(ctx, p, t, network)
	}
	ctx, span := h.tracer.Start(ctx, "serve "+network, telemetry.Server)
	defer span.End()
	if span.Recording() {
		span.String("sallyway.peer", p.Node.String())
		span.String("server.address", t.Host)
		span.Int("server.port", int(t.Port))
	}
	c, err := h.reach(ctx, p, t, network)
	if err != nil {
		pe := tunnel.AsProxyError(err)
		span.String("error.type", string(pe.Type))
		if pe.Rule != "" {
			span.String("sallyway.rule", pe.Rule)
		}
		span.Fail(pe.Error())
	}
	return c, err
}
