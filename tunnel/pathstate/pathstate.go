// Package pathstate judges the paths of a session by their probes: which lives, how good it is, and when the session should move from its active
// path to its standby. It does no I/O and keeps no clock: times and packets go in, actions come out.
//
//	m := pathstate.New()
//	m.Roles(now, active, standby)
//	m.Packet(now, active, answer)
//	actions, wait := m.Step(now) // do the actions, call again after wait, or sooner when told to
//
// Life of a path is an answered probe of ours. A path is suspect when a probe is late, or somebody doubts it, which has more sent in quick succession;
// it is dead when none of these is answered though one on another path is that went out later, or after longer if nothing at all was heard. An answer to a probe that
// was sent after its death makes it alive again: one that was held back or played back does not.
//
// A Machine's owner may itself be woken late. What the owner slept beyond its time does not count as time that an answer took.
package pathstate

import (
	"slices"
	"time"

	"sallyway/stun"
)

// Liveness is the state of a path by its probes.
type Liveness string

// The states.
const (
	Unknown Liveness = "unknown"
	Alive   Liveness = "alive"
	Suspect Liveness = "suspect"
	Dead    Liveness = "dead"
)

// Times of probing.
const (
	// BusyInterval is between probes while flows move, IdleInterval while none do, streamInterval on the active path while they move streamRate bytes
	// a second or more.
	BusyInterval   = 100 * time.Millisecond
	IdleInterval   = 15 * time.Second
	streamInterval = 50 * time.Millisecond
	streamRate     = 1 << 20
	// suspectInterval is between the probes to a suspect path, and the least between any two. After silence silentProbes decide, so that random loss
	// does not; after a doubt that has a reason doubtProbes do.
	suspectInterval = 20 * time.Millisecond
	silentProbes    = 4
	doubtProbes     = 3
	// leastLate and mostLate bound after how long a probe is late; in between it is the path's round-trip time and four deviations.
	leastLate = 30 * time.Millisecond
	mostLate  = time.Second
	// leastSilent and mostSilent bound for how long a path must be silent to be dead without a doubt that has a reason; in between it is half as long
	// again as what any answer took of late.
	leastSilent = 150 * time.Millisecond
	mostSilent  = 200 * time.Millisecond
	// deadInterval is between probes to a dead path.
	deadInterval = time.Second
	// unheard is for how long a path must be silent if no probe that went out since was answered on any path: then it may be this host, or its access.
	unheard = 400 * time.Millisecond
	// overslept is by how much the owner may be late without notice. When it was later, no path dies for as long again, mostExcuse at most, unless later
	// probes were answered on another: answers may still lie in a socket. A suspicion is put off for mostSuspicion in all.
	overslept     = 5 * time.Millisecond
	mostExcuse    = 250 * time.Millisecond
	mostSuspicion = 500 * time.Millisecond
	// mostMissed bounds the probes to a suspect path that are sent together because the owner was late for them.
	mostMissed = 2
	// retryMove is after how long a move that the owner could not make is asked for again.
	retryMove = 100 * time.Millisecond
	// leastWait is the least that Step has its owner wait.
	leastWait = time.Millisecond
)

// Cause says in a word why a session moved.
type Cause string

// The causes. Owner is a move that the machine did not ask for.
const (
	CauseDead    Cause = "dead"
	CauseGone    Cause = "gone"
	CauseLoss    Cause = "loss"
	CauseRTT     Cause = "rtt"
	CauseStalled Cause = "stalled"
	CauseBack    Cause = "back"
	CauseRung    Cause = "rung"
	CauseOwner   Cause = "owner"
)

// Path is one way to the peer. Its fields belong to the Machine; see Status.
type Path struct {
	name   string
	rank   int
	prober *stun.Prober // nil: not probed yet

	state Liveness
	since time.Time // of state, not virtual
	quiet time.Time // as silent, not virtual
	gone  bool

	// Virtual times.
	sent    time.Time // when a probe last was
	silent  time.Time // when the first unanswered probe went out, while suspect
	suspect time.Time // since when
	died    time.Time

	doubted bool // somebody has a reason
	reason  bool // the suspicion began with a doubt
	soon    bool // a probe is wanted at once
	burst   int  // probes sent in a row while suspect
	slow    slowest
}

// NewPath makes a path. The name is what penalties are remembered by; of two paths that are as good the one of lower rank is preferred.
func NewPath(name string, rank int) *Path { return &Path{name: name, rank: rank, state: Unknown} }

// Status is what is known of a path.
type Status struct {
	State Liveness
	// Since is when State began; zero if it never changed.
	Since time.Time
	// Probes is what the probes tell. Loss is over the last 64, 6 s of a busy session; LastAnswer does not count what the owner overslept.
	Probes stun.PathStats
	// HeldUntil is until when the session does not go back to this path because it was left for being bad; zero if it was not.
	HeldUntil time.Time
}

// Action is what the owner is to do: send Probe on Path, if it is not nil; else move the session to Path, if Cause is not empty; else tell that the
// state of Path is State now.
type Action struct {
	Path   *Path
	Probe  []byte
	Cause  Cause
	Reason string
	State  Liveness
}

// Machine judges one session's paths. It is not safe for concurrent use.
type Machine struct {
	clock           clock
	active, standby *Path
	busy            bool
	busySince       time.Time // virtual, as all times below
	heard           time.Time // when the last probe went out, on any path, that was answered
	hold            time.Time // no path dies before
	missed          int       // probes to suspect paths that the owner was too late for
	moved           time.Time // when the active path last changed; zero: never
	asked           time.Time // when a move was last asked for
	target          *Path     // of that move
	left            Cause     // and why
	actions         []Action
	quality         quality
}

// New makes a machine without paths.
func New() *Machine { return &Machine{quality: quality{held: map[string]*penalty{}}} }

// Probe gives a path its prober, before which it is unknown and not probed.
func (m *Machine) Probe(p *Path, prober *stun.Prober) { p.prober = prober }

// Roles says which paths the session has now; standby may be nil.
func (m *Machine) Roles(now time.Time, active, standby *Path) {
	v := m.advance(now)
	if active != m.active {
		if m.active != nil {
			m.moved = v
			if active == m.target {
				m.quality.leave(v, m.active, m.left)
			} else {
				m.quality.home = "" // the owner knows better
			}
			if active.name == m.quality.home {
				m.quality.home = ""
			}
			m.quality.fresh()
		}
		m.active, m.target = active, nil
	}
	if standby != m.standby {
		m.standby, m.target = standby, nil
		m.quality.fresh()
	}
}

// Busy says whether flows move: then paths are probed often and judged by how good they are.
func (m *Machine) Busy(now time.Time, busy bool) {
	v := m.advance(now)
	if busy && !m.busy {
		m.busySince = v
		m.quality.fresh()
	}
	m.busy = busy
}

// Packet takes a received answer. It reports whether it is one to a probe of the path's, and whether Step should be called soon.
func (m *Machine) Packet(now time.Time, p *Path, b []byte) (ok, wake bool) {
	v := m.advance(now)
	if p.prober == nil {
		return false, false
	}
	a, ok := p.prober.Handle(v, b)
	if !ok {
		return false, false
	}
	asked := v.Add(-a.RTT)
	if asked.After(m.heard) {
		m.heard = asked
	}
	p.slow.note(v, a.RTT)
	switch {
	case p.gone:
		return true, false
	case p.state == Dead && asked.Before(p.died):
		p.soon = true // what was under way when it died proves nothing now
		return true, true
	}
	p.burst, p.doubted = 0, false
	changed := p.state != Alive
	m.set(now, p, Alive)
	return true, changed
}

// Doubt has a path probed at once, for a reason such as a refusal by ICMP.
func (m *Machine) Doubt(p *Path) { p.doubted = !p.gone }

// Gone says that a path's link has ended for good.
func (m *Machine) Gone(now time.Time, p *Path) {
	p.gone = true
	m.set(now, p, Dead)
}

// set changes a path's state and tells of it.
func (m *Machine) set(now time.Time, p *Path, s Liveness) {
	if p.state != s {
		p.state, p.since = s, now
		// Only the last state counts for one that was not told yet.
		m.actions = slices.DeleteFunc(m.actions, func(a Action) bool { return a.Path == p })
		m.actions = append(m.actions, Action{Path: p, State: s})
	}
}

// Status says what is known of a path.
func (m *Machine) Status(now time.Time, p *Path) Status {
	st := Status{State: p.state, Since: p.since}
	if p.prober != nil {
		st.Probes = p.prober.Stats()
	}
	if h := m.quality.held[p.name]; h != nil {
		if left := h.until.Sub(m.clock.virtual); left > 0 {
			st.HeldUntil = now.Add(left)
		}
	}
	return st
}

// Step does what is due. The actions are valid until the next call; Step wants to be called again after wait, or when something happened.
func (m *Machine) Step(now time.Time) (actions []Action, wait time.Duration) {
	v := m.advance(now)
	interval := IdleInterval
	if m.busy {
		interval = BusyInterval
	}
	wait = interval
	pair := [2]*Path{m.active, m.standby}
	for i, p := range pair {
		if p != nil && m.judge(now, v, p) {
			// Whether it is the path alone, the other one tells.
			if other := pair[1-i]; other != nil {
				other.soon = true
			}
		}
	}
	for _, p := range pair {
		switch {
		case p == nil:
		case p == m.active && m.busy && m.quality.rate >= streamRate:
			wait = min(wait, m.probe(v, p, streamInterval))
		default:
			wait = min(wait, m.probe(v, p, interval))
		}
	}
	m.missed = 0
	wait = min(wait, m.decide(v))
	wait = max(wait, leastWait)
	m.clock.due = now.Add(wait)
	actions, m.actions = m.actions, nil
	return actions, wait
}

// judge looks at the probes of a path that are late. It reports whether the path has just become suspect.
func (m *Machine) judge(now, v time.Time, p *Path) bool {
	if p.prober == nil || p.gone {
		return false
	}
	late := p.late()
	lost := p.prober.Expire(v, late)
	switch p.state {
	case Dead:
	case Suspect:
		p.reason = p.reason || p.doubted
		if m.isDead(now, v, p) {
			p.died = v
			m.set(now, p, Dead)
		}
	default:
		if lost == 0 && !p.doubted {
			break
		}
		p.suspect, p.silent, p.quiet, p.reason, p.burst = v, v, now, p.doubted, 0
		if lost > 0 {
			p.silent, p.quiet = v.Add(-late), now.Add(-late)
		}
		m.set(now, p, Suspect)
		p.doubted = false
		return true
	}
	p.doubted = false
	return false
}

// isDead reports whether a suspect path is dead.
func (m *Machine) isDead(now, v time.Time, p *Path) bool {
	want, lost := silentProbes, silentProbes+1
	if p.reason {
		want, lost = doubtProbes, doubtProbes
	}
	if p.burst < want || p.prober.Stats().Unanswered < lost {
		return false
	}
	if m.heard.After(p.silent) { // then what this process overslept is no excuse
		return p.reason || now.Sub(p.quiet) >= p.deadAfter(v)
	}
	if v.Before(m.hold) && v.Sub(p.suspect) < mostSuspicion {
		return false
	}
	return p.reason || v.Sub(p.silent) >= unheard
}

// late is after how long a probe on the path is.
func (p *Path) late() time.Duration { return p.prober.Timeout(leastLate, mostLate) }

// deadAfter is how long the path must be silent.
func (p *Path) deadAfter(v time.Time) time.Duration {
	return min(max(p.slow.most(v)*3/2, leastSilent), mostSilent)
}

// probe sends what is due on a path, and returns when there is more to do for it.
func (m *Machine) probe(v time.Time, p *Path, interval time.Duration) time.Duration {
	if p.prober == nil || p.gone {
		return IdleInterval
	}
	late, since := p.late(), v.Sub(p.sent)
	switch {
	case p.soon:
		interval = suspectInterval
	case p.state == Dead:
		interval = min(interval, deadInterval)
	case p.state == Suspect && p.burst < silentProbes:
		interval = suspectInterval
	case p.state == Suspect:
		interval = min(interval, BusyInterval)
	}
	if !p.sent.IsZero() && since < interval {
		wait := interval - since
		if since < late {
			wait = min(wait, late-since) // it is judged when it is late, even if the next one is due much later
		}
		if p.state == Suspect {
			// Those before it are judged, too.
			wait = min(wait, suspectInterval)
		}
		return wait
	}
	m.actions = append(m.actions, Action{Path: p, Probe: p.prober.Probe(v, 0)})
	p.sent, p.soon = v, false
	if p.state == Suspect {
		p.burst++
		for range min(m.missed, silentProbes-p.burst) {
			m.actions = append(m.actions, Action{Path: p, Probe: p.prober.Probe(v, 0)})
			p.burst++
		}
		return suspectInterval
	}
	return min(interval, late)
}

// decide asks for a move where one is due, and returns when it wants to look again.
func (m *Machine) decide(v time.Time) time.Duration {
	a, b := m.active, m.standby
	if a == nil || b == nil {
		return IdleInterval
	}
	again := IdleInterval
	var cause Cause
	var reason string
	switch {
	case a.state == Dead && (b.state == Alive || b.state == Unknown && b.prober != nil && !b.gone):
		cause, reason = CauseDead, "left "+a.name+": probes are not answered"
		if a.gone {
			cause, reason = CauseGone, "left "+a.name+": its link ended"
		}
	case m.busy && a.state != Dead && b.state == Alive:
		cause, reason = m.judgeQuality(v)
		again = BusyInterval
	}
	if cause == "" {
		return again
	}
	if m.target == b && !m.asked.IsZero() && v.Sub(m.asked) < retryMove {
		return retryMove - v.Sub(m.asked)
	}
	m.asked, m.target, m.left = v, b, cause
	m.actions = append(m.actions, Action{Path: b, Cause: cause, Reason: reason})
	return retryMove
}

// clock is time without what the owner overslept.
type clock struct {
	at, virtual time.Time
	due         time.Time // when the owner is to come; zero: it is not waited for
}

// advance takes the time, notes when the owner is late, and returns the virtual time.
func (m *Machine) advance(now time.Time) time.Time {
	c := &m.clock
	if c.at.IsZero() {
		c.at, c.virtual = now, now
		return c.virtual
	}
	passed := now.Sub(c.at)
	c.at = now
	if passed < 0 { // the clock went back
		c.due = c.due.Add(passed)
		return c.virtual
	}
	if c.due.IsZero() {
		c.virtual = c.virtual.Add(passed)
		return c.virtual
	}
	if late := now.Sub(c.due); late > overslept {
		c.due = now
		m.missed = min(m.missed+int(late/suspectInterval), mostMissed)
		c.virtual = c.virtual.Add(max(passed-late, 0))
		if hold := c.virtual.Add(min(late, mostExcuse)); hold.After(m.hold) {
			m.hold = hold
		}
		return c.virtual
	}
	c.virtual = c.virtual.Add(passed)
	return c.virtual
}

// slowest is the longest round trip of late: of the present period and the one before it. The zero slowest has seen none.
type slowest struct {
	began     time.Time
	last, now time.Duration
}

const slowPeriod = 15 * time.Second

func (s *slowest) note(v time.Time, rtt time.Duration) {
	s.turn(v)
	s.now = max(s.now, rtt)
}

func (s *slowest) most(v time.Time) time.Duration {
	s.turn(v)
	return max(s.last, s.now)
}

func (s *slowest) turn(v time.Time) {
	switch passed := v.Sub(s.began); {
	case passed >= 2*slowPeriod:
		*s = slowest{began: v}
	case passed >= slowPeriod:
		*s = slowest{began: v, last: s.now}
	}
}
