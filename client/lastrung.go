package client

import (
	"context"
	"errors"
	"slices"
	"sync"
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
	// deadPatience is how long all paths may be dead before the last rung is tried: legs over another transport, which are dialled as soon as a leg
	// doubts its relay, have a start that long. It may be the gateway's network that lets nothing through, and then they come to nothing.
	deadPatience = 200 * time.Millisecond
	// provePatience is how long a path that a session was moved to may take to answer while a link of the last rung is ready.
	provePatience = 250 * time.Millisecond
	// lastStagger is from the attempt at one relay's last rung to that at the next one's.
	lastStagger = 250 * time.Millisecond
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
	trying bool          // an attempt is under way, or its result waits
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
	return tunnel.LinkInfo{Name: ref.Name + " " + string(legs.LastTLS), Peer: peer, Rank: rankLast}
}

// lastDialled is what came of an attempt at the last rung.
type lastDialled struct {
	link *reverse.Link // nil if err is not
	info tunnel.LinkInfo
	err  error // legs.ErrNoLastRung where none was worth a try
}

// lastRelays are the relays whose last rung is worth a try.
func (g *gatewayLink) lastRelays() []control.RelayRef {
	return slices.DeleteFunc(slices.Clone(g.ref.Load().Relays), func(ref control.RelayRef) bool { return !g.lastDue(ref) })
}

// lastWanted are the relays whose last rung a session needs now; none while an attempt is under way. From a relay that drains a session
// goes to another one's, where it has no better path.
func (g *gatewayLink) lastWanted(p tunnel.PathInfo) []control.RelayRef {
	if g.last.trying || !(g.lost(p) || g.leaves(p)) {
		return nil
	}
	return slices.DeleteFunc(g.lastRelays(), func(ref control.RelayRef) bool { return g.leaves(p) && lastInfo(ref, g.node) == p.Active.Info })
}

// leaves reports whether a session should leave the last rung of a relay that drains.
func (g *gatewayLink) leaves(p tunnel.PathInfo) bool {
	l, last := p.Active.Link.(*reverse.Link)
	return last && closed(l.Draining())
}

// lost reports whether a session's active path is lost: it is gone, dead, or a leg that was moved to after that and has not answered either.
func (g *gatewayLink) lost(p tunnel.PathInfo) bool {
	_, last := p.Active.Link.(*reverse.Link)
	return isGone(p.Active) || (!last && p.Active.State != tunnel.Alive && !g.last.dead.IsZero())
}

// dropLast closes the link of an attempt that nobody waits for any more. It has ended.
func (g *gatewayLink) dropLast(last <-chan lastDialled) {
	g.last.trying = false
	select {
	case d := <-last:
		if d.link != nil {
			d.link.Close()
		}
	default:
	}
}

// untilLast is when the last rung is worth a try for dead paths, where that is to come.
func (g *gatewayLink) untilLast(p tunnel.PathInfo) (wait time.Duration, due bool) {
	if g.last.trying || g.last.dead.IsZero() || !g.lost(p) {
		return 0, false
	}
	wait = time.Until(g.last.dead.Add(deadPatience))
	return wait, wait > 0
}

// dialLast tries the last rung of the relays, each a while after the one before or when that has failed. The first link wins.
func (g *gatewayLink) dialLast(ctx context.Context, refs []control.RelayRef) lastDialled {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	results := make(chan lastDialled)
	begun, ended := 0, 0
	begin := func() {
		ref := refs[begun]
		begun++
		go func() {
			l, err := g.s.cfg.Legs.Last(ctx, ref.Node, g.node)
			results <- lastDialled{link: l, info: lastInfo(ref, g.node), err: err}
		}()
	}
	var won lastDialled
	var errs []error
	turn := time.NewTimer(0)
	defer turn.Stop()
	for ended < len(refs) && (won.link == nil || ended < begun) {
		select {
		case <-turn.C:
			if begun < len(refs) && won.link == nil {
				begin()
				turn.Reset(lastStagger)
			}
		case d := <-results:
			ended++
			switch {
			case d.link != nil && won.link == nil:
				won = d
				cancel() // the others give up
			case d.link != nil:
				d.link.Close()
			case !errors.Is(d.err, legs.ErrNoLastRung):
				errs = append(errs, d.err)
			}
			if d.link == nil {
				turn.Reset(0)
			}
		}
	}
	switch {
	case won.link != nil:
		return won
	case len(errs) == 0:
		return lastDialled{err: legs.ErrNoLastRung}
	}
	return lastDialled{err: errors.Join(errs...)}
}

// keepLast notes a link that a session uses.
func (g *gatewayLink) keepLast(l *reverse.Link) {
	g.last.links = append(g.last.links, &lastLink{Link: l})
	g.last.next, g.last.wait = time.Now().Add(climbAfter), climbAfter
}

// connectLast opens a session over the last rung. A leg that comes up meanwhile is better, and ends the attempt.
func (g *gatewayLink) connectLast(ctx context.Context) (*tunnel.Session, error) {
	refs := g.lastRelays()
	if len(refs) == 0 {
		return nil, legs.ErrNoLastRung
	}
	dctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	before := g.legsUp()
	watch.Go(func() {
		tick := time.NewTicker(legTick)
		defer tick.Stop()
		for {
			select {
			case <-dctx.Done():
				return
			case <-tick.C:
				if g.legsUp() > before {
					cancel()
				}
			}
		}
	})
	d := g.dialLast(dctx, refs)
	if d.err != nil {
		return nil, d.err
	}
	sctx, stop := context.WithTimeout(ctx, connectTimeout)
	defer stop()
	t, err := g.open(sctx, d.link, d.info)
	if err != nil {
		d.link.Close()
		return nil, err
	}
	g.keepLast(d.link)
	return t, nil
}

// legTick is how often an attempt at the last rung looks whether a leg is there by now.
const legTick = 50 * time.Millisecond

// legsUp counts the legs on the gateway's relays.
func (g *gatewayLink) legsUp() (n int) {
	for _, ref := range g.ref.Load().Relays {
		if l, _ := g.s.cfg.Legs.Current(ref.Node); l != nil {
			n++
		}
	}
	return n
}

// takeLast moves a session that still needs it to a link of the last rung. It sends d again later where the session has just found another path.
func (g *gatewayLink) takeLast(ctx context.Context, t *tunnel.Session, d lastDialled, again chan<- lastDialled, tasks *sync.WaitGroup) {
	g.last.trying = false
	if d.err != nil {
		if !errors.Is(d.err, legs.ErrNoLastRung) {
			g.log.Debug("no last rung", "err", d.err)
		}
		return
	}
	p := t.Path()
	switch {
	case g.lost(p) && !isGone(p.Active) && time.Since(p.LastMove) < provePatience:
		g.last.trying = true
		tasks.Go(func() {
			wait := time.NewTimer(time.Until(p.LastMove.Add(provePatience)))
			defer wait.Stop()
			select {
			case <-wait.C:
			case <-ctx.Done():
			}
			again <- d
		})
		return
	case g.lost(p):
	case g.leaves(p):
		g.leave(ctx, t, d)
		return
	default:
		d.link.Close()
		return
	}
	reason := "probes are not answered"
	if isGone(p.Active) {
		reason = lossReason(p.Active)
	}
	if err := t.Repoint(d.link, d.info, reason); err != nil {
		d.link.Close()
		return
	}
	g.keepLast(d.link)
	g.log.Info("path moved", "from", p.Active.Info.Name, "to", d.info.Name, "reason", reason)
}

// leave moves a session that works to a link of the last rung, once that has carried packets to the gateway and back.
func (g *gatewayLink) leave(ctx context.Context, t *tunnel.Session, d lastDialled) {
	const reason = "the relay is draining"
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	from := t.Path().Active.Info.Name
	err := t.Standby(ctx, d.link, d.info)
	if err == nil {
		err = t.Failover(reason)
	}
	if err != nil {
		g.log.Debug("no other path", "path", d.info.Name, "err", err)
		d.link.Close()
		return
	}
	g.keepLast(d.link)
	g.log.Info("path moved", "from", from, "to", d.info.Name, "reason", reason)
}

// leaveTimeout bounds the validation of a path; nothing else is done for the session meanwhile.
const leaveTimeout = 2 * time.Second

// noteDead keeps since when the active path is dead. Another one that was moved to since counts only when it answers.
func (g *gatewayLink) noteDead(p tunnel.PathInfo) {
	switch {
	case p.Active.State == tunnel.Alive:
		g.last.dead = time.Time{}
	case isGone(p.Active) && g.last.dead.IsZero():
		g.last.dead = time.Now()
	}
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
	const reason = "a better rung works again"
	p := t.Path()
	from, info := p.Active.Info.Name, linkInfo(l, ref.Name, g.node)
	// A standby is validated already, and a second path over its link would cost a connection ID, of which there are few.
	ch, ready := p.Standby.Link.(*leg.Channel)
	ready = ready && !closed(ch.Done()) && p.Standby.State == tunnel.Alive
	var err error
	if ready {
		info = p.Standby.Info
	} else {
		cctx, cancel := context.WithTimeout(ctx, connectTimeout)
		defer cancel()
		if ch, err = l.Connect(cctx, g.node); err == nil {
			err = t.Standby(cctx, ch, info)
		}
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
