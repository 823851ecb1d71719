package gateway

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"sallyway/internal/identity"
	"sallyway/internal/policy"
	"sallyway/internal/telemetry"
	"sallyway/tunnel"
)

// resolveTimeout bounds looking up a destination's name.
const resolveTimeout = 5 * time.Second

// enforcer decides what may be reached: the snapshot's policies, and above them the gateway's own allow list. It holds no state of its own.
type enforcer struct {
	// snapshot is the newest good snapshot; the error says why there is none.
	snapshot func() (*policy.Snapshot, error)
	// stale reports whether new flows must be refused, and why.
	stale    func() (bool, error)
	allow    *AllowList
	resolver *net.Resolver
	// ranges are the organization's virtual range, which this host routes to other gateways; nil is none.
	ranges func() []netip.Prefix
	// keepGoing serves new flows also when the snapshot is past its time.
	keepGoing bool
}

// destination is where an allowed flow goes: the addresses to try, in order, and what the decision rested on.
type destination struct {
	addrs    []netip.Addr
	decision policy.Decision
}

// current returns the snapshot to decide by.
func (e *enforcer) current() (*policy.Snapshot, error) {
	s, err := e.snapshot()
	if err != nil {
		return nil, &tunnel.ProxyError{Type: tunnel.InternalError, Status: 503, Detail: "this gateway has no policies yet", Err: err}
	}
	if stale, why := e.stale(); stale && !e.keepGoing {
		return nil, &tunnel.ProxyError{
			Type: tunnel.RequestDenied, Rule: policy.DefaultDeny, Err: why,
			Detail: fmt.Sprintf("%v; new flows are refused until the gateway reaches its platform", why),
		}
	}
	return s, nil
}

// check decides about t for peer and finds its addresses. The policy is asked about the name, then, where it does not allow the name,
// about every address it resolves to; every address is held against the allow list.
func (e *enforcer) check(ctx context.Context, peer identity.Node, t policy.Target) (*destination, error) {
	s, err := e.current()
	if err != nil {
		return nil, err
	}
	t = real(s, t)
	if a, err := netip.ParseAddr(t.Host); err == nil {
		t.Addr = a.Unmap().WithZone("")
	}
	d := s.Evaluate(peer, t)
	if t.Addr.IsValid() {
		if !d.Allowed {
			return nil, tunnel.Denied(d.Rule, d.Reason)
		}
		if err := e.checkAddr(t.Addr, t.Port); err != nil {
			return nil, prohibited(err)
		}
		return &destination{[]netip.Addr{t.Addr}, d}, nil
	}
	if _, known := s.Peer(peer); !known {
		return nil, tunnel.Denied(d.Rule, d.Reason) // who may use nothing here does not get names resolved
	}
	if !d.Allowed && !mayResolveInto(s, peer) {
		return nil, tunnel.Denied(d.Rule, d.Reason)
	}
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	ctx, span := telemetry.Child(ctx, "resolve")
	found, err := e.resolver.LookupNetIP(ctx, "ip", t.Host)
	if err != nil {
		span.Fail(err.Error())
	}
	span.Int("sallyway.addresses", len(found))
	span.End()
	if err != nil {
		if !d.Allowed {
			return nil, tunnel.Denied(d.Rule, d.Reason)
		}
		pe := tunnel.AsProxyError(err)
		pe.Detail = fmt.Sprintf("%s: %s", t.Host, pe.Detail)
		return nil, pe
	}
	slices.SortStableFunc(found, func(a, b netip.Addr) int { return a.Unmap().BitLen() - b.Unmap().BitLen() })
	out := &destination{decision: d}
	var refused error
	for _, a := range found {
		at := t
		at.Addr = a.Unmap().WithZone("")
		byAddr := d
		if !d.Allowed {
			byAddr = s.Evaluate(peer, at)
		}
		if !byAddr.Allowed {
			continue
		}
		if err := e.checkAddr(at.Addr, at.Port); err != nil {
			refused = prohibited(err)
			continue
		}
		out.addrs, out.decision = append(out.addrs, at.Addr), byAddr
	}
	switch {
	case len(out.addrs) > 0:
		return out, nil
	case refused != nil:
		return nil, refused
	}
	return nil, tunnel.Denied(d.Rule, d.Reason)
}

// checkAddr holds an address against what no policy opens. An address of the virtual range that is none of this gateway's resources would
// leave by its TUN, and another gateway would take the peer for this one.
func (e *enforcer) checkAddr(a netip.Addr, port uint16) error {
	if e.ranges != nil {
		for _, r := range e.ranges() {
			if r.Contains(a) {
				return fmt.Errorf("%v is a virtual address that another gateway serves: go there directly", a)
			}
		}
	}
	return e.allow.Check(a, port)
}

// mayResolveInto reports whether an address could allow peer what a name did not: only then is a name worth a look-up.
func mayResolveInto(s *policy.Snapshot, peer identity.Node) bool {
	for i := range s.Resource {
		p, ok := s.Resource[i].Prefix()
		if !ok {
			continue
		}
		t := policy.Target{Proto: policy.DNS, Host: p.Addr().String(), Addr: p.Addr()}
		for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
			t.Proto = proto
			for _, r := range slices.Concat(s.Resource[i].TCP, s.Resource[i].UDP) {
				t.Port = r.First
				if s.Evaluate(peer, t).Allowed {
					return true
				}
			}
		}
	}
	return false
}

// real replaces a resource's virtual address by what it stands for.
func real(s *policy.Snapshot, t policy.Target) policy.Target {
	a, err := netip.ParseAddr(t.Host)
	if err != nil {
		return t
	}
	for i := range s.Resource {
		r := &s.Resource[i]
		if slices.Contains(r.Virtual, a.Unmap()) {
			t.Host, t.Addr = r.Address, netip.Addr{}
			return t
		}
	}
	return t
}

func prohibited(err error) error {
	return &tunnel.ProxyError{Type: tunnel.DestinationProhibited, Rule: "gateway allow list", Detail: err.Error()}
}
