package tunnel

import (
	"net/netip"
	"sync"
	"time"

	"sallyway/internal/datagram"
	"sallyway/stun"
	"sallyway/tunnel/pathstate"
)

// Liveness is the state of a path by its probes.
type Liveness = pathstate.Liveness

// The states. A path is suspect when a probe is late, which has more sent at once, and dead when none of these is answered or its
// link is gone. An answer makes it alive again.
const (
	Unknown = pathstate.Unknown
	Alive   = pathstate.Alive
	Suspect = pathstate.Suspect
	Dead    = pathstate.Dead
)

const (
	// idleInterval is between probes while no flows move.
	idleInterval = pathstate.IdleInterval
	// busyFor is how long a session counts as busy after its last byte.
	busyFor = 2 * time.Second
)

// monitors are a session's, which share keys, the numbers of probes, and the machine that judges them all.
type monitors struct {
	wake func() // has the machine's owner step soon

	mu        sync.Mutex // guards what follows; taken after the session's
	machine   *pathstate.Machine
	numbers   stun.Numbers
	responder *stun.Responder // nil before the handshake
}

func newMonitors(wake func()) *monitors { return &monitors{wake: wake, machine: pathstate.New()} }

// monitor is what the machine knows one link by.
type monitor struct {
	all  *monitors
	link datagram.Link
	path *pathstate.Path
}

func (ms *monitors) add(l datagram.Link, info LinkInfo) *monitor {
	return &monitor{all: ms, link: l, path: pathstate.NewPath(info.Name, info.Rank)}
}

// start gives the monitor the session's keys, before which it neither probes nor answers.
func (m *monitor) start(k stun.Keys) {
	m.all.mu.Lock()
	defer m.all.mu.Unlock()
	if m.all.responder == nil {
		m.all.responder = stun.NewOrderedResponder(k, 0, 0)
	}
	m.all.machine.Probe(m.path, stun.NewNumberedProber(k, &m.all.numbers))
}

// handle takes a datagram that is no QUIC.
func (m *monitor) handle(b []byte) {
	if !stun.IsProbe(b) {
		return
	}
	now := time.Now()
	m.all.mu.Lock()
	responder := m.all.responder
	if responder != nil && !stun.IsRequest(b) {
		if _, wake := m.all.machine.Packet(now, m.path, b); wake {
			m.all.wake()
		}
		responder = nil
	}
	m.all.mu.Unlock()
	if responder == nil {
		return
	}
	if answer, ok := responder.Respond(now, b, netip.AddrPort{}); ok {
		m.link.Send(answer, 0, datagram.NotECT)
	}
}

// lost says that the link can not carry anything any more.
func (m *monitor) lost() {
	m.all.mu.Lock()
	defer m.all.mu.Unlock()
	m.all.machine.Gone(time.Now(), m.path)
	m.all.wake()
}

// suspect asks for probes at once.
func (m *monitor) suspect() {
	m.all.mu.Lock()
	defer m.all.mu.Unlock()
	m.all.machine.Doubt(m.path)
	m.all.wake()
}

// status says what the machine knows.
func (m *monitor) status() pathstate.Status {
	m.all.mu.Lock()
	defer m.all.mu.Unlock()
	return m.all.machine.Status(time.Now(), m.path)
}

// step tells the machine what there is, and returns what it wants done, and when it wants to be called again. standby may be nil.
func (ms *monitors) step(now time.Time, active, standby *monitor, busy bool, load pathstate.Load) ([]pathstate.Action, time.Duration) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	var other *pathstate.Path
	if standby != nil {
		other = standby.path
	}
	m := ms.machine
	m.Roles(now, active.path, other)
	m.Busy(now, busy)
	if busy {
		m.Load(now, load)
	}
	return m.Step(now)
}
