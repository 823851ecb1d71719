package tunnel

import (
	"context"
	"encoding/json"
	"net"
	"time"
)

// QUIC at the gateway follows a peer to another path only if it has an unused connection ID for it. The peer replaces those whose retirement
// it hears of, and that is sent on the path that is active. So after a few moves in a row, each faster than that exchange, or when all the
// paths that were validated die at once, there is none, and the path that could bring new ones is dead: the session would idle out while its
// packets arrive.
//
// A rescue ends that from below, where packets of a session come over one link and none over the link of its active address. The link that
// works is shown under the address of one that does not, of which QUIC has heard beside the active one: that path has a connection ID
// already, so QUIC moves there and begins with new timers. QUIC may have validated the address when it stood for the other link; that the
// one that stands for it now leads to the peer has been shown by probes under the session's keys.
//
// And what QUIC writes to the active address leaves over the link that works. That helps where QUIC has forgotten those paths or there never was
// one: whatever path packets come on, QUIC takes acknowledgements and connection IDs out of them, and then it validates the new path and moves as
// always. It begins only when QUIC writes, which after a long silence may be seconds away.

const (
	// rescueEvery is how often links are looked at.
	rescueEvery = 100 * time.Millisecond
	// rescueAfter and three round trips is how long the link of the active address must have been silent while packets came over another, mostRescueAfter
	// at most. A move that works takes a round trip, and a move to a validated path none; where it takes longer a rescue does no harm.
	rescueAfter     = 300 * time.Millisecond
	mostRescueAfter = time.Second
	// rescueRecent is how long ago a packet may have come over a link that is looked at: what a peer sends into silence comes ever more seldom.
	rescueRecent = 2 * time.Second
	// rescueAgain is after how long a session that still sends to an address that was lent is shown the link under a new one. QUIC forgets one of
	// the paths that hold its connection IDs for the sake of a new path when nothing came on it for 5 s.
	rescueAgain = 6 * time.Second
	// crowdedEvery is how often a client may have the link of its active path shown under a new address for the sake of its standby.
	crowdedEvery = 5 * time.Second
	// rescueProof is how old the last probe under the session's keys on the link that works may be: of an idle session one comes every 15 s.
	rescueProof = idleInterval + 5*time.Second
)

const (
	// knockSoon is how long a client waits for QUIC's answer after a move before it sends all again, the first knocksSoon times, and knockEvery is
	// how long from then on. QUIC's own timer is backed off by what came before the move.
	knockSoon  = 200 * time.Millisecond
	knocksSoon = 10
	knockEvery = 700 * time.Millisecond
	// mostKnocks bounds them by move: 20 s of a path that is alive.
	mostKnocks = 36
)

// knock sends again what is under way when the gateway has not said that it followed the last move, though the active path answers probes: it shows
// the gateway that the session is in need of a rescue, asks for an answer after it, and does not wait for QUIC's own timer. It returns when it wants
// to be called again.
func (s *Session) knock(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.unansweredLocked() {
		return idleInterval
	}
	rtt := s.conn.ConnectionStats().SmoothedRTT
	every := max(knockEvery, min(4*rtt, 2*time.Second)) // packets come: the answer may be on its way behind others
	if s.silentLocked() {
		if every = knockEvery; s.knocks < knocksSoon {
			every = max(knockSoon, min(2*rtt, knockEvery))
		}
	}
	if wait := every - min(now.Sub(s.lastMove), now.Sub(s.knocked)); wait > 0 {
		return wait
	}
	if s.takeOverLocked(true) {
		s.knocks++
		s.knocked = now
		s.cfg.Logger.Debug("the gateway does not follow", "gateway", s.cfg.Gateway, "path", s.slots[s.active].to.Load().info.Name)
		s.tellMoveLocked("the gateway does not follow")
	}
	return every
}

// unproven reports whether the session has moved a moment ago, or no packet has come over any link since and it has not given up on one. Then its
// paths are probed as if flows moved, which may wait to: the other end may have closed the leg that answered first.
func (s *Session) unproven() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	since := time.Since(s.lastMove)
	return s.moves > 0 && since < provenAfter || s.unansweredLocked() && since < mostKnocks*knockEvery
}

// provenAfter is how long paths are probed often after a move.
const provenAfter = 3 * time.Second

func (s *Session) unansweredLocked() bool {
	if s.err != nil || s.moves == 0 || s.knocks >= mostKnocks {
		return false
	}
	if s.answers {
		return s.followed < s.moves
	}
	return s.silentLocked()
}

// silentLocked reports whether no packet has come over any link since the last move.
func (s *Session) silentLocked() bool {
	for _, sl := range s.slots {
		if time.Duration(sl.src.last.Load()) > s.lastMove.Sub(epoch) {
			return false
		}
	}
	return true
}

// tellMoveLocked tells the gateway how often the session has moved.
func (s *Session) tellMoveLocked(reason string) {
	if err := s.ctrl.send(Notice{Type: noticePath, Reason: reason, Data: move{s.moves}.encode()}); err != nil {
		s.cfg.Logger.Warn("path message not sent", "gateway", s.cfg.Gateway, "err", err)
	}
}

// heardOfMove takes the gateway's answer to that.
func (s *Session) heardOfMove(n Notice) {
	var m move
	if json.Unmarshal(n.Data, &m) != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.followed = max(s.followed, min(m.Moves, s.moves))
}

// stuck is what is known of a session whose packets come over another link than that of its active address.
type stuck struct {
	over  *port         // the link they come over
	since time.Duration // none came over the other one since then; 0: it is not so
}

// heard returns when the last QUIC packet came over the link.
func (p *port) heard() time.Duration {
	return time.Duration(max(p.main.last.Load(), p.alias.last.Load()))
}

// ended reports whether the link is done. With the Merged's adding held, one that is not has its addresses.
func (p *port) ended() bool {
	select {
	case <-p.link.Done():
		return true
	default:
		return false
	}
}

// heardSince returns the links that QUIC packets came over since then.
func (m *Merged) heardSince(then time.Duration) []*port {
	m.adding.Lock()
	defer m.adding.Unlock()
	var out []*port
	for p := range m.links {
		if p.heard() >= then {
			out = append(out, p)
		}
	}
	return out
}

// prove notes that a probe of the session came over the link.
func (p *port) prove(sess *peerSession) {
	if p.responder.Load() != sess {
		p.responder.Store(sess)
	}
	p.proved.Store(int64(sinceEpoch()))
}

// lent is an address whose packets leave over another link than its own.
type lent struct {
	own *port // nil: it was gone before
	at  time.Duration
}

// watchRescues looks for sessions to rescue until ctx ends.
func (s *Server) watchRescues(ctx context.Context) {
	ticker := time.NewTicker(rescueEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s.rescue(sinceEpoch())
	}
}

// rescue looks at the sessions whose packets came over another link than that of their active address.
func (s *Server) rescue(now time.Duration) {
	latest := make(map[*peerSession]*port)
	for _, p := range s.merged.heardSince(now - rescueRecent) {
		sess := p.responder.Load()
		if sess == nil || sess.ctx.Err() != nil || p.info.Peer.IsZero() || p.info.Peer != sess.peer.Node ||
			now-time.Duration(p.proved.Load()) > rescueProof {
			continue
		}
		if other := latest[sess]; other == nil || other.heard() < p.heard() {
			latest[sess] = p
		}
		if a, ok := sess.conn.RemoteAddr().(*net.UDPAddr); ok {
			sess.known.at(virtualID(a), now)
			sess.known.note(p)
		}
	}
	for sess, p := range latest {
		if s.judge(sess, p, now) {
			sess.rescued.Add(1)
			s.cfg.Logger.Info("session rescued: its QUIC could not follow the peer", "peer", sess.peer.Node, "session", sess.peer.Session,
				"path", p.info.Name)
		}
	}
	s.merged.reclaim(s.behind)
}

// judge rescues sess if it is to be, whose last packets came over p, and reports whether it did.
func (s *Server) judge(sess *peerSession, p *port, now time.Duration) bool {
	a, ok := sess.conn.RemoteAddr().(*net.UDPAddr)
	if !ok {
		return false
	}
	active, heard := s.merged.port(a), time.Duration(0)
	if active != nil {
		heard = active.heard()
	}
	if active == p {
		sess.stuck = stuck{}
		since, is := s.merged.lentSince(a)
		switch {
		case !is:
			sess.stoodIn = 0
		case now-since >= time.Duration(sess.stoodIn)*standInEvery:
			s.standIn(sess, p, heard, now)
		}
		if s.merged.lentFor(a, rescueAgain, now) {
			s.relabel(p)
		}
		return false
	}
	if !sess.stuck.due(p, p.heard(), heard, now, min(rescueAfter+3*sess.conn.ConnectionStats().SmoothedRTT, mostRescueAfter)) || !s.merged.lend(a, p, now) {
		return false
	}
	s.standIn(sess, p, heard, now)
	// What QUIC sends now has its peer acknowledge, and QUIC find that all before was lost.
	if ctrl := sess.ctrl.Load(); ctrl != nil {
		_ = ctrl.send(Notice{Type: noticePath, Reason: "rescued"}) // a full queue is as good
	}
	return true
}

// standIn shows p's link under the next address for whose path QUIC may have a connection ID, if there is one. It was the active address's turn
// until silent.
func (s *Server) standIn(sess *peerSession, p *port, silent, now time.Duration) {
	id := sess.known.best(p, silent, now)
	if id == 0 || sess.stoodIn >= mostStandIns {
		return
	}
	sess.stoodIn++
	sess.known.forget(id)
	if !s.behind(id) { // else another session of the peer's is there
		s.merged.standIn(p, id)
	}
}

// mostStandIns bounds how many addresses are tried in a rescue, standInEvery is from one to the next.
const (
	mostStandIns = 3
	standInEvery = 500 * time.Millisecond
)

// known are the addresses that QUIC may have paths for beside the active one: those from which packets of a session came since it moved last.
// It forgets all others when it moves, and the one that was silent for longest when there are too many.
type known struct {
	active uint64
	moved  time.Duration // to the active one, as far as was seen
	heard  map[uint64]sighting
}

// sighting is when packets came from an address for the first time, as far as was seen, and for the last time.
type sighting struct{ first, last time.Duration }

// note takes down when packets came from the addresses of a link.
func (k *known) note(p *port) {
	for _, s := range []*source{&p.main, &p.alias} {
		id, at := virtualID(s.addr.Load()), time.Duration(s.last.Load())
		if at == 0 || at <= k.moved || id == k.active {
			continue
		}
		if k.heard == nil {
			k.heard = make(map[uint64]sighting)
		}
		seen, ok := k.heard[id]
		if !ok {
			seen.first = at
		}
		seen.last = at
		k.heard[id] = seen
		if len(k.heard) > mostKnown {
			oldest := id
			for id, seen := range k.heard {
				if seen.last < k.heard[oldest].last {
					oldest = id
				}
			}
			delete(k.heard, oldest)
		}
	}
}

// mostKnown bounds known: QUIC has three paths beside the active one, one of which may be that of the link that works.
const mostKnown = 4

// at takes down which address is active.
func (k *known) at(active uint64, now time.Duration) {
	switch k.active {
	case active:
	case 0: // the session is new to us
		k.active = active
	default:
		*k = known{active: active, moved: now}
	}
}

// best is the address, of those whose packets come no more, for whose path QUIC is likeliest to have a connection ID: one that was there before
// the active path fell silent, at silent, and of these the one that was heard last; 0 is none.
func (k *known) best(working *port, silent, now time.Duration) uint64 {
	best, found := uint64(0), sighting{}
	for id, seen := range k.heard {
		if id == virtualID(working.main.addr.Load()) || id == virtualID(working.alias.addr.Load()) || now-seen.last < rescueAfter {
			continue
		}
		before, than := seen.first <= silent, found.first <= silent
		if best == 0 || before && !than || before == than && seen.last > found.last {
			best, found = id, seen
		}
	}
	return best
}

func (k *known) forget(id uint64) { delete(k.heard, id) }

// standIn shows p's link under address id from now on, which was another link's. That one, if it is still there, gets a new one. It reports whether
// it did.
func (m *Merged) standIn(p *port, id uint64) bool {
	m.adding.Lock()
	defer m.adding.Unlock()
	if _, is := m.lent[id]; is || m.done || p.ended() {
		return false
	}
	now := virtualID(p.main.addr.Load())
	other := (*m.ports.Load())[id]
	m.changeLocked(func(ports map[uint64]*port) {
		if other != nil {
			m.lastID += 2
			next, s := virtualAddr(m.lastID), other.source(virtualAddr(id))
			s.addr.Store(next)
			ports[virtualID(next)] = other
		}
		ports[id] = p
	})
	p.former = now
	p.main.addr.Store(virtualAddr(id))
	m.settleLocked()
	return true
}

// due reports whether it is time for a rescue, when the last packet of the session came over p at came and the last one over the link of the
// active address at heard, 0 for never. One look is not enough: a standby that is being validated brings some packets as well, while an idle
// session's active path is silent for 15 s at a time.
func (k *stuck) due(p *port, came, heard, now, after time.Duration) bool {
	if k.over != p || k.since <= heard {
		*k = stuck{over: p, since: now}
		return false
	}
	if now-k.since < after || came-k.since < rescueEvery {
		return false
	}
	*k = stuck{}
	return true
}

// behind reports whether the active address of a session is number id.
func (s *Server) behind(id uint64) bool {
	for _, sess := range s.list() {
		if a, ok := sess.conn.RemoteAddr().(*net.UDPAddr); ok && virtualID(a) == id {
			return true
		}
	}
	return false
}

// lend has what is sent to address a leave over p. What arrives is shown as before. It reports whether it did.
func (m *Merged) lend(a *net.UDPAddr, p *port, now time.Duration) bool {
	m.adding.Lock()
	defer m.adding.Unlock()
	id := virtualID(a)
	if m.done || p.ended() {
		return false
	}
	before, again := m.lent[id]
	if !again {
		before.own = (*m.ports.Load())[id]
	}
	before.at = now
	m.lent[id] = before
	m.changeLocked(func(ports map[uint64]*port) { ports[id] = p })
	m.settleLocked()
	m.stats.rescued.Add(1)
	return true
}

// lentSince says since when address a is lent, if it is.
func (m *Merged) lentSince(a *net.UDPAddr) (time.Duration, bool) {
	m.adding.Lock()
	defer m.adding.Unlock()
	l, ok := m.lent[virtualID(a)]
	return l.at, ok
}

// lentFor reports whether address a has been lent for d, and begins to count anew if it has.
func (m *Merged) lentFor(a *net.UDPAddr, d, now time.Duration) bool {
	m.adding.Lock()
	defer m.adding.Unlock()
	l, ok := m.lent[virtualID(a)]
	if !ok || now-l.at < d {
		return false
	}
	l.at = now
	m.lent[virtualID(a)] = l
	return true
}

// reclaim gives addresses back to their own links where these carry QUIC packets again, where the link that they were lent to has ended, and where
// used, which must not need adding, says that no session is there any more.
func (m *Merged) reclaim(used func(id uint64) bool) {
	m.adding.Lock()
	defer m.adding.Unlock()
	for id, l := range m.lent {
		own := l.own
		if own != nil && own.ended() {
			own = nil
		}
		if (*m.ports.Load())[id] != nil && (own == nil || own.heard() <= l.at) && used(id) {
			continue
		}
		delete(m.lent, id)
		m.changeLocked(func(ports map[uint64]*port) {
			if own != nil {
				ports[id] = own
			} else {
				delete(ports, id)
			}
		})
		m.settleLocked()
	}
}
