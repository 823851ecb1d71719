package client

import (
	"cmp"
	"encoding/json"
	"errors"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
	"sallyway/tunnel"
)

// NoticeUnreached is the type of a gateway's notice whose data is an Unreached: all of it, every time it changes. A client asks for it with a
// notice of the same type without data.
const NoticeUnreached = "unreached"

// NoticeLeg is the type of a gateway's notice whose data is a relay, as identity.Node: its leg there is another one than before, and will not be
// reached by the former one for long.
const NoticeLeg = "leg"

// mostNewLegs bounds the relays that a gateway may speak of at once.
const mostNewLegs = 16

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

// steady orders the gateways of a route as ranked does, by a draw that is always the same for one destination: what belongs together, the
// packets of a ping, goes one way without anybody keeping note of it (weighted rendezvous hashing).
func steady(seed maphash.Seed, route Route, dst netip.Addr) Route {
	if route.Resource == nil || len(route.Gateways) < 2 {
		return route
	}
	serving := slices.DeleteFunc(slices.Clone(route.Resource.Gateways), func(g control.ServingGateway) bool { return !slices.Contains(route.Gateways, g.Node) })
	score := func(g control.ServingGateway) float64 { // the least is first: exponential, its mean one in weight
		if g.Weight <= 0 {
			return math.Inf(1)
		}
		h := maphash.Comparable(seed, struct {
			dst  netip.Addr
			node identity.Node
		}{dst, g.Node})
		return -math.Log((float64(h>>11)+1)/(1<<53)) / float64(g.Weight)
	}
	slices.SortStableFunc(serving, func(a, b control.ServingGateway) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(score(a), score(b)))
	})
	route.Gateways = make([]identity.Node, len(serving))
	for i, g := range serving {
		route.Gateways[i] = g.Node
	}
	return route
}

// fitness is how soon a gateway is asked for a resource; less is sooner.
type fitness int

const (
	fit  fitness = iota
	weak         // it drains, or does not reach the resource
	gone         // there is no session, or nothing comes from it
)

// fitFirst moves the gateways that should not be asked to the end, in their order: those that drain or do not reach the resource, then those
// that are not there or do not answer. They are the last resort, since what is known of them may be old.
func (s *Sessions) fitFirst(route Route) []identity.Node {
	if len(route.Gateways) < 2 {
		return route.Gateways
	}
	resource := ""
	if route.Resource != nil {
		resource = route.Resource.ID
	}
	var by [gone + 1][]identity.Node
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range route.Gateways {
		f := fit
		if g := s.gateways[n]; g != nil {
			f = g.fitness(resource)
		}
		by[f] = append(by[f], n)
	}
	return slices.Concat(by[:]...)
}

// fitness says how well the gateway is known to serve a resource, "" for none.
func (g *gatewayLink) fitness(resource string) fitness {
	g.mu.Lock()
	_, lost := g.unreached[resource]
	t, err, silent, leaving := g.current, g.lastErr, g.silent, g.leaving
	g.mu.Unlock()
	switch {
	case t == nil && err != nil: // tried and not reached
		return gone
	case t == nil:
		return fit
	// Whether the gateway is gone or the way to it shows later: a session outlives the loss of every path for minutes.
	case silent && t.Path().Active.State != tunnel.Alive:
		return gone
	case lost || leaving:
		return weak
	}
	return fit
}

// pathEvent takes note of a change of a path's state. After a dead one the gateway is silent until one answers that the session moved to.
func (g *gatewayLink) pathEvent(e tunnel.PathEvent) {
	if e.Role == tunnel.RoleActive && (e.State == tunnel.Dead || e.State == tunnel.Alive) {
		g.mu.Lock()
		g.silent = e.State == tunnel.Dead
		g.mu.Unlock()
	}
	if ch, ok := e.Link.(*leg.Channel); ok && e.Role == tunnel.RoleActive && e.State == tunnel.Dead {
		ch.Leg().Suspect() // the session may have left it before anybody looks
	}
	poke(g.events)
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
	case NoticeLeg:
		var relay identity.Node
		if err := json.Unmarshal(n.Data, &relay); err != nil {
			g.log.Debug("notice not understood", "type", n.Type, "err", err)
			return
		}
		g.mu.Lock()
		if g.newLegs == nil {
			g.newLegs = map[identity.Node]time.Time{}
		}
		if len(g.newLegs) < mostNewLegs {
			g.newLegs[relay] = time.Now()
		}
		g.mu.Unlock()
		poke(g.wake)
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
