package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/tally"
	"sallyway/internal/telemetry"
	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// connectTimeout bounds a TCP connect to a destination: longer than two SYN retransmissions, shorter than a client waits.
const connectTimeout = 15 * time.Second

// keepAlive is how often an idle TCP connection to a destination is probed.
const keepAlive = 30 * time.Second

// handler serves peers: it decides with the enforcer and dials with the host's kernel.
type handler struct {
	log     *slog.Logger
	tracer  *telemetry.Tracer // nil makes no spans
	enforce *enforcer
	names   *names
	pings   *pinger
	virtual func() []netip.Addr // of this gateway
	metrics *metrics
	flows   openFlows
	often   tally.Log // what is refused
	bench   bench
	dialer  net.Dialer
}

var _ tunnel.Handler = (*handler)(nil)

// Authorize accepts peers that the snapshot knows. The key's deny list was looked at in the handshake already.
func (h *handler) Authorize(_ context.Context, p tunnel.Peer) error {
	s, err := h.enforce.current()
	if err != nil {
		return err
	}
	if _, known := s.Peer(p.Node); !known {
		return h.refuse(p, policy.Target{}, tunnel.Denied(policy.DefaultDeny, fmt.Sprintf("%v may reach nothing at this gateway: allow it with a policy", p.Node)))
	}
	return nil
}

// DialTCP connects to where the peer may go.
func (h *handler) DialTCP(ctx context.Context, p tunnel.Peer, t policy.Target) (tunnel.Conn, error) {
	if trial.IsHost(t.Host) {
		return h.benchTCP(p, t)
	}
	c, err := h.dial(ctx, p, t, "tcp")
	if err != nil {
		return nil, err
	}
	return c.(*tcpFlow), nil
}

// DialUDP opens a connected socket to where the peer may go.
func (h *handler) DialUDP(ctx context.Context, p tunnel.Peer, t policy.Target) (net.Conn, error) {
	if trial.IsHost(t.Host) {
		return h.benchUDP(p, t)
	}
	return h.dial(ctx, p, t, "udp")
}

// reach tries the destination's addresses in order and returns the first connection, or the last error.
func (h *handler) reach(ctx context.Context, p tunnel.Peer, t policy.Target, network string) (net.Conn, error) {
	deciding, span := telemetry.Child(ctx, "policy")
	dest, err := h.enforce.check(deciding, p.Node, t)
	if dest != nil {
		span.String("sallyway.rule", dest.decision.Rule)
	}
	span.End()
	if err != nil {
		return nil, h.refuse(p, t, err)
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	d := h.dialer
	d.KeepAlive = keepAlive
	for i, a := range dest.addrs {
		actx, acancel := ctx, context.CancelFunc(func() {})
		if left := len(dest.addrs) - i; left > 1 {
			actx, acancel = context.WithTimeout(ctx, connectTimeout/time.Duration(left))
		}
		var c net.Conn
		_, span := telemetry.Child(actx, "dial")
		c, err = d.DialContext(actx, network, netip.AddrPortFrom(a, t.Port).String())
		acancel()
		if span.Recording() {
			span.String("network.peer.address", a.String())
			if err != nil {
				span.Fail(err.Error())
			}
		}
		span.End()
		if err == nil {
			h.metrics.flows.WithLabelValues(network, "ok").Inc()
			h.log.Debug("flow open", "peer", p.Node, "to", t, "rule", dest.decision.Rule)
			flow := h.flows.add(c, p, t, a, dest.decision)
			if tcp, ok := c.(*net.TCPConn); ok {
				return &tcpFlow{tcp, flow}, nil
			}
			return newUDPFlow(c.(*net.UDPConn), flow), nil
		}
	}
	return nil, h.refuse(p, t, err)
}

// refuse counts and logs what was not served and why, and returns it as it goes to the peer.
func (h *handler) refuse(p tunnel.Peer, t policy.Target, err error) error {
	pe := tunnel.AsProxyError(err)
	h.metrics.flows.WithLabelValues(protoLabel(t.Proto), string(pe.Type)).Inc()
	if errors.Is(err, context.Canceled) {
		return pe
	}
	h.often.Info(h.log, refusal{p.Node, t.Proto, pe.Type, pe.Rule}, "flow refused", "peer", p.Node, "to", t, "err", pe)
	return pe
}

// refusal is what lines about refused flows are counted by: a port scan or a ping is one line per tally.Interval and rule.
type refusal struct {
	peer  identity.Node
	proto policy.Proto
	typ   tunnel.ErrorType
	rule  string
}

func protoLabel(p policy.Proto) string {
	if p == "" {
		return "session"
	}
	return string(p)
}

// Resolve answers a DNS query from the gateway's network.
func (h *handler) Resolve(ctx context.Context, p tunnel.Peer, query []byte) ([]byte, error) {
	b, err := h.names.Resolve(ctx, p.Node, query)
	if err != nil {
		return nil, h.refuse(p, policy.Target{Proto: policy.DNS}, err)
	}
	h.metrics.flows.WithLabelValues("dns", "ok").Inc()
	return b, nil
}
