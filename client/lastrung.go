package client

import (
	"context"
	"errors"
	"slices"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/identity"
	"sallyway/internal/legs"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
	"sallyway/tunnel"
)

// When sessions use the last rung, and leave it.
const (
	// deadPatience is how long a path may be dead whose leg is up before the last rung is tried: it is then the gateway's network that lets
	// nothing through.
	deadPatience = 2 * time.Second
	// absentMemory is how long a relay's word that it has no allocation of the gateway makes the last rung worth a try.
	absentMemory = 10 * time.Second
	// climbAfter is how long a better rung must have been there before a session is moved up to it. When it does not carry the session after
	// all, the next attempt is after twice as long, up to climbMost.
	climbAfter = 10 * time.Second
	climbMost  = time.Minute
	// lastEmptying is how long a link of the last rung is kept after a session left it: packets may still arrive.
	lastEmptying = 5 * time.Second
)

// lastRung is what a gatewayLink knows of the last rung. It belongs to the goroutine that runs the link, except for climbing, whose attempts
// are one after the other.
type lastRung struct {
	absent map[identity.Node]time.Time // relays that said that the gateway is not there
	dead   time.Time                   // since when no active path was alive; zero when the present one is not dead
	links  []*lastLink
	next   time.Time     // of the next climb
	wait   time.Duration // before the one after it
}

// lastLink is a link that the session uses or has used.
type lastLink struct {
	*reverse.Link
	unused time.Time // since when; zero while it is used
}

// noteAbsent remembers that a relay has no allocation of the gateway.
func (g *gatewayLink) noteAbsent(relay identity.Node, err error) {
	if e, ok := errors.AsType[*leg.Error](err); ok && e.Code == leg.CodeNotFound {
		if g.last.absent == nil {
			g.last.absent = map[identity.Node]time.Time{}
		}
		g.last.absent[relay] = time.Now()
	}
}

// lastDue reports whether the last rung of a relay is worth a try.
func (g *gatewayLink) lastDue(ref control.RelayRef) bool {
	return ref.TLSPort != 0 && (g.s.cfg.Legs.Missing(ref.Node) || time.Since(g.last.absent[ref.Node]) < absentMemory ||
		(!g.last.dead.IsZero() && time.Since(g.last.dead) > deadPatience))
}

func lastInfo(ref control.RelayRef, peer identity.Node) tunnel.LinkInfo {
	return tunnel.LinkInfo{Name: ref.Name + " " + string(legs.LastTLS), Peer: peer}
}

// overLast calls use with a link of the last rung of one relay after the other, until use takes one.
func (g *gatewayLink) overLast(ctx context.Context, use func(ctx context.Context, l *reverse.Link, info tunnel.LinkInfo) error) error {
	var errs []error
	for _, ref := range g.ref.Load().Relays {
		if !g.lastDue(ref) {
			continue
		}
		cctx, cancel := context.WithTimeout(ctx, connectTimeout)
		l, err := g.s.cfg.Legs.Last(cctx, ref.Node, g.node)
		if err == nil {
			if err = use(cctx, l, lastInfo(ref, g.node)); err != nil {
				l.Close()
			}
		}
		cancel()
		if err == nil {
			g.last.links = append(g.last.links, &lastLink{Link: l})
			g.last.next, g.last.wait = time.Now().Add(climbAfter), climbAfter
			return nil
		}
		if !errors.Is(err, legs.ErrNoLastRung) {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return legs.ErrNoLastRung
	}
	return errors.Join(errs...)
}

// rescueLast moves a session to the last rung and reports whether it did.
func (g *gatewayLink) rescueLast(ctx context.Context, t *tunnel.Session, from, reason string) bool {
	err := g.overLast(ctx, func(_ context.Context, l *reverse.Link, info tunnel.LinkInfo) error {
		if err := t.Repoint(l, info, reason); err != nil {
			return err
		}
		g.log.Info("path moved", "from", from, "to", info.Name, "reason", reason)
		return nil
	})
	if err != nil && !errors.Is(err, legs.ErrNoLastRung) {
		g.log.Debug("no last rung", "err", err)
	}
	return err == nil
}

// noteDead keeps since when the active path is dead. Another one that was moved to since counts only when it answers.
func (g *gatewayLink) noteDead(p tunnel.PathInfo) {
	switch {
	case p.Active.State == tunnel.Alive:
		g.last.dead = time.Time{}
	case p.Active.State == tunnel.Dead && g.last.dead.IsZero():
		g.last.dead = time.Now()
	}
}

// lastFirst reports whether the last rung is to be tried before the legs: these have been there all the while, and nothing came over them.
func (g *gatewayLink) lastFirst(p tunnel.PathInfo) bool {
	_, last := p.Active.Link.(*reverse.Link)
	return !last && !g.last.dead.IsZero() && time.Since(g.last.dead) > deadPatience
}

// sweepLast closes the links of the last rung that the session has left; all says every one.
func (g *gatewayLink) sweepLast(p tunnel.PathInfo, all bool) {
	g.last.links = slices.DeleteFunc(g.last.links, func(l *lastLink) bool {
		switch {
		case all || (!l.unused.IsZero() && time.Since(l.unused) > lastEmptying):
			l.Close()
			return true
		case p.Active.Link == l.Link || p.Standby.Link == l.Link:
			l.unused = time.Time{}
		case l.unused.IsZero():
			l.unused = time.Now()
		}
		return false
	})
}

// better finds a relay's leg that has been up for a while, for a session whose active path is on the last rung.
func (g *gatewayLink) better(p tunnel.PathInfo) (ref control.RelayRef, l *leg.Leg) {
	if _, last := p.Active.Link.(*reverse.Link); !last || time.Now().Before(g.last.next) {
		return ref, nil
	}
	for _, ref := range g.ref.Load().Relays {
		if g.s.cfg.Legs.UpFor(ref.Node) < climbAfter {
			continue
		}
		if l, _ := g.s.cfg.Legs.Current(ref.Node); l != nil && !closed(l.Draining()) {
			return ref, l
		}
	}
	return ref, nil
}

// climb moves a session from the last rung to a leg, once that has carried packets to the gateway and back. It reports whether it did.
func (g *gatewayLink) climb(ctx context.Context, t *tunnel.Session, ref control.RelayRef, l *leg.Leg) bool {
	from, info := t.Path().Active.Info.Name, linkInfo(l, ref.Name, g.node)
	reason := "a better rung works again"
	cctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	ch, err := l.Connect(cctx, g.node)
	if err == nil {
		err = t.Standby(cctx, ch, info)
	}
	if err == nil {
		err = t.Failover(reason)
	}
	if err != nil {
		g.log.Debug("no better path", "path", info.Name, "err", err)
		return false
	}
	g.log.Info("path moved", "from", from, "to", info.Name, "reason", reason)
	return true
}
