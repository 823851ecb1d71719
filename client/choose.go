package client

import (
	"cmp"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/tunnel"
)

// NoticeUnreached is the type of a gateway's notice whose data is an Unreached: all of it, every time it changes. A client asks for it with a
// notice of the same type without data.
const NoticeUnreached = "unreached"

// Unreached are resources that a gateway does not reach, by id: the name, and why not.
type Unreached map[string]string

// ranked orders a resource's gateways for one flow: by priority, and by weight at random among those of one priority, each place drawn from
// those that are left (RFC 2782).
func ranked(serving []control.ServingGateway) []control.ServingGateway {
	out := slices.Clone(serving)
	slices.SortStableFunc(out, func(a, b control.ServingGateway) int { return cmp.Compare(a.Priority, b.Priority) })
	for from := 0; from < len(out); {
		to, sum := from, 0
		for to < len(out) && out[to].Priority == out[from].Priority {
			sum += max(out[to].Weight, 0)
			to++
		}
		for i := from; i < to-1 && sum > 0; i++ {
			at := rand.N(sum)
			for j := i; j < to; j++ {
				w := max(out[j].Weight, 0)
				if at < w {
					sum -= w
					out[i], out[j] = out[j], out[i]
					break
				}
				at -= w
			}
		}
		from = to
	}
	return out
}

// fitFirst moves the gateways that should not be asked to the end, in their order: one that drains, that is not there, or that does not reach
// the resource. They are the last resort, since what is known of them may be old.
func (s *Sessions) fitFirst(route Route) []identity.Node {
	if len(route.Gateways) < 2 {
		return route.Gateways
	}
	resource := ""
	if route.Resource != nil {
		resource = route.Resource.ID
	}
	var fit, unfit []identity.Node
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range route.Gateways {
		if g := s.gateways[n]; g != nil && g.unfit(resource) {
			unfit = append(unfit, n)
		} else {
			fit = append(fit, n)
		}
	}
	return append(fit, unfit...)
}

// unfit reports whether another gateway should be asked first for a resource, "" for none.
func (g *gatewayLink) unfit(resource string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.current == nil {
		return g.lastErr != nil // tried and not reached
	}
	_, lost := g.unreached[resource]
	return lost || g.leaving
}

// tellsMore reports whether another gateway of the resource may do better after err: this one has no session, drains, or does not get
// there itself. What a destination or a policy said is final, except that a gateway's own allow list speaks for itself alone.
func tellsMore(err error) bool {
	if errors.Is(err, tunnel.ErrNoSession) || errors.Is(err, tunnel.ErrLimit) || errors.Is(err, tunnel.ErrUnreachable) {
		return true
	}
	if pe, ok := errors.AsType[*tunnel.ProxyError](err); ok {
		switch pe.Type {
		case tunnel.ConnectionTimeout, tunnel.DNSError, tunnel.DNSTimeout, tunnel.DestinationNotFound, tunnel.DestinationProhibited, tunnel.InternalError:
			return true
		}
	}
	return false
}

// notice takes a notice of the gateway on the session that was made with it.
func (g *gatewayLink) notice(n tunnel.Notice) {
	switch n.Type {
	case tunnel.NoticeDraining:
		g.log.Info("gateway is draining", "reason", n.Reason)
		g.mu.Lock()
		g.leaving = true
		g.mu.Unlock()
	case NoticeDirect:
		g.direct.answered(g.log, n)
	case NoticeUnreached:
		lost := Unreached{}
		if err := json.Unmarshal(n.Data, &lost); err != nil {
			g.log.Debug("notice not understood", "type", n.Type, "err", err)
			return
		}
		g.mu.Lock()
		g.unreached = lost
		g.mu.Unlock()
	}
}
