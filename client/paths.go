package client

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/datagram"
	"sallyway/internal/identity"
	"sallyway/relay/leg"
	"sallyway/relay/reverse"
	"sallyway/tunnel"
)

// How a session's paths are kept.
const (
	// searchTimeout bounds a request for a channel while a session has no path. From one on a leg to the next is searchSoon for as long as the
	// other end may be about to dial another leg, then searchInterval, and searchLonger after searchLong. A relay answers five a second, and two
	// hundred beyond.
	searchTimeout  = 3 * time.Second
	searchSoon     = 100 * time.Millisecond
	searchBriefly  = 2 * time.Second
	searchInterval = 250 * time.Millisecond
	searchLong     = 20 * time.Second
	searchLonger   = time.Second
	// leaveAlone is how long a link that did not answer is not gone back to while there may be others.
	leaveAlone = time.Second
	// suspectInterval is how often legs under dead paths are asked to check their relays.
	suspectInterval = 2 * time.Second
	// flowMemory is how long before the loss of all paths bytes of flows may have moved that are taken to wait since.
	flowMemory = 3 * time.Second
	// followAfter is how long a relay's new leg must have been up before a session that works over its former one is moved to it. When that does not
	// carry the session the next attempt is after twice as long, up to followMost.
	followAfter = time.Second
	followMost  = 30 * time.Second
	// standbyInterval is from one attempt at a standby path to the next.
	standbyInterval = 2 * time.Second
)

// search is what is done for a session without a path. It belongs to the goroutine that runs the link.
type search struct {
	found     chan foundPath
	trying    map[*leg.Leg]bool
	next      map[*leg.Leg]time.Time
	left      map[datagram.Link]time.Time // links that did not answer, and when they were left
	suspected time.Time                   // when legs were last asked to check their relays

	moved   uint64    // bytes of flows, as last seen
	movedAt time.Time // when they were last seen to change

	follow time.Time     // when to follow a leg next
	wait   time.Duration // before the time after that
}

// foundPath is what came of a request for a channel.
type foundPath struct {
	ref control.RelayRef
	l   *leg.Leg
	ch  *leg.Channel
	err error
}

func (s *search) begin() {
	*s = search{
		found: make(chan foundPath), trying: map[*leg.Leg]bool{}, next: map[*leg.Leg]time.Time{}, left: map[datagram.Link]time.Time{}, wait: followAfter,
	}
}

// maintain keeps a session's paths up until the session is over or ctx ends.
func (g *gatewayLink) maintain(ctx context.Context, t *tunnel.Session, who string) {
	tick := time.NewTicker(adjustInterval)
	defer tick.Stop()
	g.search.begin()
	last := make(chan lastDialled, 1)
	defer g.dropLast(last)
	var tasks sync.WaitGroup
	defer tasks.Wait()
	sctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var busy atomic.Bool
	var nextStandby time.Time
	var moves tunnel.PathInfo
	for {
		p := t.Path()
		g.s.noteMoves(p, &moves)
		var standbyDone <-chan struct{}
		if p.Standby.Link != nil && !closed(p.Standby.Link.Done()) {
			standbyDone = p.Standby.Link.Done()
		}
		activeDone := p.Active.Link.Done()
		if closed(activeDone) {
			activeDone = nil
		}
		var look <-chan time.Time
		if wait := g.lookAgain(p); wait > 0 {
			look = time.After(wait)
		}
		select {
		case <-t.Done():
			return
		case <-ctx.Done():
			_ = t.Close("the node stops")
			return
		case <-g.wake:
			g.s.cfg.Legs.Want(who, g.ref.Load().Relays)
		case <-g.events:
		case <-activeDone:
		case <-standbyDone:
		case <-tick.C:
		case <-look:
		case f := <-g.search.found:
			g.takeFound(t, f)
		case d := <-last:
			g.takeLast(sctx, t, d, last, &tasks)
		}
		g.noteDead(t.Path())
		g.noteFlows(t)
		if refs := g.lastWanted(t.Path()); len(refs) > 0 {
			g.last.trying = true
			tasks.Go(func() { last <- g.dialLast(sctx, refs) })
		}
		g.rescue(sctx, t, &tasks)
		g.sweepLast(t.Path(), false)
		g.stepDirect(sctx, t, &tasks, &busy)
		if ref, l := g.better(t.Path()); l != nil && busy.CompareAndSwap(false, true) {
			g.last.next = time.Now().Add(g.last.wait)
			g.last.wait = min(2*g.last.wait, climbMost)
			tasks.Go(func() {
				defer busy.Store(false)
				g.climb(sctx, t, ref, l)
			})
		}
		if ref, l, reason := g.newLeg(t.Path()); l != nil && busy.CompareAndSwap(false, true) {
			g.search.follow = time.Now().Add(g.search.wait)
			g.search.wait = min(2*g.search.wait, followMost)
			tasks.Go(func() {
				defer busy.Store(false)
				g.followLeg(sctx, t, ref, l, reason)
			})
		}
		if (!g.single || isDirect(t.Path().Active)) && g.standbyMissing(t) && time.Now().After(nextStandby) && busy.CompareAndSwap(false, true) {
			nextStandby = time.Now().Add(standbyInterval)
			tasks.Go(func() {
				defer busy.Store(false)
				g.addStandby(sctx, t)
			})
		}
	}
}

// lookAgain is after how long a session's paths are to be looked at without an event, where that is sooner than always; else 0.
func (g *gatewayLink) lookAgain(p tunnel.PathInfo) time.Duration {
	var wait time.Duration
	if !g.last.dead.IsZero() && time.Since(g.last.dead) < searchBriefly && (isGone(p.Active) || g.unproved(p)) {
		wait = searchSoon
	}
	if last, due := g.untilLast(p); due && (wait == 0 || last < wait) {
		wait = last
	}
	return wait
}

// noteFlows keeps when bytes of flows last moved, and has lost legs dialled soon while flows wait for them.
func (g *gatewayLink) noteFlows(t *tunnel.Session) {
	s, now := &g.search, time.Now()
	st := t.Stats()
	if n := st.FlowSent + st.FlowReceived; n != s.moved {
		s.moved, s.movedAt = n, now
	}
	if dead := g.last.dead; !dead.IsZero() && (g.waiters.Load() > 0 || (!s.movedAt.IsZero() && s.movedAt.Add(flowMemory).After(dead))) {
		g.awaitLegs()
	}
}

// awaitLegs says that traffic waits for the legs on the gateway's relays.
func (g *gatewayLink) awaitLegs() {
	refs := g.ref.Load().Relays
	nodes := make([]identity.Node, len(refs))
	for i, ref := range refs {
		nodes[i] = ref.Node
	}
	g.s.cfg.Legs.Waiting(nodes...)
}

// isGone reports whether nothing comes over a path any more.
func isGone(p tunnel.PathStatus) bool { return closed(p.Link.Done()) || p.State == tunnel.Dead }

// rescue moves a session off an active path that is gone, dead or draining: to the standby, else to whatever relay is up.
func (g *gatewayLink) rescue(ctx context.Context, t *tunnel.Session, tasks *sync.WaitGroup) {
	p := t.Path()
	lost := isGone(p.Active)
	if !lost && g.unproved(p) {
		g.lookAround(ctx, tasks)
		return
	}
	if !lost && !closed(drainingOf(p.Active)) {
		clear(g.search.left)
		return
	}
	if lost {
		g.suspect(p)
	}
	if p.Standby.Link != nil && !isGone(p.Standby) && !closed(drainingOf(p.Standby)) {
		reason := lossReason(p.Active)
		if err := t.Failover(reason); err == nil {
			g.log.Info("path moved", "from", p.Active.Info.Name, "to", p.Standby.Info.Name, "reason", reason)
			return
		}
	}
	if lost {
		g.lookAround(ctx, tasks)
	}
}

// unproved reports whether a session was moved from a dead path to one that has not answered either, so far. Until it does another one may: the
// relay may have led to a leg of the gateway's that is not there any more, before it knew of the next.
func (g *gatewayLink) unproved(p tunnel.PathInfo) bool {
	_, ok := p.Active.Link.(*leg.Channel)
	return ok && !isGone(p.Active) && p.Active.State != tunnel.Alive && !g.last.dead.IsZero()
}

func lossReason(p tunnel.PathStatus) string {
	switch {
	case closed(p.Link.Done()) && isDirect(p):
		return "the direct path ended"
	case closed(p.Link.Done()):
		return "the leg on the relay is gone"
	case p.State != tunnel.Dead && closed(drainingOf(p)):
		return "the relay is draining"
	}
	return "probes are not answered"
}

// suspect has the legs under dead paths check their relays now instead of at the next keepalive, all of them where no path is left: whoever
// blocks one relay's leg blocks the other's. Beside one that gets no answer another one is dialled, by another transport.
func (g *gatewayLink) suspect(p tunnel.PathInfo) {
	if p.Standby.Link != nil && !isGone(p.Standby) {
		if ch, ok := p.Active.Link.(*leg.Channel); ok {
			ch.Leg().Suspect()
		}
		return
	}
	if time.Since(g.search.suspected) < suspectInterval {
		return
	}
	g.search.suspected = time.Now()
	for _, ref := range g.ref.Load().Relays {
		g.s.cfg.Legs.Suspect(ref.Node)
	}
}

// lookAround asks every relay for a channel to the gateway.
func (g *gatewayLink) lookAround(ctx context.Context, tasks *sync.WaitGroup) {
	s, now := &g.search, time.Now()
	every := searchInterval
	switch lost := now.Sub(g.last.dead); {
	case lost < searchBriefly:
		every = searchSoon
	case lost > searchLong:
		every = searchLonger
	}
	maps.DeleteFunc(s.next, func(_ *leg.Leg, at time.Time) bool { return now.After(at) })
	for _, ref := range g.ref.Load().Relays {
		l, _ := g.s.cfg.Legs.Current(ref.Node)
		if l == nil || s.trying[l] || !s.next[l].IsZero() {
			continue
		}
		s.trying[l], s.next[l] = true, now.Add(every)
		tasks.Go(func() {
			cctx, cancel := context.WithTimeout(ctx, searchTimeout)
			defer cancel()
			ch, err := l.Connect(cctx, g.node)
			select {
			case s.found <- foundPath{ref, l, ch, err}:
			case <-ctx.Done():
			}
		})
	}
}

// takeFound moves a session that still has no path to a channel.
func (g *gatewayLink) takeFound(t *tunnel.Session, f foundPath) {
	s := &g.search
	delete(s.trying, f.l)
	g.noteAbsent(f.ref.Node, f.err)
	p := t.Path()
	if f.err != nil || f.ch == p.Active.Link || time.Since(s.left[f.ch]) < leaveAlone {
		return
	}
	if !isGone(p.Active) {
		if !g.unproved(p) || (p.Active.Link.(*leg.Channel).Leg().Relay() != f.ref.Node && time.Since(p.LastMove) < provePatience) {
			return
		}
	}
	reason, info := lossReason(p.Active), linkInfo(f.l, f.ref.Name, g.node)
	if err := t.Repoint(f.ch, info, reason); err != nil {
		return
	}
	s.left[p.Active.Link] = time.Now()
	g.log.Info("path moved", "from", p.Active.Info.Name, "to", info.Name, "reason", reason)
}

// drainingOf is closed when a path's relay is being drained; nil where there is none.
func drainingOf(p tunnel.PathStatus) <-chan struct{} {
	switch l := p.Link.(type) {
	case *reverse.Link:
		return l.Draining()
	case *leg.Channel:
		return l.Leg().Draining()
	}
	return nil
}

// newLeg finds the leg that took the place of the one under a session's active path, at this end or, as the gateway said, at the other.
func (g *gatewayLink) newLeg(p tunnel.PathInfo) (ref control.RelayRef, l *leg.Leg, reason string) {
	ch, ok := p.Active.Link.(*leg.Channel)
	if !ok || isGone(p.Active) || time.Now().Before(g.search.follow) {
		return ref, nil, ""
	}
	for _, ref := range g.ref.Load().Relays {
		if ref.Node != ch.Leg().Relay() {
			continue
		}
		l, _ := g.s.cfg.Legs.Current(ref.Node)
		switch {
		case l == nil || closed(l.Draining()):
		case l != ch.Leg() && g.s.cfg.Legs.UpFor(ref.Node) >= followAfter:
			return ref, l, reasonNewLeg
		case l == ch.Leg() && g.heedsNewLeg(ref.Node):
			return ref, l, reasonPeerLeg
		}
	}
	g.search.wait = followAfter
	return ref, nil, ""
}

// Reasons of moves to legs that took the place of others.
const (
	reasonNewLeg  = "the relay has another leg"
	reasonPeerLeg = "the gateway has another leg on the relay"
)

// heedsNewLeg reports whether the gateway spoke of a leg on a relay that was not looked for yet, a while ago: this end may be about to have
// another one there, too, and QUIC at the gateway takes few new paths at a time.
func (g *gatewayLink) heedsNewLeg(relay identity.Node) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	said := g.newLegs[relay]
	return !said.IsZero() && time.Since(said) >= followAfter
}

// sawNewLeg notes that the newest leg of the gateway's on a relay is known.
func (g *gatewayLink) sawNewLeg(relay identity.Node) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.newLegs, relay)
}

// followLeg moves a session that works to a channel between the newest legs on the same relay, once that has carried packets to the gateway and
// back.
func (g *gatewayLink) followLeg(ctx context.Context, t *tunnel.Session, ref control.RelayRef, l *leg.Leg, reason string) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	from, info := t.Path().Active, linkInfo(l, ref.Name, g.node)
	g.sawNewLeg(ref.Node) // what it says from now on is news again
	ch, err := l.Connect(ctx, g.node)
	if err == nil && ch == from.Link {
		return
	}
	if err == nil {
		err = t.Standby(ctx, ch, info)
	}
	if err == nil {
		err = t.Failover(reason)
	}
	if err != nil {
		g.log.Debug("leg not followed", "path", info.Name, "err", err)
		return
	}
	g.log.Info("path moved", "from", from.Info.Name, "to", info.Name, "reason", reason)
}

// standbyMissing reports whether a session should have another standby than it has.
func (g *gatewayLink) standbyMissing(t *tunnel.Session) bool {
	p := t.Path()
	if len(g.ref.Load().Relays) < 2 && !isDirect(p.Active) {
		return false
	}
	if p.Standby.Link == nil || isGone(p.Standby) {
		return true
	}
	ch, ok := p.Standby.Link.(*leg.Channel)
	if !ok {
		return false
	}
	relay := ch.Leg().Relay()
	l, _ := g.s.cfg.Legs.Current(relay)
	return l != nil && (l != ch.Leg() && g.s.cfg.Legs.UpFor(relay) >= followAfter || g.heedsNewLeg(relay))
}

// addStandby validates a path over another relay than the active one's.
func (g *gatewayLink) addStandby(ctx context.Context, t *tunnel.Session) {
	p := t.Path()
	for _, ref := range g.ref.Load().Relays {
		l, _ := g.s.cfg.Legs.Current(ref.Node)
		if l == nil || closed(l.Draining()) {
			continue
		}
		if ch, ok := p.Active.Link.(*leg.Channel); ok && ch.Leg().Relay() == ref.Node {
			continue
		}
		info := linkInfo(l, ref.Name, g.node)
		g.sawNewLeg(ref.Node)
		cctx, cancel := context.WithTimeout(ctx, connectTimeout)
		ch, err := l.Connect(cctx, g.node)
		if err == nil && ch == p.Standby.Link && !isGone(p.Standby) { // it is the newest
			cancel()
			return
		}
		if err == nil {
			err = t.Standby(cctx, ch, info)
		}
		cancel()
		if err == nil {
			g.log.Info("standby path ready", "path", info.Name)
			return
		}
		g.log.Debug("no standby path", "path", info.Name, "err", err)
	}
}

// Ranks of rungs: a session that has a better one as its standby goes there when that has been good for a while. Direct paths, which are tried with
// measures of their own, rank as UDP.
const (
	rankTLS  = 1
	rankLast = 2
)

func linkInfo(l *leg.Leg, name string, peer identity.Node) tunnel.LinkInfo {
	info := tunnel.LinkInfo{Name: name + " " + string(l.Transport()), Peer: peer}
	if l.Transport() != leg.UDP {
		info.Rank = rankTLS
	}
	return info
}
