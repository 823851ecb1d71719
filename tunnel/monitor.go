package tunnel

import (
	"net/netip"
	"sync"
	"time"

	"sallyway/internal/datagram"
	"sallyway/stun"
)

// Liveness is the state of a path by its probes.
type Liveness string

// The states. A path is suspect when a probe is late, which has three more sent at once, and dead when none of these is answered or its
// link is gone. An answer makes it alive again.
const (
	Unknown Liveness = "unknown"
	Alive   Liveness = "alive"
	Suspect Liveness = "suspect"
	Dead    Liveness = "dead"
)

// Times of probing.
const (
	// busyInterval is between probes while flows move, idleInterval while none do.
	busyInterval = 100 * time.Millisecond
	idleInterval = 15 * time.Second
	// busyFor is how long a session counts as busy after its last byte.
	busyFor = 2 * time.Second
	// suspectProbes are sent suspectInterval apart to a suspect path.
	suspectProbes   = 3
	suspectInterval = 20 * time.Millisecond
	// leastLate and mostLate bound after how long a probe is late; in between it is the path's round-trip time and four deviations.
	leastLate = 50 * time.Millisecond
	mostLate  = time.Second
	// deadInterval is between probes to a dead path.
	deadInterval = time.Second
)

// monitor probes one link. It does no waiting: step is called when it asked to be, and when something happened.
type monitor struct {
	link datagram.Link
	wake func() // tells the session to step soon

	mu        sync.Mutex // guards what follows
	prober    *stun.Prober
	responder *stun.Responder
	state     Liveness
	changed   bool // since the last step
	gone      bool // the link's Done is closed
	asked     bool // somebody suspects the path
	lastSent  time.Time
	burst     int // probes sent in a row while suspect
}

func newMonitor(l datagram.Link, wake func()) *monitor {
	return &monitor{link: l, wake: wake, state: Unknown}
}

// start gives the monitor its keys, before which it neither probes nor answers.
func (m *monitor) start(k stun.Keys) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.prober, m.responder = stun.NewProber(k), stun.NewResponder(k, 0, 0)
}

// handle takes a datagram that is no QUIC.
func (m *monitor) handle(b []byte) {
	m.mu.Lock()
	prober, responder := m.prober, m.responder
	m.mu.Unlock()
	if prober == nil || !stun.IsProbe(b) {
		return
	}
	now := time.Now()
	if stun.IsRequest(b) {
		if answer, ok := responder.Respond(now, b, netip.AddrPort{}); ok {
			m.link.Send(answer, 0, datagram.NotECT)
		}
		return
	}
	if _, ok := prober.Handle(now, b); !ok {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.burst, m.asked = 0, false
	if !m.gone {
		m.setLocked(Alive)
	}
}

func (m *monitor) setLocked(s Liveness) {
	if m.state != s {
		m.state, m.changed = s, true
		m.wake()
	}
}

// lost says that the link can not carry anything any more.
func (m *monitor) lost() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gone = true
	m.setLocked(Dead)
}

// suspect asks for probes at once.
func (m *monitor) suspect() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.gone {
		m.asked = true
		m.wake()
	}
}

// step sends the probe that is due, judges those that are late, and says when it wants to be called again and whether the state changed.
func (m *monitor) step(now time.Time, interval time.Duration) (next time.Duration, state Liveness, changed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() { state, changed, m.changed = m.state, m.changed, false }()
	if m.prober == nil || m.gone {
		return idleInterval, "", false
	}
	late := m.prober.Timeout(leastLate, mostLate)
	lost := m.prober.Expire(now, late)
	switch {
	case m.state == Dead:
		interval = min(interval, deadInterval)
	case m.state == Suspect && lost > 0 && m.burst >= suspectProbes && m.prober.Stats().Unanswered >= suspectProbes:
		m.state, m.changed = Dead, true
		interval = deadInterval
	case m.state != Suspect && (lost > 0 || m.asked):
		m.state, m.changed = Suspect, true
		m.burst = 0
	}
	m.asked = false
	if m.state == Suspect {
		interval = suspectInterval
		if m.burst >= suspectProbes {
			// All are out: wait for what comes, answers or their lateness.
			if wait := late - now.Sub(m.lastSent); wait > 0 {
				return wait, "", false
			}
		}
	}
	if wait := interval - now.Sub(m.lastSent); wait > 0 {
		// A probe under way is judged when it is late, even if the next one is due much later.
		if since := now.Sub(m.lastSent); since < late {
			wait = min(wait, late-since)
		}
		return wait, "", false
	}
	m.link.Send(m.prober.Probe(now, 0), 0, datagram.NotECT)
	m.lastSent = now
	if m.state == Suspect {
		m.burst++
		return min(interval, late), "", false
	}
	return min(interval, late), "", false
}

// status says what the monitor knows.
func (m *monitor) status() (Liveness, stun.PathStats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.prober == nil {
		return m.state, stun.PathStats{}
	}
	return m.state, m.prober.Stats()
}
