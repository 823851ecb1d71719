package tunnel

import (
	"context"
	"fmt"
	"maps"
	"time"

	"sallyway/internal/datagram"
	"sallyway/stun"
	"sallyway/tunnel/pathstate"
)

// PathRole says what a session uses a path for.
type PathRole string

// The roles.
const (
	RoleActive  PathRole = "active"
	RoleStandby PathRole = "standby"
)

// PathEvent is a change of a path's state.
type PathEvent struct {
	Role  PathRole
	Link  datagram.Link
	Info  LinkInfo
	State Liveness
}

// PathStatus is what is known of one path.
type PathStatus struct {
	Link  datagram.Link
	Info  LinkInfo
	State Liveness
	// Since is when State began; zero if it never changed.
	Since time.Time
	// Probes is what the probes tell: round-trip time, and loss over the last 64.
	Probes stun.PathStats
	// HeldUntil is until when the session does not go back to the path because it was bad; zero if it was not.
	HeldUntil time.Time
}

// MoveCause says in a word why a session moved.
type MoveCause = pathstate.Cause

// PathInfo is a session's paths. Standby.Link is nil where there is none. Active.Link never is: when the session is over it is one that
// is done.
type PathInfo struct {
	Active, Standby PathStatus
	// Moves counts how often the active path changed; LastMove is when and LastReason why.
	Moves      uint64
	LastMove   time.Time
	LastReason string
	// Causes counts moves by why; those that the session's owner made are pathstate.CauseOwner.
	Causes map[MoveCause]uint64
}

// revalidate is after how long an unanswered validation of the spare slot is given up; it runs over a path that has just answered.
const revalidate = 2 * time.Second

func (s *Session) newLink(sl *slot, l datagram.Link, info LinkInfo) *slotLink {
	return &slotLink{s: sl, link: l, info: info, mon: s.monitors.add(l, info), gone: make(chan struct{})}
}

// pointLocked points slot i to l. A link that another slot receives from changes hands.
func (s *Session) pointLocked(i int, l datagram.Link, info LinkInfo) {
	sl := s.slots[i]
	next := s.newLink(sl, l, info)
	next.mon.start(s.keys)
	for j, other := range s.slots {
		if to := other.to.Load(); j != i && to != nil && to.link == l {
			to.receives.Store(false)
		}
	}
	sl.point(next, true)
	s.watchLink(next)
	s.stepSoon()
}

// watchLink notices the end of a link that a slot was pointed to. After the handshake it needs mu, and a session that is not over.
func (s *Session) watchLink(l *slotLink) {
	s.tasks.Go(func() {
		select {
		case <-l.link.Done():
			l.mon.lost()
		case <-l.gone:
		case <-s.ctx.Done():
		}
	})
}

// validate has QUIC prove that slot i reaches the gateway (RFC 9000 §8.2). The caller holds validating, not mu.
func (s *Session) validate(ctx context.Context, i int) error {
	// HTTP/3 asked for the connection's state when the settings came, which reads what a move writes. Asking once more, before the first
	// move, orders the two by the lock inside. There is no move before a slot was validated.
	s.settled.Do(func() { s.conn.ConnectionState() })
	sl := s.slots[i]
	s.mu.Lock()
	path := sl.path
	if path == nil {
		var err error
		if path, err = s.conn.AddPath(sl.tr); err != nil {
			s.mu.Unlock()
			return err
		}
		sl.path = path
	}
	sl.validated = false // QUIC forgets, too, until the answer is here
	s.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.conn.Context(), func() { cancel(context.Cause(s.conn.Context())) })()
	if err := path.Probe(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	sl.validated = true
	s.mu.Unlock()
	return nil
}

// prepareSpare has the spare slot validated over the standby's link. Without a standby that is the first link, by the gateway's alias for it,
// so that Repoint has a spare even if there is never a standby; it costs the gateway one of the two connection IDs that it has to spare, which
// a standby needs.
func (s *Session) prepareSpare() {
	s.validating.Lock()
	defer s.validating.Unlock()
	s.mu.Lock()
	i, _ := s.freeLocked() // the one that is not validated, if there is one
	over := s.slots[s.active].to.Load()
	if s.standby >= 0 {
		over = s.slots[s.standby].to.Load()
	}
	if s.err != nil || s.slots[i].validated || s.standby < 0 && !s.cfg.SingleLink {
		s.mu.Unlock()
		return
	}
	spare := s.newLink(s.slots[i], over.link, over.info)
	spare.alias = s.standby < 0
	s.slots[i].point(spare, false)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(s.ctx, revalidate)
	defer cancel()
	if err := s.validate(ctx, i); err != nil {
		s.cfg.Logger.Debug("spare slot not validated", "gateway", s.cfg.Gateway, "err", err)
	}
}

// Standby points a free slot to l and validates it end to end, so that Failover can move there without asking. A standby that was set
// before is let go. It fails when no answer comes before ctx ends; the session and its former standby do not suffer.
func (s *Session) Standby(ctx context.Context, l datagram.Link, info LinkInfo) error {
	if l.MaxPayload() < initialPacket {
		return fmt.Errorf("standby %s: the link carries %d bytes at most, QUIC needs %d", info.Name, l.MaxPayload(), initialPacket)
	}
	s.validating.Lock()
	defer s.validating.Unlock()
	i, err := s.lockFree(ctx)
	if err != nil {
		return fmt.Errorf("standby %s: %w", info.Name, err)
	}
	s.pointLocked(i, l, info)
	s.mu.Unlock()
	if err := s.validate(ctx, i); err != nil {
		if s.conn.Context().Err() != nil {
			err = sessionError(context.Cause(s.conn.Context()))
		} else {
			s.tellCrowded()
		}
		return fmt.Errorf("standby %s: %w", info.Name, err)
	}
	s.mu.Lock()
	if i == s.active { // Repoint was faster
		s.mu.Unlock()
		return nil
	}
	s.standby = i
	spare := slots - s.active - i // the indices sum up to 3
	needed := !s.slots[spare].validated && !s.emptyingLocked(spare)
	if needed {
		// A slot that was once validated can be switched to when nothing else works any more, and only then it matters. It is validated
		// over the path that has just answered; what arrives there stays with the standby's slot.
		s.slots[spare].point(s.newLink(s.slots[spare], l, info), false)
	}
	s.mu.Unlock()
	if needed {
		ctx, cancel := context.WithTimeout(ctx, revalidate)
		defer cancel()
		if err := s.validate(ctx, spare); err != nil {
			s.cfg.Logger.Debug("spare slot not validated", "gateway", s.cfg.Gateway, "err", err)
		}
	}
	s.stepSoon()
	return nil
}

// tellCrowded has the gateway free connection IDs, if the active path lives: else there is no use in it.
func (s *Session) tellCrowded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if to := s.slots[s.active].to.Load(); to == nil || to.mon.status().State != Alive {
		return
	}
	if err := s.ctrl.send(Notice{Type: noticeCrowded}); err != nil {
		s.cfg.Logger.Debug("notice not sent", "gateway", s.cfg.Gateway, "err", err)
	}
}

// lockFree picks the slot for a standby and returns with mu held, unless it fails. If the answer never comes the slot is not validated any more,
// and where that was the last one there is no way out of a dead path but QUIC's own timer, backed off to seconds. So while the only other
// slot still receives what was under way before the last move, it waits for the end of that.
func (s *Session) lockFree(ctx context.Context) (int, error) {
	for start := time.Now(); ; {
		s.mu.Lock()
		if s.err != nil {
			defer s.mu.Unlock()
			return 0, s.err
		}
		i, last := s.freeLocked()
		if !last || time.Since(start) > emptied*5 {
			return i, nil
		}
		s.mu.Unlock()
		select {
		case <-time.After(emptied / 10):
		case <-s.ctx.Done(): // err follows
			<-s.conn.Context().Done()
			return 0, sessionError(context.Cause(s.conn.Context()))
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// freeLocked picks a slot that is neither active nor standby: rather not the one that was active a moment ago, rather one that was not
// validated yet. It also says whether it is the last one beside the active that is.
func (s *Session) freeLocked() (free int, last bool) {
	free = -1
	for i, sl := range s.slots {
		if i == s.active || i == s.standby {
			continue
		}
		if free < 0 || s.emptyingLocked(free) || (!sl.validated && !s.emptyingLocked(i)) {
			free = i
		}
	}
	last = s.slots[free].validated
	for i, sl := range s.slots {
		last = last && (i == s.active || i == free || !sl.validated)
	}
	return free, last
}

// emptying is how long packets may still arrive on a path after the session moved away from it, and emptied after how long without one they do not.
const emptying, emptied = 3 * time.Second, 100 * time.Millisecond

// emptyingLocked reports whether packets may still arrive at slot i from before the last move.
func (s *Session) emptyingLocked(i int) bool {
	if i != s.former || s.lastMove.IsZero() {
		return false
	}
	moved := time.Since(s.lastMove)
	return moved < emptied || moved < emptying && sinceEpoch()-time.Duration(s.slots[i].src.last.Load()) < emptied
}

// Failover moves the session to the standby path at once. It returns ErrNoStandby when there is none. The old path goes on receiving
// until its slot is pointed elsewhere.
func (s *Session) Failover(reason string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.standby < 0 || !s.slots[s.standby].validated {
		return ErrNoStandby
	}
	return s.switchLocked(s.standby, reason, pathstate.CauseOwner)
}

// moveLocked moves the session to p if that is the standby, for a reason of the machine's, and returns where from.
func (s *Session) moveLocked(p *pathstate.Path, reason string, cause MoveCause) (from LinkInfo, ok bool) {
	if s.err != nil || s.standby < 0 || !s.slots[s.standby].validated {
		return from, false
	}
	was, to := s.slots[s.active].to.Load(), s.slots[s.standby].to.Load()
	if was == nil || to == nil || to.mon.path != p {
		return from, false
	}
	if err := s.switchLocked(s.standby, reason, cause); err != nil {
		s.cfg.Logger.Warn("path not moved", "gateway", s.cfg.Gateway, "err", err)
		return from, false
	}
	return was.info, true
}

// switchLocked makes slot i active.
func (s *Session) switchLocked(i int, reason string, cause MoveCause) error {
	if err := s.slots[i].path.Switch(); err != nil {
		return fmt.Errorf("move to path %s: %w", s.slots[i].to.Load().info.Name, err)
	}
	s.former, s.active = s.active, i
	if s.standby == i {
		s.standby = -1
	}
	s.movedLocked(reason, cause)
	return nil
}

// movedLocked tells everybody of a move. The gateway's QUIC follows only on a packet that is no probe, so there must be one now.
func (s *Session) movedLocked(reason string, cause MoveCause) {
	s.moves++
	s.causes[cause]++
	s.knocks = 0
	s.lastMove, s.lastReason = time.Now(), reason
	to := s.slots[s.active].to.Load()
	s.tellMoveLocked(reason)
	s.cfg.Logger.Debug("session moved", "gateway", s.cfg.Gateway, "path", to.info.Name, "reason", reason)
	s.stepSoon()
}

// Repoint moves the session to l without validating it first: the way back after every path was lost. A slot that was validated before
// carries it, so that congestion control and timers start anew. Where there is none (no Standby was ever set, nor SingleLink) the active
// slot itself is pointed to l, and QUIC's retransmission timer, backed off by then, sets the pace.
func (s *Session) Repoint(l datagram.Link, info LinkInfo, reason string) error {
	if l.MaxPayload() < initialPacket {
		return fmt.Errorf("move to path %s: the link carries %d bytes at most, QUIC needs %d", info.Name, l.MaxPayload(), initialPacket)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	i := -1
	for j, sl := range s.slots {
		// The standby's slot is the last resort: it may still come back.
		if j != s.active && sl.validated && (i < 0 || i == s.standby) {
			i = j
		}
	}
	if i >= 0 {
		s.pointLocked(i, l, info)
		return s.switchLocked(i, reason, pathstate.CauseOwner)
	}
	for j, sl := range s.slots {
		// The answer to a validation that was given up may have come since.
		if j == s.active || sl.path == nil {
			continue
		}
		s.pointLocked(j, l, info)
		if s.switchLocked(j, reason, pathstate.CauseOwner) == nil {
			sl.validated = true
			return nil
		}
	}
	s.pointLocked(s.active, l, info)
	s.movedLocked(reason, pathstate.CauseOwner)
	return nil
}

// Suspect has the paths on l probed at once: what a refusal by ICMP or a leg's doubt is worth.
func (s *Session) Suspect(l datagram.Link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range []int{s.active, s.standby} {
		if i < 0 {
			continue
		}
		if to := s.slots[i].to.Load(); to != nil && to.link == l {
			to.mon.suspect()
		}
	}
}

// Path says what the paths are and how they do.
func (s *Session) Path() PathInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	info := PathInfo{Active: s.statusLocked(s.active), Moves: s.moves, LastMove: s.lastMove, LastReason: s.lastReason, Causes: maps.Clone(s.causes)}
	if info.Active.Link == nil { // the slots are closed before Done is
		info.Active.Link = endedLink{}
	}
	if s.standby >= 0 {
		info.Standby = s.statusLocked(s.standby)
	}
	return info
}

// endedLink is the link of a session that is over.
type endedLink struct{}

var endedDone = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

func (endedLink) Send([]byte, int, datagram.ECN) {}
func (endedLink) SetReceiver(datagram.Receiver)  {}
func (endedLink) MaxPayload() int                { return 0 }
func (endedLink) Done() <-chan struct{}          { return endedDone }

func (s *Session) statusLocked(i int) PathStatus {
	to := s.slots[i].to.Load()
	if to == nil {
		return PathStatus{State: Dead}
	}
	st := to.mon.status()
	return PathStatus{Link: to.link, Info: to.info, State: st.State, Since: st.Since, Probes: st.Probes, HeldUntil: st.HeldUntil}
}

// stepSoon has watchPaths look again.
func (s *Session) stepSoon() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// watchPaths probes the active and the standby path, and does what the machine that judges them says, until the session ends. It alone steps it.
func (s *Session) watchPaths() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var moved uint64
	var lastMoved time.Time
	var window renewal
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
		case <-timer.C:
		}
		now := time.Now()
		busy := true
		if m := s.flows.total(); m != moved {
			moved, lastMoved = m, now
		} else if now.Sub(lastMoved) >= busyFor {
			s.flows.idle.Store(true)
			busy = s.flows.total() != moved // else a byte passed just before it would have woken us
		}
		busy = busy || s.unproven()
		var load pathstate.Load
		if busy {
			q := s.conn.ConnectionStats()
			if window.sample(now, q) && s.renew(now) {
				window.began(now)
			}
			load = pathstate.Load{Sent: q.PacketsSent, Lost: q.PacketsLost, Received: q.PacketsReceived, Bytes: s.flows.total()}
		}
		timer.Reset(min(s.step(now, busy, load), s.knock(now)))
	}
}

// step has the machine judge the paths and does what it says. It returns when there is more to do.
func (s *Session) step(now time.Time, busy bool, load pathstate.Load) time.Duration {
	s.mu.Lock()
	active, standby := s.slots[s.active].to.Load(), (*slotLink)(nil)
	if s.standby >= 0 {
		standby = s.slots[s.standby].to.Load()
	}
	s.mu.Unlock()
	if active == nil { // the session is over
		return idleInterval
	}
	var other *monitor
	if standby != nil {
		other = standby.mon
	}
	actions, wait := s.monitors.step(now, active.mon, other, busy, load)
	for _, a := range actions {
		l, role := active, RoleActive
		if standby != nil && a.Path == standby.mon.path {
			l, role = standby, RoleStandby
		} else if a.Path != active.mon.path {
			continue // the session has left it
		}
		switch {
		case a.Probe != nil:
			l.link.Send(a.Probe, 0, datagram.NotECT)
		case a.Cause != "":
			if s.move(l, a) {
				wait = 0
			}
		default:
			s.tell(role, l, a.State)
		}
	}
	return wait
}

// move moves the session to its standby, as the machine says.
func (s *Session) move(to *slotLink, a pathstate.Action) bool {
	s.mu.Lock()
	from, ok := s.moveLocked(a.Path, a.Reason, a.Cause)
	s.mu.Unlock()
	if !ok {
		return false
	}
	s.cfg.Logger.Info("path moved", "gateway", s.cfg.Gateway, "from", from.Name, "to", to.info.Name, "reason", a.Reason, "cause", a.Cause)
	s.tell(RoleActive, to, to.mon.status().State)
	return true
}

// tell has OnPath called.
func (s *Session) tell(role PathRole, l *slotLink, state Liveness) {
	s.mu.Lock()
	if to := s.slots[s.active].to.Load(); to != nil && to.mon == l.mon { // it may have moved meanwhile
		role = RoleActive
	}
	s.mu.Unlock()
	if role == RoleActive && state == Alive {
		s.pathAnswers(l)
	}
	select {
	case s.events <- PathEvent{Role: role, Link: l.link, Info: l.info, State: state}:
	default:
		s.cfg.Logger.Warn("path event lost: OnPath is too slow", "gateway", s.cfg.Gateway, "state", state)
	}
}

// pathAnswers says once more that the session moved, when a path that it moved to without validating it begins to answer. The first
// message may have been lost before the gateway had bound its end, and QUIC's own retransmission is backed off by the outage.
func (s *Session) pathAnswers(l *slotLink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.moves == 0 || s.slots[s.active].to.Load() != l {
		return
	}
	s.tellMoveLocked("the path answers")
}

// tellPaths calls OnPath.
func (s *Session) tellPaths() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case e := <-s.events:
			s.cfg.Logger.Debug("path", "gateway", s.cfg.Gateway, "role", e.Role, "path", e.Info.Name, "state", e.State)
			if s.cfg.OnPath != nil {
				s.cfg.OnPath(e)
			}
		}
	}
}
